"""CRC-32C of rows and of rows joined together: the checksum of stored rows, replies and epoch frames.

A CRC is linear: the CRC of two byte strings joined follows from the CRCs of both and the length of the second. So the
checksum of a batch follows from sums that were computed when its rows were written, without reading the rows again,
and a receiver that computes the CRC of the bytes it has compares them with what the teacher's job wrote.

CRC-32C (Castagnoli) detects every change of up to three bits and every burst of up to 32 bits in up to 256 MiB; of
other changes it misses one in 2³². Source: RFC 3720, appendix B.4; zlib's `crc32_combine` for the joining.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from crc32c import crc32c as crc32c
from numpy.typing import NDArray

_POLYNOMIAL = 0x82F63B78
"""Castagnoli's polynomial, bits reversed."""

_JOINED_AT_ONCE = 256
"""Sums joined by one table of 1 MiB, so that a usual batch takes one step: 17 µs, where two steps of 64 take 27."""

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
        missing = -len(sums) % _JOINED_AT_ONCE
        if len(sums) < _JOINED_AT_ONCE:
            blocks = sums.reshape(1, -1)
        else:
            # The CRC of nothing is 0, and stays 0 whatever is appended: zeros in front change nothing.
            padded = sums if not missing else np.concatenate([np.zeros(missing, dtype=np.uint32), sums])
            blocks = padded.reshape(-1, _JOINED_AT_ONCE)
        sums = _join_blocks(blocks, row_bytes)
        row_bytes *= _JOINED_AT_ONCE
    return int(sums[0]) if len(sums) else 0


def append_sum(first: int, second: int, second_bytes: int) -> int:
    """Return the CRC-32C of two byte strings joined, from the CRC of both and the size of the second."""
    one, two, three, four = _shift(second_bytes)
    # Scalar look-ups: a vector of one element would take ten times as long.
    return int(one[first & 255] ^ two[first >> 8 & 255] ^ three[first >> 16 & 255] ^ four[first >> 24]) ^ second


def sums_of_rows(rows: NDArray[Any]) -> NDArray[np.uint32]:
    """Return the CRC-32C of each row of an array [R, ...], as [R], over the row's little-endian bytes in C order."""
    packed = np.ascontiguousarray(rows, rows.dtype.newbyteorder("<"))
    flat = packed.reshape(len(packed), -1).view(np.uint8) if packed.size else np.empty((len(packed), 0), np.uint8)
    row_bytes = flat.shape[1]
    if row_bytes <= _SHORT_ROW_BYTES:
        return _sums_of_columns(flat)
    view = flat.reshape(-1).data
    starts = range(0, len(flat) * row_bytes, row_bytes)
    return np.fromiter((crc32c(view[at : at + row_bytes]) for at in starts), np.uint32, len(flat))


def sum_of_array(array: NDArray[Any]) -> int:
    """Return the CRC-32C of an array's bytes, little-endian in C order."""
    packed = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return crc32c(packed.reshape(-1).view(np.uint8).data)


def masks(salts: NDArray[np.uint32] | np.uint32, rows: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Return what the sums of these rows are XORed with where they are stored, [R].

    A stored sum so belongs to one row number of one shard: a row and its sum that come from another row, or from
    another version of the shard, do not fit.

    Args:
        salts: salt of each row's shard, [R] or one for all.
        rows: [R] row numbers of the store.
    """
    return rows.astype(np.uint32) * _MASK_STEP + salts


def _join_blocks(blocks: NDArray[np.uint32], row_bytes: int) -> NDArray[np.uint32]:
    count, width = blocks.shape
    table = _block_table(row_bytes)[_JOINED_AT_ONCE - width :].reshape(-1)
    # Little-endian bytes of each CRC select one entry each from the tables of their position.
    index = np.ascontiguousarray(blocks, "<u4").view(np.uint8).reshape(count, 4 * width) + _block_offsets()[: 4 * width]
    joined: NDArray[np.uint32] = np.bitwise_xor.reduce(table.take(index), axis=1)
    return joined


@lru_cache(maxsize=1)
def _block_offsets() -> NDArray[np.intp]:
    return np.arange(4 * _JOINED_AT_ONCE, dtype=np.intp) * 256


@lru_cache(maxsize=32)
def _block_table(row_bytes: int) -> NDArray[np.uint32]:
    """Return [_JOINED_AT_ONCE, 4, 256]: for each place in a block, the map that appends the rows after it."""
    table = np.empty((_JOINED_AT_ONCE, 4, 256), dtype=np.uint32)
    table[-1] = np.arange(256, dtype=np.uint32) << (8 * np.arange(4, dtype=np.uint32))[:, None]
    step = _shift(row_bytes)
    for place in range(_JOINED_AT_ONCE - 2, -1, -1):
        table[place] = _apply(step, table[place + 1])
    return table


@lru_cache(maxsize=256)
def _shift(count: int) -> _Operator:
    """Return the map that a CRC goes through when `count` bytes with CRC 0 are appended."""
    if count == 0:
        return np.arange(256, dtype=np.uint32) << (8 * np.arange(4, dtype=np.uint32))[:, None]
    half = _shift(count >> 1)
    both = _apply(half, half)
    return _apply(_shift_one(), both) if count & 1 else both


@lru_cache(maxsize=1)
def _shift_one() -> _Operator:
    values = np.arange(256, dtype=np.uint32) << (8 * np.arange(4, dtype=np.uint32))[:, None]
    for _ in range(8):
        values = (values >> np.uint32(1)) ^ np.where(values & np.uint32(1), np.uint32(_POLYNOMIAL), np.uint32(0))
    return values


def _apply(operator: _Operator, crcs: NDArray[np.uint32]) -> NDArray[np.uint32]:
    byte = np.uint32(255)
    low = operator[0][crcs & byte] ^ operator[1][(crcs >> np.uint32(8)) & byte]
    return low ^ operator[2][(crcs >> np.uint32(16)) & byte] ^ operator[3][crcs >> np.uint32(24)]


def _sums_of_columns(flat: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Return the CRC of each row, [R, bytes], one byte of all rows at a time."""
    table = _shift_one()[0]
    sums = np.full(len(flat), 0xFFFFFFFF, dtype=np.uint32)
    for column in flat.T:
        sums = table[(sums ^ column) & np.uint32(255)] ^ (sums >> np.uint32(8))
    finished: NDArray[np.uint32] = np.invert(sums)
    return finished
