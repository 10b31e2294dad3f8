"""What is an epoch stream made of? Safetensors files end to end, cut into pieces that are gathered one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from softlabels import wire
from softlabels.epochs import END_FORMAT, EpochConfig
from softlabels.errors import RequestError
from softlabels.ids import to_fixed_bytes
from softlabels.manifest import IDS, ROW_OFFSETS
from softlabels.order import RankBatches, Remainder, StepBatch
from softlabels.target_store import check_transfer_set
from softlabels_server.batches import (
    array_names,
    bytes_a_row,
    check_reply_temperature,
    has_row_offsets,
    refuse_other_version,
)
from softlabels_server.catalog import ServedStore
from softlabels_server.forms import metadata_of
from softlabels_server.requests import fields_of, read_query, short, temperature_of, too_large
from softlabels_server.settings import Settings

QUERY_KEYS = frozenset(
    {
        *("seed", "rank", "world_size", "batch_size", "cursor", "shuffle", "block", "remainder", "view"),
        *("fields", "temperature", "transfer_set", "digest"),
    }
)

_NUMBERS = ("seed", "rank", "world_size", "batch_size", "cursor", "block", "view")
_FRAME_FORMAT = "softlabels-epoch/1"
_COUNTED = 20
"""Digits that no cursor or row count needs: they stand in for the real ones where a header's room is worked out."""

_MARK = "<cursor>"
"""Where a frame's place stands in a header that is made once for many."""


@dataclass(frozen=True, kw_only=True)
class EpochStream:
    """A stream that may be had.

    Attributes:
        store: the version that it is of.
        plan: which samples, as it was asked for.
        batches: its steps.
        names: of the arrays, those of wider items first, so that all are aligned.
        temperature: what each frame says it is tempered for.
    """

    store: ServedStore
    plan: EpochConfig
    batches: RankBatches
    names: tuple[str, ...]
    temperature: float

    @cached_property
    def size_bytes(self) -> int:
        """Of the whole stream, the end frame included. Of sequences it has to be added up, which takes a moment."""
        rows, samples = self._rows, self.batches.sample_count
        per_row = sum(self._row_bytes(name) for name in self.names if not self._is_once_a_sample(name))
        per_sample = sum(self._row_bytes(name) for name in self.names if self._is_once_a_sample(name))
        offsets = 8 * (samples + self.batches.batch_count) if has_row_offsets(self.store) else 0
        frames = self.batches.batch_count * (self._header_bytes + 8)
        return frames + rows * per_row + samples * per_sample + offsets + len(self.end_frame)

    @cached_property
    def end_frame(self) -> bytes:
        """What ends a whole stream: a safetensors file without arrays, so that a cut one is told from a short one."""
        metadata = {
            "format": END_FORMAT,
            "digest": self.store.digest,
            "batches": str(self.batches.batch_count),
            "samples": str(self.batches.sample_count),
            "left_out": str(self.batches.left_out),
        }
        return wire.header_bytes({}, metadata)

    def pieces(self, piece_bytes: Callable[[], int]) -> Iterator[list[bytes | NDArray[Any]]]:
        """The frames in order, cut into lists of buffers; each is gathered when it is asked for.

        Args:
            piece_bytes: how large the next piece should be, about.
        Raises:
            RowsNotCommittedError, DamageError.
        """
        for step in self.batches:
            yield from self._frame(step, piece_bytes)
        yield [self.end_frame]

    def check_size(self, most_bytes: int) -> None:
        """Refuse batches that are larger than a reply may be. Raises BatchTooLargeError."""
        most = most_bytes // max(1, sum(self._row_bytes(name) for name in self.names))
        if self.plan.batch_size > most:
            raise too_large(self.plan.batch_size, most)
        if has_row_offsets(self.store) and self._largest_batch_rows > most:
            raise too_large(self._largest_batch_rows, most, "rows")

    def _frame(self, step: StepBatch, piece_bytes: Callable[[], int]) -> Iterator[list[bytes | NDArray[Any]]]:
        if has_row_offsets(self.store):
            arrays = self._arrays(step.positions, (*self.names,))
            header = self._header(step, {name: array.shape[0] for name, array in arrays.items()})
            yield [header, *(arrays[name] for name in self._ordered), wire.checksum_of(arrays.values())]
            return
        count = len(step.positions)
        pending: list[bytes | NDArray[Any]] = [self._header(step, dict.fromkeys(self.names, count))]
        size = total = 0
        for name in self.names:
            begin = 0
            while begin < count:
                if 2 * size >= piece_bytes():
                    yield pending
                    pending, size = [], 0
                # In equal parts, the nearest to what a piece should be; eight rows are whole words, so that the parts'
                # sums add up to the array's.
                left = count - begin
                parts = max(1, round(left * self._row_bytes(name) / piece_bytes()))
                at_once = -(-left // (8 * parts)) * 8
                positions = step.positions[begin : begin + at_once]
                found = self._arrays(positions, (name,))[name]
                kept = None if name == IDS else self.store.rows.word_sum_at(positions, name, view=self._view)
                total += wire.word_sum(found) if kept is None else kept
                size += found.nbytes
                begin += at_once
                pending.append(found)
                del found  # not held here while it is sent, nor longer
        yield [*pending, np.array([total % (1 << 64)], dtype="<u8")]

    def _arrays(self, positions: NDArray[np.int64], names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        found = self.store.rows.at_positions(positions, names, view=self._view)
        if IDS in found and self.store.manifest.ids.kind == "str":
            ids: Any = found[IDS]
            found[IDS] = to_fixed_bytes(ids, width_bytes=self.store.manifest.ids.width_bytes)
        return found

    @cached_property
    def _view(self) -> int | None:
        return self.plan.view_of(self.store.manifest)

    def _header(self, step: StepBatch, rows: Mapping[str, int]) -> bytes:
        """The header of a frame; frames of one size differ in their place alone, so one is made for each size."""
        key = (len(step.positions), step.repeated, tuple(rows.items()))
        around = self._headers.get(key)
        if around is None:
            shapes = self._shapes(rows)
            metadata = self._metadata(len(step.positions), _MARK, step.repeated)
            before, _, after = wire.header_bytes(shapes, metadata)[8:].rstrip().partition(_MARK.encode())
            if has_row_offsets(self.store):
                self._headers.clear()
            around = self._headers[key] = before, after
        text = around[0] + str(step.cursor_after).encode() + around[1]
        size = self._header_bytes
        assert len(text) <= size - 8, "the room was worked out for longer numbers"
        return (size - 8).to_bytes(8, "little") + text.ljust(size - 8)

    @cached_property
    def _headers(self) -> dict[Any, tuple[bytes, bytes]]:
        return {}

    def _metadata(self, samples: int, cursor: object, repeated: int) -> dict[str, str]:
        return {
            **metadata_of(self.store, self.temperature, samples=samples),
            "format": _FRAME_FORMAT,
            "cursor": str(cursor),
            "repeated": str(repeated),
        }

    @cached_property
    def _header_bytes(self) -> int:
        """Room that the header of every frame has: as much as the longest numbers would need, in whole cache lines."""
        longest = 10 ** (_COUNTED - 4)
        shapes = self._shapes(dict.fromkeys(self._ordered, longest // 10**6))
        metadata = self._metadata(longest, longest, longest)
        return -(-len(wire.header_bytes(shapes, metadata)) // 64) * 64

    @cached_property
    def _ordered(self) -> tuple[str, ...]:
        names = (*self.names, ROW_OFFSETS) if has_row_offsets(self.store) else self.names
        return tuple(sorted(names, key=lambda name: -self._dtype(name).itemsize))

    def _shapes(self, rows: Mapping[str, int]) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        shapes = {name: (self._dtype(name), (rows[name], *self._row_shape(name))) for name in self._ordered}
        return {**shapes, wire.CHECKSUM: (np.dtype("<u8"), (1,))}

    @cached_property
    def _rows(self) -> int:
        return sum(self._row_counts) if has_row_offsets(self.store) else self.batches.sample_count

    @cached_property
    def _largest_batch_rows(self) -> int:
        return max(self._row_counts, default=0)

    @cached_property
    def _row_counts(self) -> list[int]:
        rows = self.store.rows
        return [int(rows.row_counts_at(step.positions).sum()) for step in self.batches]

    def _is_once_a_sample(self, name: str) -> bool:
        return has_row_offsets(self.store) and name not in self.store.manifest.arrays

    def _row_bytes(self, name: str) -> int:
        return bytes_a_row(self.store, (name,))

    def _dtype(self, name: str) -> np.dtype[Any]:
        spec = self.store.manifest.arrays.get(name)
        if spec is not None:
            return np.dtype(spec.dtype)
        as_numbers = name == ROW_OFFSETS or (name == IDS and self.store.manifest.ids.kind == "int")
        return np.dtype("<i8") if as_numbers else np.dtype("|u1")

    def _row_shape(self, name: str) -> tuple[int, ...]:
        spec = self.store.manifest.arrays.get(name)
        if spec is not None:
            return spec.row_shape
        return () if self._dtype(name).itemsize == 8 else (self._row_bytes(name),)


def plan_stream(store: ServedStore, epoch: str, query: str, settings: Settings) -> EpochStream:
    """What a request for an epoch comes down to, if this store may answer it.

    Args:
        store: what is asked.
        epoch: the number in the path.
        query: the query string.
        settings: bounds of a batch.
    Raises:
        RequestError, StoreChangedError, FingerprintMismatchError, TemperatureError, TemperatureLockedError,
        UnknownFieldError, RowsNotCommittedError, BatchTooLargeError.
    """
    parameters = read_query(query, QUERY_KEYS)
    refuse_other_version(store, parameters.get("digest"))
    check_transfer_set(store.manifest, parameters.get("transfer_set"))
    plan = _plan(epoch, parameters)
    if plan.batch_size > settings.max_batch_ids:
        raise too_large(plan.batch_size, settings.max_batch_ids)
    names = array_names(store, fields_of(parameters))
    unordered = EpochStream(
        store=store,
        plan=plan,
        batches=plan.batches(store.manifest, store.digest),
        names=names,
        temperature=check_reply_temperature(store, temperature_of(parameters)),
    )
    ordered = tuple(name for name in unordered._ordered if name != ROW_OFFSETS)
    return EpochStream(
        store=store, plan=plan, batches=unordered.batches, names=ordered, temperature=unordered.temperature
    )


def _plan(epoch: str, parameters: Mapping[str, str]) -> EpochConfig:
    numbers = {name: _whole_number(name, parameters[name]) for name in _NUMBERS if name in parameters}
    for name in ("seed", "batch_size"):
        if name not in numbers:
            raise RequestError(f"an epoch needs a {name}: the order follows from it; add {name}=… to the query")
    shuffle = parameters.get("shuffle", "true")
    if shuffle not in ("true", "false"):
        raise RequestError(f"shuffle is {short(shuffle)}: it is true or false")
    remainder = parameters.get("remainder", "split")
    if remainder not in get_args(Remainder):
        raise RequestError(f"remainder is {short(remainder)}: choose {', '.join(get_args(Remainder))}")
    return EpochConfig(
        epoch=_whole_number("epoch", epoch),
        shuffle=shuffle == "true",
        remainder=remainder,  # type: ignore[arg-type]
        **numbers,
    )


def _whole_number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 20):
        raise RequestError(f"{name} is {short(text)}: give a whole number of 0 or more")
    return int(text)
