"""Samplers for torch's DataLoader whose order follows from store, seed and epoch alone, and their state.

Progress is two numbers: the epoch, and the cursor, which counts the samples that all ranks together have taken of it.
Resuming from it, with any number of ranks and workers and any batch size, takes exactly the samples that are left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
import numpy as np

from softlabels.documents import Document, canonical_json, parse_document
from softlabels.errors import ChecksumError, ConflictError, FingerprintMismatchError, RequestError, StoreChangedError
from softlabels.extras import needs_extra
from softlabels.order import EpochConfig, EpochOrder, RankBatches, Remainder
from softlabels.row_sums import crc32c

with needs_extra("torch", "training a student"):
    import torch.distributed
    from torch.utils.data import Dataset, DistributedSampler, Sampler

_POSITIONS_AT_ONCE = 1 << 14
"""Single positions computed at a time: enough to amortise NumPy's overhead."""

_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True, kw_only=True)
class EpochProgress:
    """How far a training run has come.

    Attributes:
        epoch: epoch number, from 0.
        cursor: samples of it that all ranks together have taken.
        batches: batches that each rank took for that, for progress bars; a batch may differ in size between runs.
    """

    epoch: int = 0
    cursor: int = 0
    batches: int = 0


class SavedState(Document, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """A sampler state as checkpoints store it: the progress, and everything that the epoch order depends on.

    A worker of a stream adds its number, their count, and the batches it took. `sum` is the CRC-32C of all other fields
    as canonical JSON; states of earlier versions have none. Unknown keys are ignored.
    """

    format: Literal["softlabels-place/1"]
    epoch: _Count
    cursor: _Count
    batches: _Count
    digest: str
    samples: int
    seed: int
    shuffle: bool
    block: int | None = None
    data: str = ""
    worker: _Count = 0
    workers: Annotated[int, msgspec.Meta(ge=1)] = 1
    taken: _Count | None = None
    sum: int | None = None


class SamplerState:
    """Iterates over epochs as one rank and tracks what comes next.

    A completed pass is followed by the next epoch; an interrupted one starts over unless its state was saved and
    loaded.

    Args:
        config: seed, batch size, order and remainder of every epoch; its epoch, cursor and rank are replaced.
        digest: digest of the store.
        samples: samples per epoch.
        data: identifies the order of the inputs; empty if unknown.
        ranks: (rank, world size); torch.distributed's when None, or (0, 1) without a process group.
    Raises:
        RequestError: a number outside its range.
    """

    def __init__(
        self, config: EpochConfig, *, digest: str, samples: int, data: str = "", ranks: tuple[int, int] | None = None
    ) -> None:
        self.config, self.digest, self.samples, self.data = config, digest, samples, data
        self._ranks = ranks
        self.progress = EpochProgress()
        self._next = EpochProgress()
        self._pass: tuple[EpochProgress, RankBatches] | None = None
        # _loaded: a saved state was loaded and its pass has not begun. _pinned: `set_epoch` then asked for its epoch.
        self._in_pass = self._loaded = self._pinned = False
        self.batches_from(self.progress)  # refuses numbers out of range now rather than in the first epoch

    @property
    def ranks(self) -> tuple[int, int]:
        """Rank and world size."""
        return self._ranks or current_ranks()

    @property
    def upcoming(self) -> EpochProgress:
        """Where the next pass begins: after a finished epoch in the next, unless `set_epoch` asked for this one."""
        if self._next.cursor and not self._pinned and not len(self.batches_from(self._next)):
            return EpochProgress(epoch=self._next.epoch + 1)
        return self._next

    @property
    def finished(self) -> bool:
        """Whether nothing of the epoch is left after what was taken."""
        return not len(self.batches_from(self.progress))

    def copy(self) -> SamplerState:
        """Return an independent state for the same epochs, at their beginning."""
        return SamplerState(self.config, digest=self.digest, samples=self.samples, data=self.data, ranks=self._ranks)

    def config_at(self, progress: EpochProgress) -> EpochConfig:
        """Return the configuration of the rest of an epoch, for this rank."""
        rank, world_size = self.ranks
        return msgspec.structs.replace(
            self.config, epoch=progress.epoch, cursor=progress.cursor, rank=rank, world_size=world_size
        )

    def batches_from(self, progress: EpochProgress) -> RankBatches:
        """Return the batches of the rest of an epoch, for this rank."""
        return self.config_at(progress).batches_over(self.digest, self.samples)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass: from its beginning, or from the loaded progress in it."""
        if self._loaded and self._next.epoch == epoch:
            self._pinned = True
            return
        self._next, self._loaded, self._pinned = EpochProgress(epoch=epoch), False, False
        if self.progress.epoch != epoch:
            self.progress, self._in_pass = self._next, False

    def begin(self) -> RankBatches:
        """Begin the next pass and return its batches; `progress` is where it begins, and `took` counts them."""
        start = self.upcoming
        self._loaded = self._pinned = False
        batches = self.batches_from(start)
        self._pass = start, batches
        self._advance(start, last=not len(batches))
        return batches

    def took(self, step: int) -> None:
        """Record that the batch of this step, counted from the beginning of the pass, was handed out."""
        assert self._pass is not None, "begin() comes first"
        start, batches = self._pass
        cursor = batches.cursor_after(step)
        progress = EpochProgress(epoch=start.epoch, cursor=cursor, batches=start.batches + step + 1)
        self._advance(progress, last=step + 1 == len(batches))

    def batch_count(self) -> int:
        """Return the batches of the current pass, else of the next; batches before a loaded progress are included."""
        start = self._pass[0] if self._pass is not None and self._in_pass else self.upcoming
        return start.batches + len(self.batches_from(start))

    def resume_at(self, progress: EpochProgress) -> None:
        """Begin the next pass at this progress."""
        self.progress = self._next = progress
        self._in_pass = False
        self._loaded, self._pinned = True, False

    def state_at(self, progress: EpochProgress, **worker: int) -> dict[str, Any]:
        """Return a saved state with this progress, ready for JSON; the fields of `SavedState`."""
        own = {"digest": self.digest, "samples": self.samples, "data": self.data}
        order = {name: getattr(self.config, name) for name in ("seed", "shuffle", "block")}
        fields = {"format": "softlabels-place/1", **asdict(progress), **own, **order, **worker}
        return {**fields, "sum": crc32c(canonical_json(fields))}

    def progress_in(self, state: Mapping[str, Any]) -> EpochProgress:
        """Return the progress in a saved state; raises as `check`."""
        saved = self.check(state)
        return EpochProgress(epoch=saved.epoch, cursor=saved.cursor, batches=saved.batches)

    def check(self, state: Mapping[str, Any]) -> SavedState:
        """Return a saved state of this training run.

        Raises:
            RequestError: not a sampler state.
            StoreChangedError, FingerprintMismatchError, ConflictError: the state of another training run; the message
                names what differs.
            ChecksumError: a field was changed after the state was saved.
        """
        saved = parse_document(dict(state), SavedState, what="sampler state", error=RequestError)
        own = self.state_at(self.progress)
        for name in ("digest", "data", "samples", "seed", "shuffle", "block"):
            if getattr(saved, name) != own[name]:
                raise _mismatch(name, getattr(saved, name), own[name])
        if saved.cursor > self.samples:
            raise RequestError(f"the saved cursor is {saved.cursor}, in an epoch of {self.samples} samples")
        summed = {name: state[name] for name in SavedState.__struct_fields__ if name in state and name != "sum"}
        if saved.sum not in (None, crc32c(canonical_json(summed))):
            raise ChecksumError(
                "the sampler state was changed after it was saved: samples would be repeated or skipped; load another "
                "checkpoint, or, if you changed it on purpose, leave `sum` out"
            )
        return saved

    def _advance(self, progress: EpochProgress, *, last: bool) -> None:
        self.progress, self._in_pass = progress, not last
        self._next = EpochProgress(epoch=progress.epoch + last)


class ResumableEpochs:
    """Epochs whose progress can be saved and resumed; the base of samplers, streams and loaders.

    Without `set_epoch`, a completed pass is followed by the next epoch, and an interrupted one starts over.
    """

    state: SamplerState

    @property
    def epoch(self) -> int:
        """Epoch of the next pass."""
        return self.state.upcoming.epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass; if a state in it was loaded, the pass continues from there."""
        self.state.set_epoch(epoch)

    def begin_at(self, progress: EpochProgress) -> None:
        """Begin the next pass here."""
        self.state.resume_at(progress)
        self.set_epoch(progress.epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the progress, the same on every rank, and what the order depends on; ready for JSON."""
        return self.state.state_at(self.state.progress)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state, also with other ranks, workers or batch size; raises as `SamplerState.check`."""
        self.state.resume_at(self.state.progress_in(state))


class EpochSampler(ResumableEpochs, Sampler[list[int]]):
    """Batches of positions in a data set, for a DataLoader's `batch_sampler`; equally many for every rank.

    Its state is ahead of training where a loader prefetches; `StatefulLoader` counts the batches handed out.

    Args:
        samples: length of the data set.
        digest: digest of the store; another store has another order.
        batch_size: samples per step and rank.
        seed: training-run seed.
        shuffle: a new order each epoch; False keeps the data set's own.
        block: shuffle blocks of this many consecutive samples, for storage where random reads are expensive.
        rank, world_size: torch.distributed's when left out, or (0, 1) without a process group.
        remainder: "split", "drop" or "pad", as in `EpochConfig`.
        data: `data_identity` of the inputs, so that a state saved with other inputs is refused.
    Raises:
        RequestError: a number outside its range.
    """

    def __init__(
        self,
        samples: int,
        *,
        digest: str,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        block: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        remainder: Remainder = "split",
        data: str = "",
    ) -> None:
        config = EpochConfig(
            seed=seed, epoch=0, batch_size=batch_size, shuffle=shuffle, block=block, remainder=remainder
        )
        ranks = given_ranks(rank, world_size)
        self.state = SamplerState(config, digest=digest, samples=samples, data=data, ranks=ranks)
        self._start: EpochProgress | None = None

    @property
    def ranks(self) -> tuple[int, int]:
        """Rank and world size."""
        return self.state.ranks

    def begin_at(self, progress: EpochProgress) -> None:
        """Begin every pass here from now on; the caller counts the batches handed out."""
        self._start = progress

    def __len__(self) -> int:
        """Number of batches of the current pass, else of the next; of a resumed pass including those before."""
        return self.state.batch_count()

    def __iter__(self) -> Iterator[list[int]]:
        # `begin` runs with the first batch, not before: a DataLoader with workers creates two iterators and uses one.
        own = self._start is None
        for batch in self.state.begin() if self._start is None else self.state.batches_from(self._start):
            if own:
                self.state.took(batch.step)
            yield batch.positions.tolist()


class EpochDistributedSampler(DistributedSampler[Any]):
    """Single positions, for frameworks that replace any other sampler by a `DistributedSampler`.

    Same epochs as `EpochSampler`; index i belongs to rank i modulo world size. Two limits: ranks must have equally many
    samples, so some are repeated (as torch does) or skipped, except with a single rank; and a sampler of samples cannot
    know how many were trained on, so resuming requires counting them and calling `set_epoch(epoch, cursor=...)`.
    Without `set_epoch` every pass is the same epoch.

    Args:
        dataset: data set, of which the length is used.
        digest: digest of the store.
        rank, world_size: torch.distributed's when left out, or (0, 1) without a process group.
        seed: training-run seed.
        shuffle: a new order each epoch; False keeps the data set's own.
        remainder: "pad" repeats the epoch's first samples, "drop" skips its last.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        digest: str,
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        remainder: Literal["pad", "drop"] = "pad",
    ) -> None:
        if remainder not in ("pad", "drop"):
            raise RequestError(
                f"remainder is {remainder!r}, but ranks that take single samples need equally many: choose 'pad' or "
                "'drop', or an EpochSampler"
            )
        rank, world_size = given_ranks(rank, world_size) or current_ranks()
        super().__init__(dataset, world_size, rank, shuffle=shuffle, seed=seed, drop_last=remainder == "drop")
        self._digest, self._samples = digest, len(dataset)  # type: ignore[arg-type]
        self._cursor = 0

    def set_epoch(self, epoch: int, *, cursor: int = 0) -> None:
        """Choose the epoch of the next passes, from `cursor` samples of all ranks together on."""
        super().set_epoch(epoch)
        self._cursor = cursor

    def __len__(self) -> int:
        """Samples of each rank from the cursor on."""
        left, ranks = self._samples - self._cursor, self.num_replicas
        return left // ranks if self.drop_last else -(-left // ranks)

    def __iter__(self) -> Iterator[int]:
        order = EpochOrder(self._digest, self._samples, seed=self.seed, epoch=self.epoch, shuffle=self.shuffle)
        count = len(self)
        for begin in range(0, count, _POSITIONS_AT_ONCE):
            end = min(begin + _POSITIONS_AT_ONCE, count)
            indices = np.arange(begin, end, dtype=np.int64) * self.num_replicas + self.rank + self._cursor
            # The modulo repeats the epoch's first samples for "pad"; with "drop" no index reaches the end.
            yield from order.positions_at(indices % self._samples).tolist()


def given_ranks(rank: int | None, world_size: int | None) -> tuple[int, int] | None:
    """Return (rank, world size) if both were given, None if neither was. Raises RequestError: one without the other."""
    if rank is None and world_size is None:
        return None
    if rank is None or world_size is None:
        raise RequestError(
            f"rank is {rank} and world_size is {world_size}: give both, or neither to take torch.distributed's"
        )
    return rank, world_size


def current_ranks() -> tuple[int, int]:
    """Return rank and world size of this process: torch.distributed's once it is initialised, else (0, 1)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _mismatch(name: str, saved: object, own: object) -> Exception:
    kept = {"kept": saved, "yours": own}
    if name == "digest":
        return StoreChangedError(
            f"the state was saved with targets of store version {saved}, these are of {own}: another version has "
            "another order and perhaps other targets; open the one that the training began with, or restart the epoch",
            **kept,
        )
    if name == "data":
        return FingerprintMismatchError(
            f"the state was saved with other inputs, or the same in another order (ids {saved or 'unknown'}, yours "
            f"{own or 'unknown'}): samples would be repeated and skipped; load the data as before",
            **kept,
        )
    return ConflictError(
        f"the state was saved with {name} = {saved!r}, here {name} is {own!r}: the epoch order differs, so samples "
        f"would be repeated and skipped; pass {name} as before",
        name=name,
        **kept,
    )
