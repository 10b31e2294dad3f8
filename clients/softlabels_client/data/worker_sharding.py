"""Which batches of an epoch does one worker of one rank take, and how does it ask for them? As one stream, mostly.

A worker reads one long reply where a map-style data set asks for each batch. Worker w of W of rank r of R takes every
W-th step of its rank; while all batches are full those are the steps of rank wR + r among WR, which is one stream. What
is left at the end, a few steps a worker, is asked for step by step: so the batches are the same whatever the workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeAlias

from softlabels.errors import MissingExtraError

try:
    from torch.utils.data import get_worker_info
except ImportError as error:
    raise MissingExtraError(
        "training a student needs torch, which is not installed: `pip install softlabels[torch]`", extra="torch"
    ) from error

from softlabels.epochs import Epoch
from softlabels.order import RankBatches
from softlabels.targets import SoftTargets
from softlabels_client.data.sampler_state import Place

OpenEpoch: TypeAlias = Callable[[Place, tuple[int, int]], Epoch]
"""Opens the rest of an epoch from a place on, for `(rank, world_size)`."""


class WorkerShare:
    """What one worker of one rank takes of an epoch, and how much of it this worker has taken.

    Args:
        place: where the pass begins.
        ranks: rank and world size.
        worker, workers: which of how many.
    """

    def __init__(self, place: Place, ranks: tuple[int, int], worker: int, workers: int) -> None:
        self.place, self.ranks, self.worker, self.workers = place, ranks, worker, workers
        self.taken = 0
        self.begun = False

    @classmethod
    def here(cls, place: Place, ranks: tuple[int, int]) -> WorkerShare:
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
            place = Place(epoch=self.place.epoch, cursor=self.place.cursor + taken * size)
            among = (self.worker * world_size + rank, self.workers * world_size)
            with open_epoch(place, among) as stream:
                for _ in range(rounds - taken):
                    yield next(stream)
        for step in range(max(taken, rounds) * self.workers + self.worker, len(steps), self.workers):
            cursor = steps.cursor_after(step - 1) if step else self.place.cursor
            with open_epoch(Place(epoch=self.place.epoch, cursor=cursor), self.ranks) as rest:
                yield next(rest)


def _full_rounds(steps: RankBatches, workers: int) -> int:
    """How many times, from the first step on, all workers of all ranks take `batch_size` new samples."""
    as_one = replace(steps, world_size=workers * steps.world_size, rank=0)
    size = as_one.world_size * as_one.batch_size
    full = (as_one.order.samples - as_one.cursor) // size
    # Where fewer samples than shares are left over, the last two steps share theirs.
    return full - 1 if full and as_one.cursor_after(full - 1) != as_one.cursor + full * size else full
