"""Which samples does one rank take at each step of an epoch, from wherever the epoch was left?

The epoch is one sequence of places 0 … N - 1. A step takes the next `world_size × batch_size` of them, rank 0 the first
`batch_size`, rank 1 the next, and so on. How far the epoch has come is therefore one number, the cursor: how many
places all ranks together have taken. Whoever goes on from a cursor, with however many ranks and whatever batch size,
takes exactly the places that are left.

    places   0 ··············· cursor ··············· N
             taken             │ rank 0 │ rank 1 │ rank 0 │ rank 1 │ ra 0 │ ra 1 │
                               └──── step 0 ─────┴──── step 1 ─────┴── step 2 ───┘  remainder="split"
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import numpy as np

from softlabels.errors import RequestError
from softlabels.order.epoch_order import EpochOrder, require_int
from softlabels.order.permutation import CHUNK, Positions

Remainder: TypeAlias = Literal["split", "drop", "pad"]
"""What becomes of the samples that do not fill a last step; `RankBatches` says what each means."""

_LARGEST_COUNT = 2**31 - 1
"""Ranks, and samples in a batch: no such number comes near, and products stay far inside 64 bits."""


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """What one rank takes at one step.

    Attributes:
        step: counted from the cursor that the walk began at.
        positions: int64, shape [B], positions in the store.
        repeated: how many of them, at the end, were taken before in this epoch: padding, not new samples.
        cursor_after: the epoch's cursor once every rank has taken this step.
    """

    step: int
    positions: Positions
    repeated: int
    cursor_after: int


@dataclass(frozen=True, kw_only=True)
class RankBatches:
    """The rest of an epoch as one rank sees it: a sequence of batches, as many as every other rank has.

    Args:
        order: which sample comes when.
        batch_size: samples a rank takes at a step, ≥ 1.
        rank: 0 … world_size - 1.
        world_size: how many ranks share the epoch, ≥ 1.
        cursor: how many samples of the epoch all ranks together have taken already.
        remainder: what becomes of the samples that do not fill a last step.
            "split" shares them as evenly as can be: every sample is seen exactly once, and a step's batches differ by
            at most one sample. Were there fewer than one a rank, the last two steps share theirs, so a batch is empty
            only where that cannot be avoided: `batch_size` is 1, or fewer samples than ranks are left in all.
            "drop" leaves them out: all batches are full, and up to `left_out` samples are not seen in this epoch.
            "pad" fills the last step with the epoch's first samples: all batches are full, and some samples are seen
            again, which `StepBatch.repeated` counts.
    Raises:
        RequestError: a number outside these ranges, or an unknown remainder.
    """

    order: EpochOrder
    batch_size: int
    rank: int = 0
    world_size: int = 1
    cursor: int = 0
    remainder: Remainder = "split"

    def __post_init__(self) -> None:
        require_int("batch_size", self.batch_size, 1, _LARGEST_COUNT)
        require_int("world_size", self.world_size, 1, _LARGEST_COUNT)
        require_int("rank", self.rank, 0, self.world_size - 1)
        require_int("cursor", self.cursor, 0, self.order.samples)
        if self.remainder not in get_args(Remainder):
            raise RequestError(f"remainder must be one of {', '.join(get_args(Remainder))}, not {self.remainder!r}")

    @property
    def batch_count(self) -> int:
        """Steps to the end of the epoch, the same on every rank."""
        return self._full_steps + len(self._last_cuts)

    @property
    def sample_count(self) -> int:
        """Samples that this rank takes in all of them, repeated ones included."""
        last = range(self._full_steps, self.batch_count)
        return self._full_steps * self.batch_size + sum(self.batch_samples(step) for step in last)

    @property
    def left_out(self) -> int:
        """Samples that no rank will see in this epoch: 0 unless the remainder is dropped."""
        return (self.order.samples - self.cursor) % self._step_size if self.remainder == "drop" else 0

    def batch_samples(self, step: int) -> int:
        """How many samples this rank takes at a step, repeated ones included."""
        return len(self._share(step))

    def cursor_after(self, step: int) -> int:
        """The epoch's cursor once every rank has taken this step: what to keep beside a checkpoint."""
        return min(self._cut(step).stop, self.order.samples)

    def batch_positions(self, step: int) -> Positions:
        """The positions in the store that this rank takes at a step; int64, shape [B].

        Raises:
            RequestError: there is no such step.
        """
        return self._positions_of([self._share(step)])

    def walk(self, first_step: int = 0, *, stride: int = 1) -> Iterator[StepBatch]:
        """The batches of steps `first_step`, `first_step + stride`, …: worker w of n walks from w in strides of n.

        Cheaper than `batch_positions` step by step: the order is worked out for many small batches at once.

        Raises:
            RequestError: `first_step` is negative or `stride` is not positive.
        """
        require_int("first_step", first_step, 0, _LARGEST_COUNT)
        require_int("stride", stride, 1, _LARGEST_COUNT)
        steps = range(first_step, self.batch_count, stride)
        at_once = max(1, CHUNK // self.batch_size)
        return (batch for i in range(0, len(steps), at_once) for batch in self._batches_of(steps[i : i + at_once]))

    def __len__(self) -> int:
        return self.batch_count

    def __iter__(self) -> Iterator[StepBatch]:
        return self.walk()

    @property
    def _step_size(self) -> int:
        return self.world_size * self.batch_size

    @cached_property
    def _full_steps(self) -> int:
        """Steps that take `_step_size` places; padded ones run over the end."""
        full, rest = divmod(self.order.samples - self.cursor, self._step_size)
        if self.remainder == "pad" and rest:
            return full + 1
        return full - 1 if self._shares_last_two(full, rest) else full

    @cached_property
    def _last_cuts(self) -> tuple[range, ...]:
        """The places that the smaller steps at the end take, step by step."""
        if self.remainder != "split":
            return ()
        begin, end = self.cursor + self._full_steps * self._step_size, self.order.samples
        if end - begin <= self._step_size:
            return (range(begin, end),) if begin < end else ()
        # Rounded up, so that a walk resumed between the two finds one step of the rest, as this one does.
        middle = begin + (end - begin + 1) // 2
        return range(begin, middle), range(middle, end)

    def _shares_last_two(self, full: int, rest: int) -> bool:
        return self.remainder == "split" and 0 < rest < self.world_size and full > 0 and self.batch_size > 1

    def _cut(self, step: int) -> range:
        """The places that all ranks together take at a step; those from N on stand for the epoch's first ones."""
        if not 0 <= step < self.batch_count:
            raise RequestError(
                f"there is no step {step}: from cursor {self.cursor} on this epoch has {self.batch_count}", step=step
            )
        if step >= self._full_steps:
            return self._last_cuts[step - self._full_steps]
        begin = self.cursor + step * self._step_size
        return range(begin, begin + self._step_size)

    def _share(self, step: int) -> range:
        cut = self._cut(step)
        return cut[len(cut) * self.rank // self.world_size : len(cut) * (self.rank + 1) // self.world_size]

    def _batches_of(self, steps: range) -> Iterator[StepBatch]:
        shares = [self._share(step) for step in steps]
        positions = self._positions_of(shares)
        begin = 0
        for step, share in zip(steps, shares, strict=True):
            yield StepBatch(
                step=step,
                positions=positions[begin : begin + len(share)],
                repeated=max(0, share.stop - max(share.start, self.order.samples)),
                cursor_after=self.cursor_after(step),
            )
            begin += len(share)

    def _positions_of(self, shares: list[range]) -> Positions:
        places = np.concatenate([np.arange(share.start, share.stop, dtype=np.int64) for share in shares])
        if places.size and places[-1] >= self.order.samples:
            places %= self.order.samples
        return self.order.positions_at(places)
