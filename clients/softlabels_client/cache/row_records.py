"""Cached rows on disk: fixed-size records in which every field is followed by its own checksum.

    record    key, 8 bytes │ field, zero-padded to whole words │ its checksum, 8 bytes │ next field │ …

A checksum of 0 means that the field is not stored. Records are written by `pwrite` and read through a memory map: a
full disk is then an error, where a write through the map would kill the process.

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
from softlabels.splitmix64 import finalise, sequence

Words: TypeAlias = NDArray[np.uint64]

WORD = 8
"""Bytes per word."""

_FOLD = np.uint64(32)

_WORDS_AT_ONCE = 8192
"""Words per step of a checksum: 64 KiB, which the allocator also keeps for the next time."""


def derive_seed(*parts: str) -> int:
    """Return a 64-bit seed derived from these strings."""
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "little")


class RowChecks:
    """Checksums of one field's rows of W words: detect every single changed word, and other damage but once in 2⁶⁴."""

    def __init__(self, words: int, seed: int) -> None:
        # Odd factors: no single changed word leaves the sum unchanged.
        self._factors = sequence(seed, words) | np.uint64(1)
        self._seed = np.uint64(seed)

    def of(self, words_BW: Words, keys_B: Words) -> Words:
        """Return the checksums of these rows, [B]; never 0."""
        sums = finalise(keys_B ^ self._seed)
        # A few rows at a time, so that folded words are still in the CPU's cache when they are summed.
        at_once = max(1, _WORDS_AT_ONCE // len(self._factors))
        folded = np.empty((min(at_once, len(sums)), len(self._factors)), dtype=np.uint64)
        for begin in range(0, len(sums), at_once):
            part_BW = words_BW[begin : begin + at_once]
            # Folded, because the highest bit of a word survives any odd factor: two such flips would cancel out.
            folded_BW = np.right_shift(part_BW, _FOLD, out=folded[: len(part_BW)])
            folded_BW ^= part_BW
            sums[begin : begin + at_once] += np.einsum("bw,w->b", folded_BW, self._factors)
        checks: Words = np.maximum(sums, np.uint64(1))
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


class MappedFile:
    """An existing file of fixed size, read through a memory map and written by `pwrite`; usable after fork.

    Raises:
        OSError: it cannot be opened, or has a different size.
    """

    fd = -1

    def __init__(self, path: Path, size_bytes: int, *, read_only: bool) -> None:
        self.fd = os.open(path, os.O_RDONLY if read_only else os.O_RDWR)
        self.size_bytes = size_bytes
        self.check_size()
        # A shared map, which is mmap's default: it shows what other processes write.
        self.map = mmap.mmap(self.fd, size_bytes, prot=mmap.PROT_READ)

    def check_size(self) -> None:
        """Raise OSError if the file was cut: reading a map past the end of its file kills the process (SIGBUS)."""
        found = os.fstat(self.fd).st_size
        if found != self.size_bytes:
            raise OSError(f"a cache file has {found} bytes where it should have {self.size_bytes}")

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
        path, read_only: as in `MappedFile`.
        fields: fields of a record.
        capacity: number of records.
        digest: digest of the store, which enters every checksum.
    """

    def __init__(
        self, path: Path, fields: Mapping[str, ArraySpec], capacity: int, *, digest: str, read_only: bool
    ) -> None:
        self._type = record_type(fields)
        super().__init__(path, capacity * self._type.itemsize, read_only=read_only)
        self._records = np.frombuffer(self.map, dtype=self._type)
        self._specs = fields
        self._checks = {name: RowChecks(_words(spec), derive_seed(digest, name)) for name, spec in fields.items()}

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
            right = sums == self._checks[name].of(words_BW, checks)
            damaged |= ~right & (sums != 0)
            valid &= right
            arrays[name] = _shaped(words_BW, spec)
        return arrays, valid, damaged & ~valid

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
            records[f"check {name}"] = self._checks[name].of(words_BW, checks)
        return records.view(np.uint8).reshape(len(keys), self._type.itemsize)

    def write_records(self, slots: NDArray[np.int64], block: NDArray[np.uint8]) -> None:
        """Write packed records into ascending slots, consecutive ones with one call. Raises OSError."""
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
