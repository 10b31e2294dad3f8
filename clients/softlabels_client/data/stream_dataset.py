"""How does a DataLoader read an epoch as a stream? An iterable data set that ranks and workers share exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from softlabels.epochs import EpochIterator
from softlabels.errors import BadIdsError, ConflictError, FingerprintMismatchError, MissingExtraError

try:
    import torch
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info
except ImportError as error:
    raise MissingExtraError(
        "training a student needs torch, which is not installed: `pip install softlabels[torch]`", extra="torch"
    ) from error

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from softlabels.errors import MissingExtraError
from softlabels.ids import IdArray
from softlabels.losses import SoftTargetBatch
from softlabels.order import RankBatches, Remainder
from softlabels.target_store import TargetStore
from softlabels.targets import SoftTargets
from softlabels.transfer_set import TransferSet
from softlabels_client.data.dataset import Check, SoftTargetDataset, StoreInputs, samples_in
from softlabels_client.data.distillation_batch import DistillationBatch, collate_batches
from softlabels_client.data.loader import StatefulLoader
from softlabels_client.data.sampler import current_ranks, given_ranks
from softlabels_client.data.sampler_state import Course, EpochProgress, Walk

STORE_ORDER = "the store's own order"
"""What a place of a stream says of its data: it counts the store's samples, whatever order the inputs lie in."""


class SoftTargetStream(IterableDataset[DistillationBatch]):
    """Batches of an epoch of a whole store, with inputs paired by id; one HTTP stream a worker.

    For a DataLoader with `batch_size=None`; `stream_loader` makes one that advances from epoch to epoch by itself and
    keeps its place under any number of workers. In a bare DataLoader with workers call `set_epoch` before each pass.

    Args:
        store: what `softlabels.open` returned; finished.
        inputs: a transfer set, or a sequence, an array or a map-style torch data set together with `ids`, in any order;
            None takes the store's own, or none where it keeps none: then `DistillationBatch.inputs` is [B, 0].
        ids: [N] sample ids of `inputs`, where it is no transfer set.
        batch_size: samples a rank takes at a step.
        seed: of the training run.
        shuffle: a new order each epoch; False keeps the store's own.
        block: shuffle blocks of so many consecutive samples, then within a few of them, for slow disks.
        view: which view of every sample, where the store keeps views; another one each epoch in turn if left out.
        temperature, check: as `SoftTargetDataset` takes them.
        rank, world_size: which of how many ranks; torch.distributed's when left out, or one alone.
        remainder: "split" shares out what fills no last step, "drop" leaves it out, "pad" repeats some.
    Raises:
        As `SoftTargetDataset`; and while it is read, what `TargetStore.epoch` raises, and FingerprintMismatchError for
        a sample of the store that the inputs lack.
    """

    def __init__(
        self,
        store: TargetStore,
        inputs: Any = None,
        *,
        batch_size: int,
        ids: Iterable[Any] | NDArray[Any] | None = None,
        seed: int = 0,
        shuffle: bool = True,
        block: int | None = None,
        view: int | None = None,
        temperature: float | None = None,
        check: Check = "first",
        rank: int | None = None,
        world_size: int | None = None,
        remainder: Remainder = "split",
    ) -> None:
        self.store = store
        has_inputs = inputs is not None or "inputs" in store.manifest.arrays
        self._pairs = (
            SoftTargetDataset(inputs, store, ids=ids, temperature=temperature, check=check) if has_inputs else None
        )
        self._positions = None if self._pairs is None else _PositionOf(_all_ids(self._pairs.samples))
        self._temperature = temperature
        samples = store.manifest.samples
        self.course = Course(
            digest=store.digest, samples=samples, seed=seed, shuffle=shuffle, block=block, data=STORE_ORDER
        )
        self.batch_size, self._view = batch_size, view
        self.remainder: Remainder = remainder
        self._ranks = given_ranks(rank, world_size)
        self._walk = self.walk()
        self._walk.steps(EpochProgress(), self.ranks)  # refuses numbers that cannot be
        self._own: WorkerShare | None = None
        # In memory that workers see, too: those that live on from epoch to epoch have a copy of everything else.
        self._shared = torch.zeros(4, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._tell_workers()

    @property
    def ranks(self) -> tuple[int, int]:
        """Rank and world size."""
        return self._ranks or current_ranks()

    @property
    def epoch(self) -> int:
        """The epoch that the next pass goes through."""
        return self._walk.upcoming(self.ranks).epoch

    def walk(self) -> Walk:
        """A walk of its own over the same course, for whoever counts what is taken."""
        return Walk(self.course, batch_size=self.batch_size, remainder=self.remainder)

    def begin_at(self, place: EpochProgress) -> None:
        """The next pass begins here."""
        self._walk.load_state_dict(self.course.state_at(place))
        self.set_epoch(place.epoch)

    def set_epoch(self, epoch: int) -> None:
        """The next pass goes through this epoch; on from a place in it, if such a one was loaded."""
        self._walk.set_epoch(epoch)
        self._tell_workers()

    def state_dict(self) -> dict[str, Any]:
        """How far this process has come; ready for JSON. In a worker it is the place of that worker alone."""
        if self._own is not None:
            return self.course.state_at(self._own.place) | self._own.state()
        return self._walk.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a kept place. In a worker, from one that was kept in the same worker of as many.

        Raises:
            RequestError: this is no place.
            StoreChangedError, ConflictError: it is one in another training, or another worker's.
        """
        share = WorkerShare.here(self.course.place_in(state), self.ranks)
        kept, here = (state.get("worker", 0), state.get("workers", 1)), (share.worker, share.workers)
        if kept != here and "taken" in state:
            raise ConflictError(
                f"the place was kept in worker {kept[0]} of {kept[1]}, this is worker {here[0]} of {here[1]}: use as "
                "many workers, or `stream_loader`, whose place goes on under any number",
                kept=kept,
                yours=here,
            )
        if get_worker_info() is not None:
            share.taken = int(state.get("taken", 0))
            self._own = share
        else:
            self._walk.load_state_dict(state)
            self._tell_workers()

    def __iter__(self) -> Iterator[DistillationBatch]:
        if get_worker_info() is None:
            walked = self._walk.begin(self.ranks)
            for step, batch in enumerate(self._batches(WorkerShare.here(walked.place, self.ranks))):
                walked.took(step)
                yield batch
            return
        if self._own is None or self._own.begun:
            epoch, cursor, rank, world_size = self._shared.tolist()
            self._own = WorkerShare.here(EpochProgress(epoch=epoch, cursor=cursor), (rank, world_size))
        share = self._own
        share.begun = True
        for batch in self._batches(share):
            share.taken += 1
            yield batch

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._shared.share_memory_()

    def _tell_workers(self) -> None:
        place, (rank, world_size) = self._walk.upcoming(self.ranks), self.ranks
        self._shared.copy_(torch.tensor([place.epoch, place.cursor, rank, world_size]))

    def _batches(self, share: WorkerShare) -> Iterator[DistillationBatch]:
        steps = self._walk.steps(share.place, share.ranks)
        for targets in share.targets(steps, self._epoch):
            yield self._paired(targets)

    def _epoch(self, place: EpochProgress, ranks: tuple[int, int]) -> EpochIterator:
        pairs = self._pairs
        return self.store.epoch(
            seed=self.course.seed,
            epoch=place.epoch,
            batch_size=self.batch_size,
            rank=ranks[0],
            world_size=ranks[1],
            cursor=place.cursor,
            shuffle=self.course.shuffle,
            block=self.course.block,
            remainder=self.remainder,
            view=self._view,
            temperature=self._temperature,
            fingerprints=pairs is not None and pairs.checks(),
            inputs=pairs is not None and isinstance(pairs.samples, StoreInputs),
        )

    def _paired(self, targets: SoftTargets) -> DistillationBatch:
        if self._pairs is None or self._positions is None:
            return DistillationBatch(
                inputs=torch.empty((len(targets), 0), dtype=torch.uint8),
                targets=SoftTargetBatch.from_soft_targets(targets),
                ids=targets.ids,
            )
        positions = self._positions.of(targets.ids, self.store.manifest.name)
        if targets.inputs is not None:
            return self._pairs.pair(samples_in(targets), targets, positions)
        if not len(positions):  # nothing to fetch: inputs of the right shape, and none of them
            return self._pairs[0].first(0)
        return self._pairs.pair(self._pairs.samples.take(positions), targets, positions)


def stream_loader(
    stream: SoftTargetStream,
    *,
    workers: int = 0,
    start_method: Literal["fork", "spawn", "forkserver"] | None = None,
    ahead: bool = False,
) -> StatefulLoader:
    """Batches of the stream, epoch after epoch, with a place that goes on under other ranks, workers or batch size.

    Args:
        stream: its order is the loader's.
        workers: processes that read, one HTTP stream each; 0 reads in this one.
        start_method: how workers start; torch's default when None.
        ahead: without workers, a thread reads the next batch while this one is used.
    """
    loader = DataLoader(
        stream,
        batch_size=None,
        generator=torch.Generator().manual_seed(stream.course.seed),  # its draws leave torch's global one alone
        num_workers=workers,
        collate_fn=collate_batches,
        multiprocessing_context=start_method if workers else None,
        persistent_workers=workers > 0,
    )
    return StatefulLoader(loader, stream, ahead=ahead)


class _PositionOf:
    """Where each sample lies in the inputs, by id."""

    def __init__(self, ids: IdArray) -> None:
        self._sorted = np.argsort(ids, kind="stable")
        self._ids = ids[self._sorted]

    def of(self, ids: IdArray, store: str) -> NDArray[np.int64]:
        """[B] positions of these samples, which are `store`'s."""
        if ids.dtype.kind != self._ids.dtype.kind:
            raise BadIdsError(f"the ids of {store!r} are {ids.dtype}, those of the inputs {self._ids.dtype}")
        found = np.searchsorted(self._ids, ids).clip(max=len(self._ids) - 1)
        lacking = self._ids[found] != ids
        if lacking.any():
            named = ids[lacking][:5].tolist()
            raise FingerprintMismatchError(
                f"{store!r} has targets for {', '.join(map(repr, named))}, and the inputs have no such samples: a "
                "stream goes through the whole store; load all its samples, or use SoftTargetDataset for some of them",
                ids=named,
            )
        positions: NDArray[np.int64] = self._sorted[found]
        return positions


def _all_ids(samples: TransferSet) -> IdArray:
    ids: IdArray | None = getattr(samples, "ids", None)
    if ids is not None:
        return ids
    ranges = (np.arange(i, min(i + 1024, len(samples))) for i in range(0, len(samples), 1024))
    pieces: list[Any] = [samples.take(positions).ids for positions in ranges]
    joined: IdArray = np.concatenate(pieces)
    return joined


OpenEpoch: TypeAlias = Callable[[EpochProgress, tuple[int, int]], EpochIterator]
"""Opens the rest of an epoch from a place on, for `(rank, world_size)`."""


class WorkerShare:
    """What one worker of one rank takes of an epoch, and how much of it this worker has taken.

    Args:
        place: where the pass begins.
        ranks: rank and world size.
        worker, workers: which of how many.
    """

    def __init__(self, place: EpochProgress, ranks: tuple[int, int], worker: int, workers: int) -> None:
        self.place, self.ranks, self.worker, self.workers = place, ranks, worker, workers
        self.taken = 0
        self.begun = False

    @classmethod
    def here(cls, place: EpochProgress, ranks: tuple[int, int]) -> WorkerShare:
        """The share of the process that this runs in."""
        info = get_worker_info()
        return cls(place, ranks, 0, 1) if info is None else cls(place, ranks, info.id, info.num_workers)

    def state(self) -> dict[str, int]:
        """Whose share this is, and how many batches of it were taken."""
        return {"worker": self.worker, "workers": self.workers, "taken": self.taken}

    def targets(self, steps: RankBatches, open_epoch: OpenEpoch) -> Iterator[SoftTargets]:
        """The targets of this share's steps that were not taken before, in order."""
        taken, (rank, world_size) = self.taken, self.ranks
        if self.workers == 1 and not taken:
            with open_epoch(self.place, self.ranks) as whole:
                yield from whole
            return
        rounds = _full_rounds(steps, self.workers)
        if taken < rounds:
            size = self.workers * world_size * steps.batch_size
            place = EpochProgress(epoch=self.place.epoch, cursor=self.place.cursor + taken * size)
            among = (self.worker * world_size + rank, self.workers * world_size)
            with open_epoch(place, among) as stream:
                for _ in range(rounds - taken):
                    yield next(stream)
        for step in range(max(taken, rounds) * self.workers + self.worker, len(steps), self.workers):
            cursor = steps.cursor_after(step - 1) if step else self.place.cursor
            with open_epoch(EpochProgress(epoch=self.place.epoch, cursor=cursor), self.ranks) as rest:
                yield next(rest)


def _full_rounds(steps: RankBatches, workers: int) -> int:
    """How many times, from the first step on, all workers of all ranks take `batch_size` new samples."""
    as_one = replace(steps, world_size=workers * steps.world_size, rank=0)
    size = as_one.world_size * as_one.batch_size
    full = (as_one.order.samples - as_one.cursor) // size
    # Where fewer samples than shares are left over, the last two steps share theirs.
    return full - 1 if full and as_one.cursor_after(full - 1) != as_one.cursor + full * size else full
