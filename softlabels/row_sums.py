"""CRC-32C of rows and of rows joined together: the checksum of stored rows, replies and epoch frames.

A CRC is linear: the CRC of two byte strings joined follows from the CRCs of both and the length of the second. So the
checksum of a batch follows from sums that were computed when its rows were written, without reading the rows again,
and a receiver that computes the CRC of the bytes it has compares them with what the teacher's job wrote.

CRC-32C (Castagnoli) detects every change of up to three bits and every burst of up to 32 bits in up to 256 MiB; of
other changes it misses one in 2³². Source: RFC 3720, appendix B.4; zlib's `crc32_combine` for the joining.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from crc32c import crc32c as crc32c
from numpy.typing import NDArray

_POLYNOMIAL = 0x82F63B78
"""Castagnoli's polynomial, bits reversed."""

_JOINED_AT_ONCE = 256
"""Rows whose sums are joined in one step: a usual batch. Eight bits a CRC byte, so tables of 128 bytes a row."""

_MOST_TABLE_ROWS = 1 << 13
"""Sums, over all arrays, that `join_arrays` keeps a table for: 1 MiB."""

_MASK_STEP = np.uint32(0x9E3779B1)
"""Odd, so that the masks of any 2³² consecutive rows differ."""

_SHORT_ROW_BYTES = 128
"""Rows up to this size are summed column by column, where a call for each row would cost more."""

_Operator: TypeAlias = NDArray[np.uint32]
"""Linear map of CRCs, [4, 256]: the image of a CRC is the XOR of one entry for each of its bytes."""


def join_sums(sums: NDArray[np.uint32], row_bytes: int) -> int:
    """Return the CRC-32C of rows joined together, from the CRC of each.

    Args:
        sums: [R] CRC-32C of each row, in order.
        row_bytes: size of every row.
    """
    while len(sums) > 1:
        width = min(len(sums), _JOINED_AT_ONCE)
        # The CRC of nothing is 0, and stays 0 whatever is appended: zeros in front change nothing.
        missing = -len(sums) % width
        padded = np.concatenate([np.zeros(missing, dtype=np.uint32), sums]) if missing else sums
        images = _images(width, ((0, row_bytes),), 1) * _bits(padded).reshape(-1, 32 * width)
        sums = np.bitwise_xor.reduce(images, axis=1)
        row_bytes *= width
    return int(sums[0]) if len(sums) else 0


def join_arrays(sums: NDArray[np.uint32], arrays: tuple[tuple[int, int], ...]) -> int:
    """Return the CRC-32C of whole arrays one after another, from the CRC of each of their rows.

    Args:
        sums: [R, S] CRC-32C of each row in each of a store's arrays.
        arrays: column of `sums` and bytes of a row, for each array in the order of the bytes.
    """
    rows, columns = sums.shape
    if rows * columns <= _MOST_TABLE_ROWS:
        return int(np.bitwise_xor.reduce(_images(rows, arrays, columns) * _bits(sums)))
    joined = 0
    for column, row_bytes in arrays:
        joined = append_sum(joined, join_sums(np.ascontiguousarray(sums[:, column]), row_bytes), rows * row_bytes)
    return joined


def append_arrays(
    before: int, arrays: Mapping[str, NDArray[Any]], sums: NDArray[np.uint32] | None, names: Sequence[str]
) -> int:
    """Return the CRC-32C of bytes and arrays that follow them, from sums that were kept where there are any.

    Args:
        before: CRC-32C of what precedes the arrays.
        arrays: the arrays by name, in the order of their bytes.
        sums: [R, S] CRC-32C of the rows of stored arrays; None to compute all from the arrays' bytes.
        names: names of the columns of `sums`.
    """
    if sums is not None and arrays.keys() <= set(names):
        order = tuple((names.index(name), array.nbytes // max(1, len(array))) for name, array in arrays.items())
        return append_sum(before, join_arrays(sums, order), sum(array.nbytes for array in arrays.values()))
    for name, array in arrays.items():
        if sums is None or name not in names:
            before = crc32c(bytes_of(array), before)
            continue
        kept = np.ascontiguousarray(sums[:, names.index(name)])
        before = append_sum(before, join_sums(kept, array.nbytes // max(1, len(array))), array.nbytes)
    return before


def append_sum(first: int, second: int, second_bytes: int) -> int:
    """Return the CRC-32C of two byte strings joined, from the CRC of both and the size of the second."""
    one, two, three, four = _shift(second_bytes)
    # Scalar look-ups: a vector of one element would take ten times as long.
    return int(one[first & 255] ^ two[first >> 8 & 255] ^ three[first >> 16 & 255] ^ four[first >> 24]) ^ second


def sums_of_rows(rows: NDArray[Any]) -> NDArray[np.uint32]:
    """Return the CRC-32C of each row of an array [R, ...], as [R], over the row's little-endian bytes in C order."""
    packed = np.ascontiguousarray(rows, rows.dtype.newbyteorder("<"))
    flat = packed.reshape(len(packed), -1).view(np.uint8) if packed.size else np.empty((len(packed), 0), np.uint8)
    if flat.shape[1] <= _SHORT_ROW_BYTES:
        return _sums_of_columns(flat)
    # An array yields its rows faster than slices of a view are made, a third of the time of short rows.
    rows_of: Any = flat
    return np.fromiter(map(crc32c, rows_of), np.uint32, len(flat))


def sum_of_array(array: NDArray[Any]) -> int:
    """Return the CRC-32C of an array's bytes, little-endian in C order."""
    return crc32c(bytes_of(array))


def bytes_of(array: NDArray[Any]) -> memoryview:
    """Return an array's bytes, little-endian and in C order, without a copy if they are so already."""
    packed = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return packed.reshape(-1).view(np.uint8).data


def masks(salts: NDArray[np.uint32] | np.uint32, rows: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Return what the sums of these rows are XORed with where they are stored, [R].

    A stored sum so belongs to one row number of one shard: a row and its sum that come from another row, or from
    another version of the shard, do not fit.

    Args:
        salts: salt of each row's shard, [R] or one for all.
        rows: [R] row numbers of the store.
    """
    return rows.astype(np.uint32) * _MASK_STEP + salts


def _bits(sums: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Return the bits of CRCs, lowest first, [32 × CRCs]."""
    return np.unpackbits(np.ascontiguousarray(sums, "<u4").reshape(-1).view(np.uint8), bitorder="little")


@lru_cache(maxsize=16)
def _images(rows: int, arrays: tuple[tuple[int, int], ...], columns: int) -> NDArray[np.uint32]:
    """Return what each bit of each sum becomes once the bytes behind its row are appended, [rows × columns × 32].

    The XOR over all set bits is the CRC of the whole. A look-up of bytes would take as long and 32 times the memory.
    """
    table = np.zeros((rows, columns, 32), dtype=np.uint32)
    after = 0
    for column, row_bytes in reversed(arrays):
        # Of the last rows of this array, twice as many each time.
        images = _apply(_shift(after), np.uint32(1) << np.arange(32, dtype=np.uint32))[None]
        while len(images) < rows:
            images = np.concatenate([_apply(_shift(len(images) * row_bytes), images), images])
        table[:, column] ^= images[len(images) - rows :]
        after += rows * row_bytes
    return table.reshape(-1)


@lru_cache(maxsize=256)
def _shift(count: int) -> _Operator:
    """Return the map that a CRC goes through when `count` bytes with CRC 0 are appended."""
    if count == 0:
        return _bytes_in_place()
    half = _shift(count >> 1)
    both = _apply(half, half)
    return _apply(_shift_one(), both) if count & 1 else both


@lru_cache(maxsize=1)
def _shift_one() -> _Operator:
    values = _bytes_in_place()
    for _ in range(8):
        values = (values >> np.uint32(1)) ^ (values & np.uint32(1)) * np.uint32(_POLYNOMIAL)
    return values


def _bytes_in_place() -> _Operator:
    """Return the map that changes nothing."""
    table: _Operator = np.arange(256, dtype=np.uint32) << (8 * np.arange(4, dtype=np.uint32))[:, None]
    return table


def _apply(operator: _Operator, crcs: NDArray[np.uint32]) -> NDArray[np.uint32]:
    byte = np.uint32(255)
    low = operator[0][crcs & byte] ^ operator[1][(crcs >> np.uint32(8)) & byte]
    mapped: NDArray[np.uint32] = low ^ operator[2][(crcs >> np.uint32(16)) & byte] ^ operator[3][crcs >> np.uint32(24)]
    return mapped


def _sums_of_columns(flat: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Return the CRC of each row, [R, bytes], one byte of all rows at a time."""
    table = _shift_one()[0]
    sums = np.full(len(flat), 0xFFFFFFFF, dtype=np.uint32)
    for column in flat.T:
        sums = table[(sums ^ column) & np.uint32(255)] ^ (sums >> np.uint32(8))
    finished: NDArray[np.uint32] = np.invert(sums)
    return finished
