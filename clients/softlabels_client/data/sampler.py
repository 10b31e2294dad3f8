"""In which order does a DataLoader ask for samples? In batches that follow from store, seed and epoch alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

import numpy as np

from softlabels.errors import MissingExtraError, RequestError

try:
    import torch
    from torch.utils.data import Dataset, DistributedSampler, Sampler
except ImportError as error:
    raise MissingExtraError(
        "training a student needs torch, which is not installed: `pip install softlabels[torch]`", extra="torch"
    ) from error

from softlabels.order import Remainder
from softlabels.transfer_set import TransferSet
from softlabels_client.data.sampler_state import Course, EpochProgress, Pass, Walk

_PROBES = 64
"""Samples whose ids stand for all where a transfer set does not tell all its ids at once."""

_AT_ONCE = 1 << 14
"""Single positions worked out at once: enough to make the overhead small, few beside a batch's rows."""


class EpochSampler(Sampler[list[int]]):
    """Batches of positions in a data set, for a DataLoader's `batch_sampler`: each rank its own, all of equal count.

    Its position runs ahead of what was trained on where a loader prefetches: `StatefulLoader` counts what was taken.

    Args:
        samples: length of the data set.
        digest: of the store; another store has another order.
        batch_size: samples a rank takes at a step.
        seed: of the training run.
        shuffle: a new order each epoch; False keeps the data set's own.
        block: shuffle blocks of so many consecutive samples, then within a few of them, for slow disks.
        rank, world_size: which of how many ranks; torch.distributed's when left out, or one alone.
        remainder: "split" shares out what fills no last step, "drop" leaves it out, "pad" repeats some.
        data: `data_identity` the inputs, so that a place is not resumed with other ones.
    Raises:
        RequestError: a number that cannot be.
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
        self.course = Course(digest=digest, samples=samples, seed=seed, shuffle=shuffle, block=block, data=data)
        self.batch_size = batch_size
        self.remainder: Remainder = remainder
        self._ranks = given_ranks(rank, world_size)
        self._walk = self.walk()
        self._given: EpochProgress | None = None
        self._walk.steps(EpochProgress(), self.ranks)  # refuses numbers that cannot be

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

    def set_epoch(self, epoch: int) -> None:
        """The next pass goes through this epoch; without a call, passes follow each other."""
        self._walk.set_epoch(epoch)

    def begin_at(self, place: EpochProgress) -> None:
        """Every pass begins here from now on: whoever calls this counts what is taken."""
        self._given = place

    def __len__(self) -> int:
        """Batches of a pass, the same on every rank: the one underway, or the next; a resumed one's are all counted."""
        return self._walk.batch_count(self.ranks)

    def __iter__(self) -> Iterator[list[int]]:
        if self._given is None:
            return self._one_after_the_other()
        return _positions(Pass(self.walk(), self._given, self._walk.steps(self._given, self.ranks)))

    def state_dict(self) -> dict[str, Any]:
        """How far the sampler has come: epoch, cursor, and what they are places in; ready for JSON."""
        return self._walk.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a kept place, also with other ranks or another batch size.

        Raises:
            RequestError: this is no place.
            StoreChangedError, FingerprintMismatchError, ConflictError: it is one in another training.
        """
        self._walk.load_state_dict(state)

    def _one_after_the_other(self) -> Iterator[list[int]]:
        # Begins with the first batch: a DataLoader with workers makes two iterators and uses one.
        yield from _positions(self._walk.begin(self.ranks))


def _positions(walked: Pass) -> Iterator[list[int]]:
    for batch in walked.steps.walk():
        walked.took(batch.step)
        yield batch.positions.tolist()


Equal: TypeAlias = Literal["pad", "drop"]
"""What makes the ranks' shares of an epoch equal: repeat its first samples, or leave out its last ones."""


class EpochDistributedSampler(DistributedSampler[Any]):
    """Positions one by one, for frameworks that put a `DistributedSampler` of their own in the place of any sampler.

    The same epochs as `EpochSampler`, dealt out in turn: place i is rank i modulo world size's. Two things are less
    than there. Ranks must have equally many samples, so that some are repeated (as torch does) or left out: one rank
    alone sees each sample once. And a sampler of samples cannot know how many were trained on: for a place to go on
    from, count them and call `set_epoch(epoch, cursor=...)`. Without `set_epoch` each pass is the same epoch.

    Args:
        dataset: gives its length.
        digest: of the store.
        rank, world_size: which of how many ranks; torch.distributed's when left out, or one alone.
        seed: of the training run.
        shuffle: a new order each epoch; False keeps the data set's own.
        remainder: "pad" repeats the epoch's first samples, "drop" leaves out its last.
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
        remainder: Equal = "pad",
    ) -> None:
        if remainder not in ("pad", "drop"):
            raise RequestError(
                f"remainder is {remainder!r}; ranks that take single samples need equally many: 'pad' or 'drop', or "
                "an EpochSampler, which shares them out by batches"
            )
        rank, world_size = given_ranks(rank, world_size) or current_ranks()
        super().__init__(dataset, world_size, rank, shuffle=shuffle, seed=seed, drop_last=remainder == "drop")
        samples = len(dataset)  # type: ignore[arg-type]
        self._course = Course(digest=digest, samples=samples, seed=seed, shuffle=shuffle)
        self._cursor = 0

    def set_epoch(self, epoch: int, *, cursor: int = 0) -> None:
        """The next passes go through this epoch, from `cursor` samples of all ranks together on."""
        super().set_epoch(epoch)
        self._cursor = cursor

    def __len__(self) -> int:
        """Samples of each rank from the cursor on."""
        left, ranks = self._course.samples - self._cursor, self.num_replicas
        return left // ranks if self.drop_last else -(-left // ranks)

    def __iter__(self) -> Iterator[int]:
        order, count = self._course.order(self.epoch), len(self)
        for begin in range(0, count, _AT_ONCE):
            dealt = np.arange(begin, min(begin + _AT_ONCE, count), dtype=np.int64) * self.num_replicas + self.rank
            yield from order.positions_at((dealt + self._cursor) % self._course.samples).tolist()


def given_ranks(rank: int | None, world_size: int | None) -> tuple[int, int] | None:
    """Rank and world size where both were given; None where neither was.

    Raises:
        RequestError: one without the other.
    """
    if rank is None and world_size is None:
        return None
    if rank is None or world_size is None:
        raise RequestError(
            f"rank is {rank} and world_size is {world_size}: give both, or neither to take torch.distributed's"
        )
    return rank, world_size


def current_ranks() -> tuple[int, int]:
    """Rank and world size of this process: torch.distributed's once it is initialised, else one alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def data_identity(samples: TransferSet) -> str:
    """What tells these samples, in this order, from others: a digest of their ids.

    Of all ids where the transfer set has them at hand, else of those of 64 samples spread over it.
    """
    ids = getattr(samples, "ids", None)
    if ids is None:
        ids = samples.take(np.unique(np.linspace(0, len(samples) - 1, _PROBES).astype(np.int64))).ids
    known = np.ascontiguousarray(ids)
    return hashlib.blake2b(known.dtype.str.encode() + known.tobytes(), digest_size=16).hexdigest()
