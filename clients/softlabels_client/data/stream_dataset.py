"""SoftTargetStream: an epoch of a whole store as an iterable data set, divided exactly among ranks and workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from softlabels.errors import BadIdsError, ConflictError, FingerprintMismatchError
from softlabels.extras import needs_extra
from softlabels.ids import IdArray, as_ids
from softlabels.losses import SoftTargetBatch
from softlabels.order import EpochConfig, RankBatches, Remainder
from softlabels.target_store import TargetStore
from softlabels.targets import EpochIterator, SoftTargets
from softlabels.transfer_set import TransferSet
from softlabels_client.data.dataset import Check, SoftTargetDataset, StoreInputs, data_loader, samples_in
from softlabels_client.data.loader import DistillationBatch, StatefulLoader, stateful_loader
from softlabels_client.data.sampler import EpochProgress, ResumableEpochs, SamplerState, given_ranks

with needs_extra("torch", "training a student"):
    import torch
    from torch.utils.data import IterableDataset, get_worker_info

STORE_ORDER = "the store's own order"
"""Value of `data` in a stream's saved state, which counts the store's samples: the inputs' order does not matter."""


class SoftTargetStream(ResumableEpochs, IterableDataset[DistillationBatch]):
    """Batches of an epoch of a whole store, with inputs paired by id; one HTTP stream per worker.

    For a DataLoader with `batch_size=None`; with workers, call `set_epoch` before each pass. `stream_loader` makes one
    that advances from epoch to epoch by itself, and whose state resumes under any number of workers.

    Args:
        store: a finished store, as `softlabels.open` returns it.
        inputs: a transfer set, or a sequence, array or map-style torch data set together with `ids`, in any order; None
            takes the store's own, or none where it has none: `DistillationBatch.inputs` is then [B, 0].
        ids: [N] sample ids of `inputs`, unless it is a transfer set.
        batch_size: samples per step and rank.
        seed: training-run seed.
        shuffle: a new order each epoch; False keeps the store's own.
        block: shuffle blocks of this many consecutive samples, for storage where random reads are expensive.
        view: view of every sample, in a store of views; the next one each epoch if left out.
        temperature, check: as in `SoftTargetDataset`.
        rank, world_size: torch.distributed's when left out, or (0, 1) without a process group.
        remainder: "split", "drop" or "pad", as in `EpochConfig`.
    Raises:
        As `SoftTargetDataset`; while iterating, as `TargetStore.epoch`, and FingerprintMismatchError for a sample of
        the store that the inputs lack.
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
        self._positions = None if self._pairs is None else _PositionsById(_all_ids(self._pairs.samples))
        self._temperature = temperature
        config = EpochConfig(
            seed=seed, epoch=0, batch_size=batch_size, shuffle=shuffle, block=block, remainder=remainder, view=view
        )
        ranks = given_ranks(rank, world_size)
        self.state = SamplerState(
            config, digest=store.digest, samples=store.manifest.samples, data=STORE_ORDER, ranks=ranks
        )
        self._shard: _WorkerShard | None = None
        # Epoch, cursor, rank and world size, in shared memory: persistent workers have a copy of everything else, made
        # before the first epoch.
        self._shared = torch.zeros(4, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._tell_workers()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass; if a state in it was loaded, the pass continues from there."""
        self.state.set_epoch(epoch)
        self._tell_workers()

    def state_dict(self) -> dict[str, Any]:
        """Return the progress of this process, in a worker that of the worker; ready for JSON."""
        if self._shard is None:
            return super().state_dict()
        shard = self._shard
        return self.state.state_at(shard.start, worker=shard.worker, workers=shard.workers, taken=shard.taken)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state. In a worker, from that of the same worker out of equally many.

        Raises:
            RequestError: not a sampler state.
            StoreChangedError, FingerprintMismatchError, ConflictError: the state of another training run, or worker.
            ChecksumError: a field was changed after the state was saved.
        """
        saved, progress = self.state.check(state), self.state.progress_in(state)
        shard = _WorkerShard.of_this_process(self.state.config_at(progress), progress)
        before, here = (saved.worker, saved.workers), (shard.worker, shard.workers)
        if before != here and saved.taken is not None:
            raise ConflictError(
                f"the state was saved in worker {before[0]} of {before[1]}, this is worker {here[0]} of {here[1]}: use "
                "equally many workers, or `stream_loader`, whose state resumes under any number",
                kept=before,
                yours=here,
            )
        if get_worker_info() is not None:
            shard.taken = saved.taken or 0
            self._shard = shard
        else:
            self.state.resume_at(progress)
            self._tell_workers()

    def __iter__(self) -> Iterator[DistillationBatch]:
        if get_worker_info() is None:
            batches = self.state.begin()
            shard = _WorkerShard(batches.config, self.state.progress, worker=0, workers=1)
            for step, targets in enumerate(shard.targets(batches, self._open_epoch)):
                self.state.took(step)
                yield self._paired(targets)
            return
        # A shard that has begun is of an earlier pass of a persistent worker; one that has not was made by
        # `load_state_dict`, and is continued.
        if self._shard is None or self._shard.begun:
            epoch, cursor, rank, world_size = self._shared.tolist()
            config = msgspec.structs.replace(
                self.state.config, epoch=epoch, cursor=cursor, rank=rank, world_size=world_size
            )
            self._shard = _WorkerShard.of_this_process(config, EpochProgress(epoch=epoch, cursor=cursor))
        shard = self._shard
        shard.begun = True
        batches = shard.config.batches_over(self.state.digest, self.state.samples)
        for targets in shard.targets(batches, self._open_epoch):
            shard.taken += 1
            yield self._paired(targets)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # A plain pickle copies the tensor to private memory, where this process's own workers would not see changes.
        self._shared.share_memory_()

    def _tell_workers(self) -> None:
        config = self.state.config_at(self.state.upcoming)
        self._shared.copy_(torch.tensor([config.epoch, config.cursor, config.rank, config.world_size]))

    def _open_epoch(self, config: EpochConfig) -> EpochIterator:
        pairs = self._pairs
        return self.store.epoch(
            config,
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
        if not len(positions):  # nothing to load: inputs of the right shape, without rows
            return self._pairs[0].first(0)
        return self._pairs.pair(self._pairs.samples.take(positions), targets, positions)


def stream_loader(
    stream: SoftTargetStream,
    *,
    workers: int = 0,
    start_method: Literal["fork", "spawn", "forkserver"] | None = None,
    ahead: bool = False,
) -> StatefulLoader:
    """Return a loader over the stream, epoch after epoch, whose state resumes under other ranks, workers or batch size.

    Args:
        stream: determines the order.
        workers: worker processes, one HTTP stream each; 0 reads in this process.
        start_method: how workers are started; torch's default when None.
        ahead: without workers, read the next batches ahead in a thread.
    """
    return stateful_loader(stream, stream, workers=workers, start_method=start_method, ahead=ahead, batch_size=None)


def epoch_loader(dataset: SoftTargetDataset, *, batch_size: int, seed: int, workers: int) -> StatefulLoader:
    """Return a loader for one rank that streams each epoch if it can, and else requests each batch.

    Both give the same batches in the same order, but only a stream fills a slow link: requests wait for a round trip
    each. A stream covers the samples of the store in the store's order, so the inputs must be just these.
    """
    if has_store_order(dataset):
        stream = SoftTargetStream(
            dataset.store,
            dataset.samples,
            batch_size=batch_size,
            seed=seed,
            temperature=dataset.temperature,
            check=dataset.check,
            rank=0,
            world_size=1,
        )
        return stream_loader(stream, workers=workers, ahead=True)
    return data_loader(dataset, batch_size=batch_size, seed=seed, workers=workers, rank=0, world_size=1, ahead=True)


def has_store_order(dataset: SoftTargetDataset) -> bool:
    """Return whether position i of the data set is row i of a finished store."""
    # Subclasses make other batches of other requests: views of the samples, or whatever a user's class does.
    ids: Any = getattr(dataset.samples, "ids", None)
    if type(dataset) is not SoftTargetDataset or ids is None or len(ids) != len(dataset.store):
        return False
    return dataset.store.manifest.finished and np.array_equal(np.asarray(ids), dataset.store.ids())


@dataclass
class _WorkerShard:
    """The part of a rank's epoch that one DataLoader worker reads: steps `worker`, `worker + workers` and so on.

    While all batches are full, those are the steps of rank `worker × world_size + rank` among `workers × world_size`
    ranks, so they are read as one stream. The few remaining steps are requested one by one, so that batches do not
    depend on the number of workers.

    Attributes:
        config: the rank's epoch, from `start` on.
        taken: batches of this worker that were handed out.
        begun: whether iteration has started.
    """

    config: EpochConfig
    start: EpochProgress
    worker: int
    workers: int
    taken: int = 0
    begun: bool = False

    @classmethod
    def of_this_process(cls, config: EpochConfig, start: EpochProgress) -> _WorkerShard:
        info = get_worker_info()  # None in the main process, which reads all of the rank's epoch
        return cls(config, start, *((0, 1) if info is None else (info.id, info.num_workers)))

    def targets(
        self, batches: RankBatches, open_epoch: Callable[[EpochConfig], EpochIterator]
    ) -> Iterator[SoftTargets]:
        """Yield the targets of this worker's steps that were not handed out before, in order."""
        for config, count in self._streams(batches):
            with open_epoch(config) as stream:
                yield from islice(stream, count)

    def _streams(self, batches: RankBatches) -> Iterator[tuple[EpochConfig, int | None]]:
        """Yield the configurations to read, and how many batches of each; None reads to the end frame."""
        taken, config = self.taken, self.config
        if self.workers == 1 and not taken:
            yield config, None
            return
        world_size = self.workers * config.world_size
        rounds = _full_rounds(batches, world_size)
        if taken < rounds:
            yield (
                msgspec.structs.replace(
                    config,
                    cursor=config.cursor + taken * world_size * config.batch_size,
                    rank=self.worker * config.world_size + config.rank,
                    world_size=world_size,
                ),
                rounds - taken,
            )
        for step in range(max(taken, rounds) * self.workers + self.worker, len(batches), self.workers):
            yield config.resumed_at(batches.cursor_after(step - 1) if step else config.cursor), 1


def _full_rounds(batches: RankBatches, world_size: int) -> int:
    """Return how many times, from the first step on, all workers of all ranks take `batch_size` new samples."""
    together = RankBatches(batches.order, msgspec.structs.replace(batches.config, world_size=world_size, rank=0))
    size, cursor = world_size * batches.config.batch_size, batches.config.cursor
    full = (batches.order.samples - cursor) // size
    # With fewer samples left than ranks, the last two steps divide theirs, and the last full step is not full.
    return full - 1 if full and together.cursor_after(full - 1) != cursor + full * size else full


class _PositionsById:
    def __init__(self, ids: IdArray) -> None:
        self._sorted = np.argsort(ids, kind="stable")
        self._ids = ids[self._sorted]

    def of(self, ids: IdArray, store: str) -> NDArray[np.int64]:
        """Return the positions of these samples, [B]; `store` names their store in messages."""
        if ids.dtype.kind != self._ids.dtype.kind:
            raise BadIdsError(f"the ids of {store!r} are {ids.dtype}, those of the inputs {self._ids.dtype}")
        # Clipped, because an id above the last one is found past the end; it then differs from the id that is there.
        found = np.searchsorted(self._ids, ids).clip(max=len(self._ids) - 1)
        missing = self._ids[found] != ids
        if missing.any():
            named = ids[missing][:5].tolist()
            raise FingerprintMismatchError(
                f"{store!r} has targets for {', '.join(map(repr, named))}, and the inputs have no such samples: load "
                "all samples of the store, or use SoftTargetDataset for some of them",
                ids=named,
            )
        positions: NDArray[np.int64] = self._sorted[found]
        return positions


def _all_ids(samples: TransferSet) -> IdArray:
    ids: IdArray | None = getattr(samples, "ids", None)
    if ids is not None:
        return ids
    parts = np.array_split(np.arange(len(samples)), -(-len(samples) // 1024))  # a part at a time holds few inputs
    pieces: list[Any] = [samples.take(positions).ids for positions in parts]
    return as_ids(np.concatenate(pieces))
