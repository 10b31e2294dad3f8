"""Where does a training stand in its epochs, and does a place that was kept belong to this training?

A place is two numbers: the epoch, and the cursor, which counts the samples that all ranks together have taken of it.
Whoever goes on from a place, with however many ranks, workers and whatever batch size, takes exactly what is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from softlabels.errors import ConflictError, FingerprintMismatchError, RequestError, StoreChangedError
from softlabels.order import EpochOrder, RankBatches, Remainder

STATE_FORMAT = "softlabels-place/1"
"""What a kept place calls its form."""


@dataclass(frozen=True, kw_only=True)
class EpochProgress:
    """How far a training has come.

    Attributes:
        epoch: counted from 0.
        cursor: samples of it that all ranks together have taken.
        batches: how many batches each rank took for that, for progress bars: under other ranks they are larger.
    """

    epoch: int = 0
    cursor: int = 0
    batches: int = 0


@dataclass(frozen=True, kw_only=True)
class Course:
    """What the order of all epochs of one training follows from.

    Attributes:
        digest: of the store.
        samples: how many an epoch has.
        seed: of the training run.
        shuffle: a new order each epoch, or always the data's own.
        block: consecutive samples that stay near each other, for stores whose rows are dear to fetch one by one.
        data: what tells one order of the inputs from another; empty where nobody knows.
    """

    digest: str
    samples: int
    seed: int = 0
    shuffle: bool = True
    block: int | None = None
    data: str = ""

    def order(self, epoch: int) -> EpochOrder:
        """Which sample comes when in one epoch."""
        return EpochOrder(
            self.digest, self.samples, seed=self.seed, epoch=epoch, shuffle=self.shuffle, block=self.block
        )

    def state_at(self, place: EpochProgress) -> dict[str, Any]:
        """A place and what it is a place in, ready for JSON."""
        return {"format": STATE_FORMAT, **asdict(place), **asdict(self)}

    def place_in(self, state: Mapping[str, Any]) -> EpochProgress:
        """The place that `state_at` described.

        Raises:
            RequestError: this is no such state.
            StoreChangedError, FingerprintMismatchError, ConflictError: it is a place in another training; what differs
                is named.
        """
        if state.get("format") != STATE_FORMAT:
            raise RequestError(
                f"this is no place in an epoch: its format is {state.get('format')!r} and should be {STATE_FORMAT!r}; "
                "pass what `state_dict()` gave"
            )
        for name in ("digest", "data", "samples", "seed", "shuffle", "block"):
            if state.get(name) != getattr(self, name):
                raise self._other(name, state.get(name))
        place = EpochProgress(**{name: _whole(state, name) for name in ("epoch", "cursor", "batches")})
        if place.cursor > self.samples:
            raise RequestError(f"the place kept is after {place.cursor} samples of an epoch that has {self.samples}")
        return place

    def _other(self, name: str, kept: object) -> Exception:
        own = getattr(self, name)
        if name == "digest":
            return StoreChangedError(
                f"the place was kept with targets of store version {kept}, these are of {own}: another version orders "
                "samples otherwise and may hold other targets; open the version that the training began with, or begin "
                "the epoch anew",
                kept=kept,
                yours=own,
            )
        if name == "data":
            return FingerprintMismatchError(
                f"the place was kept with other inputs, or the same in another order (ids {kept or 'unknown'}, yours "
                f"{own or 'unknown'}): some samples would come twice and others never; load the data as before",
                kept=kept,
                yours=own,
            )
        return ConflictError(
            f"the place was kept with {name} = {kept!r}, here {name} is {own!r}: the epoch's order is another, so some "
            f"samples would come twice and others never; pass {name} as before",
            name=name,
            kept=kept,
            yours=own,
        )


class Walk:
    """Goes through the epochs of a course as one rank, and knows what comes next.

    Passes follow each other: one that was taken to its end is followed by the next epoch; one that was broken off
    begins anew, unless its place was kept and loaded.

    Args:
        course: what the order follows from.
        batch_size: samples a rank takes at a step.
        remainder: what becomes of the samples that fill no last step; `softlabels.order.RankBatches` says.
    """

    def __init__(self, course: Course, *, batch_size: int, remainder: Remainder) -> None:
        self.course = course
        self._batch_size = batch_size
        self._remainder: Remainder = remainder
        self.place = EpochProgress()
        self._next = EpochProgress()
        self._underway: EpochProgress | None = None
        self._loaded = self._pinned = False

    def steps(self, place: EpochProgress, ranks: tuple[int, int]) -> RankBatches:
        """What is left of an epoch from a place on, for `(rank, world_size)`."""
        return RankBatches(
            order=self.course.order(place.epoch),
            batch_size=self._batch_size,
            rank=ranks[0],
            world_size=ranks[1],
            cursor=place.cursor,
            remainder=self._remainder,
        )

    def upcoming(self, ranks: tuple[int, int]) -> EpochProgress:
        """Where the next pass begins: a finished epoch is followed by another, unless somebody insists on it."""
        place = self._next
        if place.cursor and not self._pinned and not len(self.steps(place, ranks)):
            return EpochProgress(epoch=place.epoch + 1)
        return place

    def set_epoch(self, epoch: int) -> None:
        """The next pass goes through this epoch: from its beginning, or on from a place in it that was loaded."""
        if self._loaded and self._next.epoch == epoch:
            self._pinned = True
            return
        self._next, self._loaded, self._pinned = EpochProgress(epoch=epoch), False, False
        if self.place.epoch != epoch:
            self.place, self._underway = self._next, None

    def begin(self, ranks: tuple[int, int]) -> Pass:
        """Begin the next pass."""
        place = self.upcoming(ranks)
        self._loaded = self._pinned = False
        steps = self.steps(place, ranks)
        self._underway = place
        self.took(place, last=not len(steps))
        return Pass(self, place, steps)

    def took(self, place: EpochProgress, *, last: bool) -> None:
        """Remember that a pass has come to this place."""
        self.place = place
        self._next = EpochProgress(epoch=place.epoch + 1 if last else place.epoch)
        if last:
            self._underway = None

    def batch_count(self, ranks: tuple[int, int]) -> int:
        """Batches of the pass underway, or else of the next; those taken before its place was kept are counted, too."""
        place = self._underway or self.upcoming(ranks)
        return place.batches + len(self.steps(place, ranks))

    def finished(self, ranks: tuple[int, int]) -> bool:
        """Whether nothing is left of the epoch after what was taken."""
        return not len(self.steps(self.place, ranks))

    def state_dict(self) -> dict[str, Any]:
        """The place, and what it is a place in; ready for JSON."""
        return self.course.state_at(self.place)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a kept place. Raises as `Course.place_in`."""
        self.place = self._next = self.course.place_in(state)
        self._underway = None
        self._loaded, self._pinned = True, False


class Pass:
    """One pass through an epoch, or through what is left of it.

    Args:
        walk: is told how far the pass has come.
        place: where it begins.
        steps: what it goes through.
    """

    def __init__(self, walk: Walk, place: EpochProgress, steps: RankBatches) -> None:
        self._walk, self.place, self.steps = walk, place, steps

    def took(self, step: int) -> None:
        """The batch of this step, counted from where the pass began, was handed out."""
        cursor = self.steps.cursor_after(step)
        place = EpochProgress(epoch=self.place.epoch, cursor=cursor, batches=self.place.batches + step + 1)
        self._walk.took(place, last=step + 1 == len(self.steps))


def _whole(state: Mapping[str, Any], name: str) -> int:
    value = state.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise RequestError(f"the place kept has {name} = {value!r}; it is a whole number of 0 or more")
    return value
