"""Bit packing: codes of 1 to 31 bits to bytes and back, in whole-array operations.

A width is a sum of 16, 8, 4, 2 and 1; each part is a bit plane. A plane of w < 8 bits puts 8/w codes into a byte: with
n codes in the plane and s = ⌈n w / 8⌉ bytes, byte j holds codes j, j + s, j + 2s, … from its low bits up. So a plane is
unpacked by 8/w shifts of whole runs of bytes, without loops over bits. A plane of 16 bits is two of 8. Planes are
stored from wide to narrow; the widest holds a code's lowest bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from softlabels.encodings.array_ops import Array, Ops

_PLANE_BITS = (8, 4, 2, 1)


@dataclass(frozen=True, kw_only=True)
class _Plane:
    bits: int
    columns: NDArray[np.int64] | None  # None for all columns
    shift: int | NDArray[np.int32]
    count: int

    @property
    def size_bytes(self) -> int:
        return -(-self.count * self.bits // 8)


@dataclass(frozen=True)
class BitPacking:
    """Layout of one row of codes, with `widths[i]` bits for code i."""

    widths: tuple[int, ...]

    @staticmethod
    def uniform(count: int, bits: int) -> BitPacking:
        """Return the layout of `count` codes of the same width."""
        return BitPacking((bits,) * count)

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of one row of codes."""
        return sum(plane.size_bytes for plane in self._planes)

    @cached_property
    def _planes(self) -> Sequence[_Plane]:
        widths = np.array(self.widths, dtype=np.int64)
        planes: list[_Plane] = []
        done = np.zeros(len(widths), dtype=np.int32)
        for bits in (8, 8, *_PLANE_BITS):
            # Whole bytes as long as 8 or more bits are left: 18 is 8 + 8 + 2, 31 is 8 + 8 + 8 + 4 + 2 + 1.
            left = widths - done
            columns = np.flatnonzero(left >= 8 if bits == 8 else left & bits)
            if not len(columns):
                continue
            shift, same = done[columns], len(columns) == len(widths)
            one_shift = int(shift[0]) if (shift == shift[0]).all() else shift
            planes.append(_Plane(bits=bits, columns=None if same else columns, shift=one_shift, count=len(columns)))
            done[columns] += bits
        return planes

    def pack(self, ops: Ops, codes_BN: Array) -> Array:
        """Pack codes (int32, or uint8 if no width is above 8), each below 2^width, to uint8 [B, size_bytes]."""
        parts = []
        for plane in self._planes:
            codes = codes_BN if plane.columns is None else codes_BN[:, ops.constant(plane.columns, "i8", codes_BN)]
            if isinstance(plane.shift, int):
                codes = codes >> plane.shift if plane.shift else codes
            else:
                codes = codes >> ops.constant(plane.shift, "i4", codes_BN)
            parts.append(_pack_plane(ops, codes, plane))
        return ops.concat(parts) if len(parts) != 1 else parts[0]

    def unpack(self, ops: Ops, bytes_BS: Array) -> Array:
        """Unpack bytes to codes, [B, N]: uint8 if no width is above 8, else int32."""
        kind = "u1" if max(self.widths, default=0) <= 8 else "i4"
        whole: Array = None
        start = 0
        for plane in self._planes:
            codes = _unpack_plane(ops, bytes_BS[:, start : start + plane.size_bytes], plane)
            start += plane.size_bytes
            codes = codes if kind == "u1" else ops.cast(codes, kind)
            if isinstance(plane.shift, int):
                codes = codes << plane.shift if plane.shift else codes
            else:
                codes = codes << ops.constant(plane.shift, kind, codes)
            if plane.columns is None:
                whole = codes if whole is None else whole | codes
                continue
            if whole is None:
                whole = ops.zeros((len(bytes_BS), len(self.widths)), kind, bytes_BS)
            whole[:, ops.constant(plane.columns, "i8", bytes_BS)] |= codes
        return ops.zeros((len(bytes_BS), len(self.widths)), kind, bytes_BS) if whole is None else whole


def _pack_plane(ops: Ops, codes_BN: Array, plane: _Plane) -> Array:
    if plane.bits == 8:
        return ops.cast(codes_BN & 0xFF, "u1")
    codes_BN = ops.cast(codes_BN & ((1 << plane.bits) - 1), "u1")
    size = plane.size_bytes
    packed = codes_BN[:, :size] | 0  # a copy, changed in place below
    for part in range(1, 8 // plane.bits):
        # Runs at the end are shorter, or empty, where the codes do not fill the bytes: the bits left over stay 0.
        run = codes_BN[:, part * size : (part + 1) * size]
        packed[:, : run.shape[-1]] |= run << (part * plane.bits)
    return packed


def _unpack_plane(ops: Ops, bytes_BS: Array, plane: _Plane) -> Array:
    if plane.bits == 8:
        # A view of the input, which `unpack` must not change: it casts to int32 or copies into zeros before it adds
        # other planes, except where all widths are 8, and then there are no others.
        return bytes_BS
    mask = (1 << plane.bits) - 1
    runs = [(bytes_BS >> (part * plane.bits)) & mask for part in range(8 // plane.bits)]
    return ops.concat(runs)[:, : plane.count]
