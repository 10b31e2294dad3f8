"""Cached rows on disk: fixed-size records in which every field is followed by its own checksum.

    record    key, 8 bytes │ field, zero-padded to whole words │ its checksum, 8 bytes │ next field │ …

A checksum of 0 means that the field is not stored. Records are written by `pwrite` and read through a memory map, of
blocks that were allocated before: a full disk is then an error, where a hole in the map could kill the process.

Legend: B rows, W little-endian 64-bit words of a row.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from softlabels.manifest import ArraySpec
from softlabels.mapping_guard import GuardedRange
from softlabels.row_sums import sums_of_rows
from softlabels.splitmix64 import finalise

Words: TypeAlias = NDArray[np.uint64]

WORD = 8
"""Bytes per word."""

_GROWTH_BYTES = 4 << 20
"""Least growth of a file of records; a larger one grows by an eighth, so that it is seldom mapped anew."""


def derive_seed(*parts: str) -> int:
    """Return a 64-bit seed derived from these strings."""
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "little")


def row_checks(words_BW: Words, keys_B: Words, seed: int) -> Words:
    """Return 64-bit checksums of one field's rows, [B]: of their bytes (CRC-32C), of their keys and of a seed; never 0.

    A row so belongs to one sample and view, and, by the seed, to one field of one store version.
    """
    checks: Words = np.maximum(finalise(keys_B ^ np.uint64(seed)) ^ sums_of_rows(words_BW), np.uint64(1))
    return checks


def record_type(fields: Mapping[str, ArraySpec]) -> np.dtype[Any]:
    """Return the structured type of a record with these fields."""
    parts = [("key", "<u8")]
    for name, spec in fields.items():
        parts += [(f"field {name}", f"V{_words(spec) * WORD}"), (f"check {name}", "<u8")]
    return np.dtype(parts)


def runs(numbers: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each run of consecutive numbers in an ascending array."""
    if len(numbers):
        cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
        yield from zip([0, *cuts.tolist()], [*cuts.tolist(), len(numbers)], strict=True)


def allocate(fd: int, begin: int, end: int) -> None:
    """Give a file blocks of zeros from `begin` to `end`. Raises OSError: the disk is full.

    A file made longer without blocks would have holes. On tmpfs, reading one through a map takes a block, and kills
    the process (SIGBUS) where there is none.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, begin, end - begin)
        return
    while begin < end:  # macOS
        begin += os.pwrite(fd, bytes(min(end - begin, _GROWTH_BYTES)), begin)


class GuardedMap(mmap.mmap):
    """A shared, read-only map; where its file was cut, zeros are read, and counted by its guard."""

    guard: GuardedRange

    @classmethod
    def of(cls, fd: int, size_bytes: int) -> GuardedMap:
        """Return a map of the first bytes of a file."""
        try:
            made = cls(fd, size_bytes, prot=mmap.PROT_READ)
        except ValueError as error:  # Python looks at the size again: the file was cut since ours did
            raise OSError(f"a cache file was cut while it was read: {error}") from error
        # Held by the map: its addresses may be another's as soon as it is gone.
        made.guard = GuardedRange(np.frombuffer(made, np.uint8).ctypes.data, size_bytes)
        return made


class MappedFile:
    """An existing file, read through a memory map and written by `pwrite`; usable after fork.

    Args:
        path: path of the file.
        size_bytes: its size, or its size when full.
        read_only: never write to it.
        grows: whether it may be smaller.
    Raises:
        OSError: it cannot be opened, or has a different size.
    """

    fd = -1

    def __init__(self, path: Path, size_bytes: int, *, read_only: bool, grows: bool = False) -> None:
        self.fd = os.open(path, os.O_RDONLY if read_only else os.O_RDWR)
        self.size_bytes, self._least_bytes = size_bytes, 0 if grows else size_bytes
        self.map: GuardedMap | None = None
        self.check_size()

    def check_size(self) -> None:
        """Map what was added to the file. Raises OSError: it was cut, also if it has its size again."""
        found, mapped = os.fstat(self.fd).st_size, 0 if self.map is None else len(self.map)
        if not max(self._least_bytes, mapped) <= found <= self.size_bytes:
            raise OSError(f"a cache file has {found} bytes where it should have {max(self._least_bytes, mapped)}")
        if self.map is not None and self.map.guard.lost_pages:
            raise OSError("a cache file was cut while it was read")
        if found > mapped:
            self.map = GuardedMap.of(self.fd, found)
            self.map_changed(self.map)

    def map_changed(self, new: GuardedMap) -> None:
        """Make the views of the map that a subclass keeps."""

    def reserve(self, end: int) -> None:
        """Have blocks allocated up to this byte, and more if the disk has room. Raises OSError: it has not."""
        size = os.fstat(self.fd).st_size
        if end <= size:
            return
        try:
            allocate(self.fd, size, min(self.size_bytes, max(end, size + max(size // 8, _GROWTH_BYTES))))
        except OSError:
            allocate(self.fd, size, end)
        self.check_size()

    def write(self, offset: int, data: NDArray[np.uint8]) -> None:
        """Write all of `data`. Raises OSError."""
        view = data.data.cast("B")
        while view:
            # `pwrite` may write a part, as on a disk that fills up; the next call then raises the error.
            count = os.pwrite(self.fd, view, offset)
            view, offset = view[count:], offset + count

    def __del__(self) -> None:
        # Closed with the last reference: if it were closed earlier, a thread about to write could write into whatever
        # file gets the same descriptor next.
        if self.fd >= 0:
            os.close(self.fd)


class RecordFile(MappedFile):
    """A file of records, addressed by slot number.

    Args:
        path, read_only, grows: as in `MappedFile`.
        fields: fields of a record.
        capacity: number of records when full.
        digest: digest of the store, which enters every checksum.
    """

    def __init__(
        self,
        path: Path,
        fields: Mapping[str, ArraySpec],
        capacity: int,
        *,
        digest: str,
        read_only: bool,
        grows: bool = False,
    ) -> None:
        self._type = record_type(fields)
        self._records = np.empty(0, self._type)
        super().__init__(path, capacity * self._type.itemsize, read_only=read_only, grows=grows)
        self._specs = fields
        self._seeds = {name: derive_seed(digest, name) for name in fields}

    def read(
        self, slots: NDArray[np.int64], names: tuple[str, ...], keys: Words, checks: Words
    ) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_], NDArray[np.bool_]]:
        """Return fields of the records in these slots, [B], each below the capacity.

        Args:
            keys, checks: [B] keys of the rows expected there.
        Returns:
            One array per field, [B, ...]; which rows are valid, [B]; and which are damaged rather than absent, [B].
        """
        valid = self.keys_at(slots) == keys
        damaged = ~valid
        arrays = {}
        for name in names:
            spec = self._specs[name]
            # The checksum is read first and written last, so a row that is being written looks absent.
            sums = self._records[f"check {name}"][slots]
            # Gathered as opaque bytes: NumPy then copies each row at once.
            # The copy is both verified and returned: another process may write to the map in between.
            words_BW = self._records[f"field {name}"][slots].view("<u8").reshape(len(slots), _words(spec))
            right = sums == row_checks(words_BW, checks, self._seeds[name])
            damaged |= ~right & (sums != 0)
            valid &= right
            arrays[name] = _shaped(words_BW, spec)
        return arrays, valid, damaged & ~valid

    def map_changed(self, new: GuardedMap) -> None:
        """Make the view of all whole records."""
        self._records = np.frombuffer(new, self._type, len(new) // self._type.itemsize)

    def __len__(self) -> int:
        """Number of records there is room for so far."""
        return len(self._records)

    def keys_at(self, slots: NDArray[np.int64]) -> Words:
        """Return the keys of the records in these slots, [B]."""
        keys: Words = self._records["key"][slots]
        return keys

    def pack(self, keys: Words, checks: Words, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
        """Return whole records, uint8 [B, record]; fields that are not given are marked absent."""
        records = np.zeros(len(keys), dtype=self._type)
        records["key"] = keys
        for name, array in arrays.items():
            words_BW = _padded(array, self._specs[name])
            records[f"field {name}"] = words_BW.view(self._type[f"field {name}"])[:, 0]
            records[f"check {name}"] = row_checks(words_BW, checks, self._seeds[name])
        return records.view(np.uint8).reshape(len(keys), self._type.itemsize)

    def write_records(self, slots: NDArray[np.int64], block: NDArray[np.uint8]) -> None:
        """Write packed records into ascending slots, consecutive ones with one call. Raises OSError."""
        self.reserve((int(slots[-1]) + 1) * self._type.itemsize)
        for begin, end in runs(slots):
            self.write(int(slots[begin]) * self._type.itemsize, block[begin:end])

    def write_fields(self, slot: int, record: NDArray[np.uint8], names: tuple[str, ...]) -> None:
        """Write some fields of one packed record into its slot and keep its others. Raises OSError."""
        offsets: Any = self._type.fields  # by name: dtype and offset
        # The checksum after its field: until then no reader takes the field for valid.
        for part in (f"{kind} {name}" for name in names for kind in ("field", "check")):
            dtype, begin = offsets[part][:2]
            self.write(slot * self._type.itemsize + begin, record[begin : begin + dtype.itemsize])


def _words(spec: ArraySpec) -> int:
    return -(-spec.row_bytes // WORD)


def _padded(array: NDArray[Any], spec: ArraySpec) -> Words:
    flat = np.ascontiguousarray(array, dtype=spec.dtype).reshape(len(array), -1).view(np.uint8)
    padding = _words(spec) * WORD - flat.shape[1]
    return (np.pad(flat, ((0, 0), (0, padding))) if padding else flat).view("<u8")


def _shaped(words_BW: Words, spec: ArraySpec) -> NDArray[Any]:
    rows = words_BW.view(np.uint8)
    exact = rows if rows.shape[1] == spec.row_bytes else np.ascontiguousarray(rows[:, : spec.row_bytes])
    return exact.view(spec.dtype).reshape(len(words_BW), *spec.row_shape)
