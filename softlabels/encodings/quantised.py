"""Quantised rows: every class in 2 to 8 bits, and the largest few (the head) with 8 bits more. Names `q8` … `q2`.

Row, little-endian: lo (f16) · step (f16) · ids of the head (K codes of ⌈log₂ C⌉ bits) · high bytes of the head (K) ·
codes (C of `bits` bits), packed as in `bit_packing`. A class outside the head decodes to lo + code x step, one of the
head to (high x 2^bits + code) x lo / (2^(bits+8) - 1): its code holds the low bits of its value.

Bounds, where z is a logit (row maximum 0), or -FLOOR if it is below that: outside the head z decodes within
step/2 + 2⁻²⁰|lo| if z ≥ lo, and to lo otherwise, with step at most 1.003 (largest outside the head - lo)/(2^bits - 1) +
2⁻²⁴; in the head within 2^-(bits+8)|lo|. Where nothing is clipped, KL ≤ step²/(8 T²) (Hoeffding's lemma). lo is the
row's minimum, but not below -FLOOR and, under 8 bits, not further below the mean outside the head than `_LOADING`
standard deviations: a range that only a few improbable classes need costs all others resolution. Refused: NaN, ±inf.

Also the levels that `basis` codes its normally distributed coefficients with (`levels_of`): integer multiples of 1/128
standard deviation, so that sums of levels times an integer basis are exact in float32, the same bits in every library.
With 1 to 4 bits they are the least-squares levels of Max 1960, table I. Above that they are uniform out to 4.4
to 8 deviations: the coefficients of a classifier's rows have heavier tails than a normal distribution, and clipping
them costs more than a finer step saves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, cached_property
from math import erf, exp, pi, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.encodings.array_ops import Array, Ops, top_k_shifted
from softlabels.encodings.base import PackedRows, shifted_rows
from softlabels.encodings.bit_packing import BitPacking
from softlabels.errors import UnknownEncodingError

FLOOR = 96.0
"""Logits further than this below the maximum are kept at this distance: e^(-96/4) is 4e-11 of a class at T = 4."""

UNITS = 128
"""Levels count in 1/UNITS of a standard deviation."""

WIDEST = 9
"""Bits of the widest code with levels."""

TABLE = 1 << 11
"""Size of `code_table`: it distinguishes integer values from -1024 to 1023."""

# Positive levels in units of 1/128: Max 1960 gives 0.7979; 0.4528, 1.510; 0.2451, 0.7560, 1.344, 2.152; 0.1284, …
_OPTIMAL = {
    1: (102,),
    2: (58, 193),
    3: (31, 97, 172, 275),
    4: (16, 50, 84, 121, 161, 207, 265, 350),
}
# Half a step in units of 1/128; uniform levels are the odd multiples of it.
_HALF_STEP = {5: 14, 6: 9, 7: 6, 8: 3, 9: 2}

# Where the range is cut, in standard deviations below the mean outside the head: chosen on rows of EfficientNet-Lite0
# for the least sum of KL at T = 1 and T = 4. At 8 bits a cut gains nothing.
_LOADING = {2: 1.2, 3: 1.8, 4: 2.4, 5: 2.8, 6: 3.3, 7: 3.7}
_HEADER_BYTES = 4
# float16 rounds by up to 2⁻¹¹ relative, and by 2⁻²⁵ absolute near 0: so much wider, a range still covers its values.
_WIDER, _HALF_OF_SMALLEST = 1.001, 2.0**-25


@dataclass(frozen=True, kw_only=True)
class Quantised(PackedRows):
    """Uniform steps over each row's own range, and a head of finer values.

    Attributes:
        classes: C, at least 2.
        bits: width of a code, 2 to 8.
        head: number of largest classes kept with 8 bits more, 1 to C - 1.
    """

    retemperable = True  # every class is present; the error shrinks as T grows
    param_names = ("head",)

    classes: int
    bits: int
    head: int
    name: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"q{self.bits}")
        if self.bits not in range(2, 9) or not 1 <= self.head < self.classes or self.head > 65535:
            raise UnknownEncodingError(
                f"a quantised row of {self.classes} classes takes 2 to 8 bits and a head of 1 to {self.classes - 1} "
                f"classes (65535 at most), not bits = {self.bits} and head = {self.head}"
            )

    @property
    def size_bytes(self) -> int:
        """Bytes of one row."""
        return _HEADER_BYTES + self._ids.size_bytes + self.head + self._codes.size_bytes

    @cached_property
    def _ids(self) -> BitPacking:
        return BitPacking.uniform(self.head, id_bits(self.classes))

    @cached_property
    def _codes(self) -> BitPacking:
        return BitPacking.uniform(self.classes, self.bits)

    def _pack(self, ops: Ops, logits_BC: Array, keys_B: NDArray[np.uint64] | None) -> Array:
        z = shifted_rows(ops, logits_BC, name=self.name)
        z = ops.xp.clip(z, -FLOOR, 0.0)
        nearest = top_k_shifted(ops, z, self.head + 1)
        ids_BK = nearest[:, : self.head]
        top_B1 = ops.gather(z, nearest[:, self.head :])
        lo16 = ops.cast(self._lowest(ops, z, ids_BK) * _WIDER, "f2")
        lo_B1 = ops.cast(lo16, "f4")
        levels = (1 << self.bits) - 1
        step16 = ops.cast((top_B1 - lo_B1) * (_WIDER / levels) + _HALF_OF_SMALLEST, "f2")
        codes_BC = quantise(ops, z, lo_B1, ops.cast(step16, "f4"), levels)
        head_step = head_steps(ops, lo_B1, self.bits + 8)
        fine_BK = quantise(ops, ops.gather(z, ids_BK), 0.0, head_step, (1 << (self.bits + 8)) - 1, kind="i4")
        ops.scatter(codes_BC, ids_BK, ops.cast(fine_BK & levels, "u1"))
        return ops.concat(
            [
                ops.bits(lo16, "u1"),
                ops.bits(step16, "u1"),
                self._ids.pack(ops, ops.cast(ids_BK, "i4")),
                ops.cast(fine_BK >> self.bits, "u1"),
                self._codes.pack(ops, codes_BC),
            ]
        )

    def _unpack(self, ops: Ops, bytes_BS: Array) -> Array:
        header = ops.cast(ops.bits(bytes_BS[:, :_HEADER_BYTES], "f2"), "f4")
        lo_B1, step_B1 = header[:, :1], header[:, 1:]
        at = _HEADER_BYTES + self._ids.size_bytes
        ids_BK = ops.cast(self._ids.unpack(ops, bytes_BS[:, _HEADER_BYTES:at]), "i8")
        high_BK = ops.cast(bytes_BS[:, at : at + self.head], "i4")
        codes_BC = self._codes.unpack(ops, bytes_BS[:, at + self.head :])
        z = ops.cast(codes_BC, "f4")
        z *= step_B1
        z += lo_B1
        fine_BK = high_BK << self.bits | ops.cast(ops.gather(codes_BC, ids_BK), "i4")
        ops.scatter(z, ids_BK, ops.cast(fine_BK, "f4") * head_steps(ops, lo_B1, self.bits + 8))
        return z

    def _lowest(self, ops: Ops, z: Array, ids_BK: Array) -> Array:
        lowest_B1 = ops.min(z)
        if self.bits == 8:
            return lowest_B1
        # In float64, so that the order of additions does not change the result.
        wide, head = ops.cast(z, "f8"), ops.cast(ops.gather(z, ids_BK), "f8")
        count = self.classes - self.head
        mean_B1 = (ops.sum(wide) - ops.sum(head)) / count
        square_B1 = (ops.sum(wide * wide) - ops.sum(head * head)) / count
        # Clipped, because rounding can make the difference negative where values are nearly equal.
        spread_B1 = ops.xp.clip(square_B1 - mean_B1 * mean_B1, 0.0, None) ** 0.5
        return ops.xp.maximum(lowest_B1, ops.cast(mean_B1 - _LOADING[self.bits] * spread_B1, "f4"))


@cache
def levels_of(bits: int) -> NDArray[np.int32]:
    """Return the 2^bits values of codes 0, 1, …, ascending."""
    if bits in _OPTIMAL:
        positive = np.array(_OPTIMAL[bits], dtype=np.int32)
    else:
        positive = (2 * np.arange(1 << (bits - 1), dtype=np.int32) + 1) * _HALF_STEP[bits]
    return np.concatenate([-positive[::-1], positive])


@cache
def level_table() -> NDArray[np.int32]:
    """Return the levels of all widths in one array: code c of b bits is at 2^b - 2 + c."""
    return np.concatenate([levels_of(bits) for bits in range(1, WIDEST + 1)])


@cache
def code_table() -> NDArray[np.int32]:
    """Return [WIDEST + 1, TABLE]: the code of b bits nearest to the value i - 1024, ties upwards; row 0 is unused."""
    values = np.arange(TABLE) - TABLE // 2
    table = np.zeros((WIDEST + 1, TABLE), dtype=np.int32)
    for bits in range(1, WIDEST + 1):
        levels = levels_of(bits)
        table[bits] = np.searchsorted((levels[1:] + levels[:-1]) / 2, values, side="right")
    return table


@cache
def distortion(bits: int) -> float:
    """Return the mean squared error of a standard normal variable kept in so many bits; 1 for 0 bits."""
    if bits == 0:
        return 1.0
    levels = levels_of(bits) / UNITS
    edges = [-np.inf, *((levels[1:] + levels[:-1]) / 2), np.inf]
    cells = zip(levels, edges[:-1], edges[1:], strict=True)
    return float(sum(_cell_error(float(level), float(a), float(b)) for level, a, b in cells))


def _cell_error(level: float, low: float, high: float) -> float:
    # ∫ (x - level)² φ(x) dx over the cell, from the normal distribution's first three partial moments.
    def density(x: float) -> float:
        return exp(-x * x / 2) / sqrt(2 * pi) if np.isfinite(x) else 0.0

    def share(x: float) -> float:
        return 0.5 * (1 + erf(x / sqrt(2)))

    mass = share(high) - share(low)
    first = density(low) - density(high)
    at_low = low * density(low) if np.isfinite(low) else 0.0
    at_high = high * density(high) if np.isfinite(high) else 0.0
    return mass + at_low - at_high - 2 * level * first + level * level * mass


def id_bits(classes: int) -> int:
    """Return the bits of a class id."""
    return max(1, (classes - 1).bit_length())


def head_steps(ops: Ops, lo_B1: Array, bits: int) -> Array:
    """Return the (negative) step of `bits`-bit codes that count from 0 down to `lo`."""
    return lo_B1 * ops.constant(1.0 / ((1 << bits) - 1), "f4", lo_B1)


def quantise(ops: Ops, z: Array, offset: Any, step_B1: Array, levels: int, *, kind: str = "u1") -> Array:
    """Return the codes of (z - offset) / step, rounded and clipped to 0…levels; 0 if the step is 0."""
    # The inner `where` keeps NumPy from dividing by 0, of which it would warn.
    inverse = ops.xp.where(step_B1 == 0, 0.0, 1.0 / ops.xp.where(step_B1 == 0, 1.0, step_B1))
    return ops.cast(ops.xp.clip(ops.round((z - offset) * inverse), 0, levels), kind)
