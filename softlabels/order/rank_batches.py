"""EpochConfig, which specifies one rank's part of an epoch, and RankBatches, the batches that follow from it.

The epoch is one sequence of indices 0 … N - 1. A step takes the next `world_size × batch_size` of them, rank 0 the
first `batch_size`, rank 1 the next, and so on. Progress is therefore one number, the cursor: how many samples all ranks
together have taken. Resuming at a cursor, with any number of ranks and any batch size, takes exactly what is left.

    index    0 ··············· cursor ··············· N
             taken             │ rank 0 │ rank 1 │ rank 0 │ rank 1 │ ra 0 │ ra 1 │
                               └──── step 0 ─────┴──── step 1 ─────┴── step 2 ───┘  remainder="split"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypedDict, get_args

import msgspec
import numpy as np
from msgspec import Meta

from softlabels.documents import Document, as_json, parse_document
from softlabels.errors import RequestError, RowsNotCommittedError
from softlabels.order.epoch_order import EpochOrder, require_int
from softlabels.order.permutation import CHUNK, Positions

if TYPE_CHECKING:
    from softlabels.manifest import Manifest

Remainder: TypeAlias = Literal["split", "drop", "pad"]
"""How samples that do not fill a last step are handled; see `EpochConfig`."""

_LARGEST_COUNT = 2**31 - 1
"""Bound of ranks and batch sizes: above any real one, and products stay far below 64 bits."""


class EpochOptions(TypedDict, total=False):
    """The fields of an `EpochConfig` as keyword arguments, so that type checkers and editors know them."""

    seed: int
    epoch: int
    batch_size: int
    rank: int
    world_size: int
    cursor: int
    shuffle: bool
    block: int | None
    remainder: Remainder
    view: int | None


class EpochConfig(Document, frozen=True, kw_only=True):
    """Which samples one rank takes in one epoch, and in which batches; the one object that readers and servers pass on.

    The descriptions of the fields are also those of an epoch request's parameters in the server's OpenAPI document.

    Attributes:
        remainder: how samples that do not fill a last step are handled.
            "split" divides them evenly: every sample is seen exactly once, and a step's batches differ by at most one
            sample. If fewer samples than ranks would be left, they are divided over the last two steps, so a batch is
            empty only if `batch_size` is 1 or fewer samples than ranks are left in total.
            "drop" skips them: all batches are full, and up to `RankBatches.left_out` samples are not seen.
            "pad" fills the last step with the epoch's first samples, which `StepBatch.repeated` counts.
    Raises:
        RequestError: a number outside its range, or an unknown remainder. `seed`, `epoch` and `block` are checked by
            the `EpochOrder` made from them.
    """

    seed: Annotated[int, Meta(description="training-run seed, 0 … 2⁶⁴ − 1")]
    epoch: Annotated[int, Meta(description="epoch number, from 0")]
    batch_size: Annotated[int, Meta(description="samples per step and rank, ≥ 1")]
    rank: Annotated[int, Meta(description="0 … world_size − 1")] = 0
    world_size: Annotated[int, Meta(description="number of ranks that share the epoch, ≥ 1")] = 1
    cursor: Annotated[int, Meta(description="samples of the epoch that all ranks together have taken already")] = 0
    shuffle: Annotated[bool, Meta(description="false: the store's order")] = True
    # For stores where random reads are expensive.
    block: Annotated[int | None, Meta(description="shuffle blocks of this many consecutive samples")] = None
    remainder: Annotated[Remainder, Meta(description="how samples that do not fill a last step are handled")] = "split"
    view: Annotated[
        int | None, Meta(description="view of every sample, if the store has views; default: epoch modulo their number")
    ] = None

    def __post_init__(self) -> None:
        require_int("batch_size", self.batch_size, 1, _LARGEST_COUNT)
        require_int("world_size", self.world_size, 1, _LARGEST_COUNT)
        require_int("rank", self.rank, 0, self.world_size - 1)
        require_int("cursor", self.cursor, 0, 2**64 - 1)
        if self.remainder not in get_args(Remainder):
            raise RequestError(f"remainder must be one of {', '.join(get_args(Remainder))}, not {self.remainder!r}")

    def to_query(self) -> dict[str, str]:
        """Return the parameters of an epoch request's URL; `epoch` is part of its path."""
        values = {name: value for name, value in as_json(self).items() if name != "epoch"}
        return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in values.items()}

    @classmethod
    def from_query(cls, parameters: Mapping[str, str]) -> EpochConfig:
        """Return the configuration in an epoch request: what `to_query` returns, and `epoch`. Raises RequestError."""
        document: dict[str, Any] = dict(parameters)
        for name, text in parameters.items():
            if name == "shuffle" and text in ("true", "false"):
                document[name] = text == "true"
            # 2⁶⁴ has 20 digits. The bound comes first: a hostile number of a million digits takes minutes to parse.
            elif len(text) <= 20 and text.isascii() and text.isdecimal():
                document[name] = int(text)
        return parse_document(document, cls, what="query", error=RequestError)

    def batches(self, manifest: Manifest, digest: str) -> RankBatches:
        """Return this rank's batches in a store.

        Raises:
            RequestError: a number out of range, or a view that the store does not keep.
            RowsNotCommittedError: the store is unfinished, so its epoch would be incomplete.
        """
        if not manifest.finished:
            raise RowsNotCommittedError(
                f"{manifest.name!r} is unfinished: an epoch needs every sample; run `softlabels resume` first"
            )
        self.view_of(manifest)
        return self.batches_over(digest, manifest.samples)

    def batches_over(self, digest: str, samples: int) -> RankBatches:
        """Return this rank's batches over so many samples, ordered by a store's digest. Raises RequestError."""
        order = EpochOrder(digest, samples, seed=self.seed, epoch=self.epoch, block=self.block, shuffle=self.shuffle)
        return RankBatches(order, self)

    def view_of(self, manifest: Manifest) -> int | None:
        """Return the view of this epoch; None if the store keeps no views. Raises RequestError."""
        layout = manifest.layout
        if layout.kind != "views":
            if self.view is not None:
                raise RequestError(f"{manifest.name!r} keeps no views, and so no view {self.view}")
            return None
        view = self.epoch % layout.views if self.view is None else self.view
        if not 0 <= view < layout.views:
            raise RequestError(f"{manifest.name!r} keeps views 0 to {layout.views - 1}, not {view}")
        return view

    def resumed_at(self, cursor: int) -> EpochConfig:
        """Return the configuration of the rest of the epoch."""
        return msgspec.structs.replace(self, cursor=cursor)


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """Samples of one rank at one step.

    Attributes:
        step: step number, counted from the configuration's cursor.
        positions: int64, shape [B], positions in the store.
        repeated: how many of them, at the end, were already taken in this epoch: padding.
        cursor_after: cursor of the epoch once every rank has taken this step.
    """

    step: int
    positions: Positions
    repeated: int
    cursor_after: int


@dataclass(frozen=True)
class RankBatches:
    """The rest of an epoch for one rank: a sequence of batches, as many as every other rank has.

    Args:
        order: order of the epoch's samples.
        config: batch size, rank, cursor and remainder.
    Raises:
        RequestError: the cursor is beyond the epoch's end.
    """

    order: EpochOrder
    config: EpochConfig

    def __post_init__(self) -> None:
        require_int("cursor", self.config.cursor, 0, self.order.samples)

    @property
    def batch_count(self) -> int:
        """Number of steps left in the epoch, the same on every rank."""
        return self._full_steps + len(self._last_steps)

    @property
    def sample_count(self) -> int:
        """Samples in all of this rank's batches, repeated ones included."""
        last = range(self._full_steps, self.batch_count)
        return self._full_steps * self.config.batch_size + sum(self.batch_samples(step) for step in last)

    @property
    def left_out(self) -> int:
        """Samples that no rank takes in this epoch: 0 unless `remainder` is "drop"."""
        return (self.order.samples - self.config.cursor) % self._step_size if self.config.remainder == "drop" else 0

    def batch_samples(self, step: int) -> int:
        """Return the number of samples that this rank takes at a step, repeated ones included."""
        return len(self._indices(step))

    def cursor_after(self, step: int) -> int:
        """Return the epoch's cursor once every rank has taken this step: the value to save with a checkpoint."""
        # With "pad", the last step extends past the end.
        return min(self._indices_of_all_ranks(step).stop, self.order.samples)

    def batch_positions(self, step: int) -> Positions:
        """Return the store positions that this rank takes at a step; int64, shape [B].

        Raises:
            RequestError: there is no such step.
        """
        return self._positions_of([self._indices(step)])

    def steps(self, first_step: int = 0, *, stride: int = 1) -> Iterator[StepBatch]:
        """Iterate over steps `first_step`, `first_step + stride`, …: worker w of n takes `steps(w, stride=n)`.

        Cheaper than `batch_positions` step by step: the order of many small batches is computed at once.

        Raises:
            RequestError: `first_step` is negative or `stride` is not positive.
        """
        require_int("first_step", first_step, 0, _LARGEST_COUNT)
        require_int("stride", stride, 1, _LARGEST_COUNT)
        steps = range(first_step, self.batch_count, stride)
        # NumPy's cost per call dominates in small batches: 75 µs for one of 256, 11 µs computed ahead (docs/adr/0006).
        at_once = max(1, CHUNK // self.config.batch_size)
        return (batch for i in range(0, len(steps), at_once) for batch in self._batches_of(steps[i : i + at_once]))

    def __len__(self) -> int:
        return self.batch_count

    def __iter__(self) -> Iterator[StepBatch]:
        return self.steps()

    @property
    def _step_size(self) -> int:
        return self.config.world_size * self.config.batch_size

    @cached_property
    def _full_steps(self) -> int:
        """Number of steps of `_step_size` indices; with "pad" the last one extends past the end."""
        full, rest = divmod(self.order.samples - self.config.cursor, self._step_size)
        if self.config.remainder == "pad" and rest:
            return full + 1
        # "split" with fewer samples left than ranks: they and the last full step are divided into two steps.
        two_shared = self.config.remainder == "split" and 0 < rest < self.config.world_size
        return full - 1 if two_shared and full and self.config.batch_size > 1 else full

    @cached_property
    def _last_steps(self) -> tuple[range, ...]:
        """Indices of the smaller steps at the end, step by step."""
        if self.config.remainder != "split":
            return ()
        begin, end = self.config.cursor + self._full_steps * self._step_size, self.order.samples
        if end - begin <= self._step_size:
            return (range(begin, end),) if begin < end else ()
        # Rounded up, so that resuming between the two leaves exactly the second one as a single step.
        middle = begin + (end - begin + 1) // 2
        return range(begin, middle), range(middle, end)

    def _indices_of_all_ranks(self, step: int) -> range:
        """Return the indices that all ranks take at a step; those from N on stand for the epoch's first samples."""
        if not 0 <= step < self.batch_count:
            raise RequestError(
                f"there is no step {step}: this epoch has {self.batch_count} from cursor {self.config.cursor} on",
                step=step,
            )
        if step >= self._full_steps:
            return self._last_steps[step - self._full_steps]
        begin = self.config.cursor + step * self._step_size
        return range(begin, begin + self._step_size)

    def _indices(self, step: int) -> range:
        every, rank, world_size = self._indices_of_all_ranks(step), self.config.rank, self.config.world_size
        return every[len(every) * rank // world_size : len(every) * (rank + 1) // world_size]

    def _batches_of(self, steps: range) -> Iterator[StepBatch]:
        parts = [self._indices(step) for step in steps]
        positions = self._positions_of(parts)
        begin = 0
        for step, part in zip(steps, parts, strict=True):
            yield StepBatch(
                step=step,
                positions=positions[begin : begin + len(part)],
                repeated=max(0, part.stop - max(part.start, self.order.samples)),
                cursor_after=self.cursor_after(step),
            )
            begin += len(part)

    def _positions_of(self, parts: list[range]) -> Positions:
        indices = np.concatenate([np.arange(part.start, part.stop, dtype=np.int64) for part in parts])
        # Parts are in ascending order, so the last index is the largest.
        if indices.size and indices[-1] >= self.order.samples:
            indices %= self.order.samples
        return self.order.positions_at(indices)
