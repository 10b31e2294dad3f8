"""How do rows lie in a cache's files? As records of one size, in which each field is followed by its own checksum.

    record    key, 8 bytes │ field, filled up with zeros to whole words │ its checksum, 8 bytes │ next field │ …

A checksum of 0 says that a field was not kept. Written by plain writes and read through a mapping: what is written to a
full disk is an error then, and not the end of the process.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.manifest import ArraySpec
from softlabels_client.cache.checks import RowChecks, Words, seed_of

WORD = 8


def record_bytes(fields: Mapping[str, ArraySpec]) -> int:
    """Bytes of a record that holds these fields."""
    return WORD + sum(_words(spec) * WORD + WORD for spec in fields.values())


def runs(places: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Where each run of consecutive numbers begins and ends in an ascending array."""
    if len(places):
        cuts = np.flatnonzero(np.diff(places) != 1) + 1
        yield from zip([0, *cuts.tolist()], [*cuts.tolist(), len(places)], strict=True)


@dataclass(frozen=True)
class _Placed:
    """A field in a record: where its bytes begin, and everything that its checksum needs."""

    spec: ArraySpec
    begin: int
    words: int
    checks: RowChecks


class MappedFile:
    """A file of fixed size, read through a mapping and written by plain writes; after fork the child's as well.

    Args:
        path: of the file, which is there.
        size_bytes: that it must have.
        read_only: never written to.
    Raises:
        OSError: it cannot be opened, or has another size.
    """

    def __init__(self, path: Path, size_bytes: int, *, read_only: bool) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY if read_only else os.O_RDWR)
        self.size_bytes = size_bytes
        self.refuse_other_size()
        self.map = mmap.mmap(self.fd, size_bytes, prot=mmap.PROT_READ)

    def refuse_other_size(self) -> None:
        """Raise OSError where somebody cut the file: reading a mapping beyond its file's end ends the process."""
        found = os.fstat(self.fd).st_size
        if found != self.size_bytes:
            raise OSError(f"a cache file has {found} bytes where it should have {self.size_bytes}")

    def write(self, offset: int, data: NDArray[np.uint8]) -> None:
        """Write all of it. Raises OSError."""
        view = data.data.cast("B")
        while view:
            count = os.pwrite(self.fd, view, offset)
            view, offset = view[count:], offset + count

    def __del__(self) -> None:
        # Closed with the last one who refers to it: closed any earlier, a thread that is about to write would write
        # into whichever file is given the same number next.
        if self.fd >= 0:
            os.close(self.fd)


class RecordFile:
    """Records of rows, by slot.

    Args:
        path: of the file.
        fields: that a record holds.
        capacity: records that the file has room for.
        digest: of the store whose rows they are.
        read_only: never written to.
    Raises:
        OSError: as `MappedFile`.
    """

    def __init__(
        self, path: Path, fields: Mapping[str, ArraySpec], capacity: int, *, digest: str, read_only: bool
    ) -> None:
        self._record_bytes = record_bytes(fields)
        self.file = MappedFile(path, capacity * self._record_bytes, read_only=read_only)
        self._capacity = capacity
        self._placed: dict[str, _Placed] = {}
        begin = WORD
        for name, spec in fields.items():
            words = _words(spec)
            self._placed[name] = _Placed(spec, begin, words, RowChecks(words, seed_of(digest, name)))
            begin += (words + 1) * WORD
        self._keys = self._column(0, np.dtype("<u8"))

    def read(
        self, slots: NDArray[np.int64], names: tuple[str, ...], keys: Words, checks: Words
    ) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_], NDArray[np.bool_]]:
        """Fields of the records in these slots.

        Args:
            slots: [B], each below the capacity.
            names: of the fields.
            keys, checks: [B] of the rows that should lie there.
        Returns:
            One array a field, [B, ...]; which rows are sound, [B]; and which are neither sound nor merely absent, [B].
        """
        sound = self._keys[slots] == keys
        spoilt = ~sound
        arrays = {}
        for name in names:
            placed = self._placed[name]
            # The checksum first: whoever writes writes it last, so a row that is being written looks absent.
            sums = self._column(placed.begin + placed.words * WORD, np.dtype("<u8"))[slots]
            rows = self._column(placed.begin, np.dtype((np.void, placed.words * WORD)))[slots]
            words_BW = rows.view("<u8").reshape(len(slots), placed.words)
            right = sums == placed.checks.of(words_BW, checks)
            spoilt |= ~right & (sums != 0)
            sound &= right
            arrays[name] = _shaped(words_BW, placed.spec)
        return arrays, sound, spoilt & ~sound

    def keys_at(self, slots: NDArray[np.int64]) -> Words:
        """Whose records lie in these slots, [B]."""
        return self._keys[slots]

    def pack(self, keys: Words, checks: Words, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
        """Whole records, uint8 [B, record]; fields that are not given are absent."""
        block = np.zeros((len(keys), self._record_bytes // WORD), dtype="<u8")
        block[:, 0] = keys
        for name, array in arrays.items():
            placed = self._placed[name]
            first = placed.begin // WORD
            words_BW = _padded(array, placed)
            block[:, first : first + placed.words] = words_BW
            block[:, first + placed.words] = placed.checks.of(words_BW, checks)
        return block.view(np.uint8)

    def write(self, slots: NDArray[np.int64], block: NDArray[np.uint8]) -> None:
        """Put packed records into ascending slots, neighbours at one go. Raises OSError."""
        for begin, end in runs(slots):
            self.file.write(int(slots[begin]) * self._record_bytes, block[begin:end])

    def write_fields(self, slot: int, block: NDArray[np.uint8], names: tuple[str, ...]) -> None:
        """Put some fields of one packed record into its slot, and leave the others. Raises OSError."""
        for name in names:
            placed = self._placed[name]
            end = placed.begin + placed.words * WORD
            for part in (slice(placed.begin, end), slice(end, end + WORD)):
                self.file.write(slot * self._record_bytes + part.start, block[part])

    def _column(self, begin: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        return np.ndarray(
            (self._capacity,), dtype=dtype, buffer=self.file.map, offset=begin, strides=(self._record_bytes,)
        )


def _words(spec: ArraySpec) -> int:
    return -(-spec.row_bytes // WORD)


def _padded(array: NDArray[Any], placed: _Placed) -> Words:
    flat = np.ascontiguousarray(array, dtype=placed.spec.dtype).reshape(len(array), -1).view(np.uint8)
    if flat.shape[1] == placed.words * WORD:
        return flat.view("<u8")
    padded = np.zeros((len(array), placed.words * WORD), dtype=np.uint8)
    padded[:, : flat.shape[1]] = flat
    return padded.view("<u8")


def _shaped(words_BW: Words, spec: ArraySpec) -> NDArray[Any]:
    rows = words_BW.view(np.uint8)
    exact = rows if rows.shape[1] == spec.row_bytes else np.ascontiguousarray(rows[:, : spec.row_bytes])
    return exact.view(spec.dtype).reshape(len(words_BW), *spec.row_shape)
