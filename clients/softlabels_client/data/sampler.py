"""Samplers for torch's DataLoader whose order follows from store, seed and epoch alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

import numpy as np

from softlabels.errors import RequestError
from softlabels.extras import needs_extra
from softlabels.order import EpochConfig, EpochOrder, Remainder
from softlabels.transfer_set import TransferSet
from softlabels_client.data.sampler_state import EpochProgress, SamplerState, current_ranks, given_ranks

with needs_extra("torch", "training a student"):
    from torch.utils.data import Dataset, DistributedSampler, Sampler

_PROBES = 64
"""Samples whose ids represent all of a transfer set that has no array of ids."""

_POSITIONS_AT_ONCE = 1 << 14
"""Single positions computed at a time: enough to amortise NumPy's overhead, small beside the rows of a batch."""


class EpochSampler(Sampler[list[int]]):
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

    @property
    def epoch(self) -> int:
        """Epoch of the next pass."""
        return self.state.upcoming.epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass; without a call, passes follow each other."""
        self.state.set_epoch(epoch)

    def begin_at(self, progress: EpochProgress) -> None:
        """Begin every pass here from now on; the caller counts the batches handed out."""
        self._start = progress

    def __len__(self) -> int:
        """Number of batches of the current pass, else of the next; of a resumed pass including those before."""
        return self.state.batch_count()

    def __iter__(self) -> Iterator[list[int]]:
        if self._start is not None:
            for batch in self.state.batches_from(self._start):
                yield batch.positions.tolist()
            return
        # `begin` runs with the first batch, not before: a DataLoader with workers creates two iterators and uses one.
        for batch in self.state.begin():
            self.state.took(batch.step)
            yield batch.positions.tolist()

    def state_dict(self) -> dict[str, Any]:
        """Return the progress and what the order depends on; ready for JSON."""
        return self.state.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state, also with other ranks or another batch size.

        Raises:
            RequestError: not a sampler state.
            StoreChangedError, FingerprintMismatchError, ConflictError: the state of another training run.
        """
        self.state.load_state_dict(state)


EqualShares: TypeAlias = Literal["pad", "drop"]
"""How ranks get equally many samples: repeat the epoch's first samples, or skip its last."""


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
        remainder: EqualShares = "pad",
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


def data_identity(samples: TransferSet) -> str:
    """Return a digest of the ids of these samples in this order: of all in memory, else of 64 spread over the set."""
    ids = getattr(samples, "ids", None)
    if ids is None:
        ids = samples.take(np.unique(np.linspace(0, len(samples) - 1, _PROBES).astype(np.int64))).ids
    known = np.asarray(ids)
    return hashlib.blake2b(known.dtype.str.encode() + known.tobytes(), digest_size=16).hexdigest()
