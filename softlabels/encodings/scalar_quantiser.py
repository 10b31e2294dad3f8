"""Scalar quantisers: uniform codes over a range, and levels for normally distributed values (`levels_of`).

Levels are integer multiples of 1/128 standard deviation, so sums of levels times an integer basis are exact in float32,
the same bits in every library. With 1 to 4 bits they are the least-squares levels of Max 1960, table I. Above that they
are uniform out to 4.4 to 8 deviations: the coefficients of a classifier's rows have heavier tails than a normal
distribution, and clipping them costs more than a finer step saves.
"""

from __future__ import annotations

from functools import cache
from math import erf, exp, pi, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.encodings.array_ops import Array, Ops

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
    inverse = ops.xp.where(step_B1 == 0, 0.0, 1.0 / ops.xp.where(step_B1 == 0, 1.0, step_B1))
    return ops.cast(ops.xp.clip(ops.xp.round((z - offset) * inverse), 0, levels), kind)
