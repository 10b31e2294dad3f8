"""Which functions take more than one IEEE operation and still give the same bits in NumPy and torch?

Selection and logarithms: libraries break ties and round their logarithms each in its own way.
"""

from __future__ import annotations

import numpy as np

from softlabels.encodings.arrays import Array, Ops

_LARGEST_F32_BITS = 0x7FFFFFFF


def nearest_zero(ops: Ops, x_BC: Array, count: int) -> Array:
    """Ids of the `count` entries nearest 0 in each row, nearest first, ties by the lower id; int64 [B, count].

    Args:
        ops: what `x_BC` is an array of.
        x_BC: float32, none NaN. Rows of logits with their largest at 0 give their largest entries.
        count: at most as many as there are columns, of which there are fewer than 2³¹.
    """
    return _ids_of_smallest(ops, ops.bits(x_BC, "i4") & _LARGEST_F32_BITS, count)


def largest(ops: Ops, x_BC: Array, count: int) -> Array:
    """Ids of the `count` largest of non-negative float32 entries, largest first, ties by the lower id."""
    return _ids_of_smallest(ops, _LARGEST_F32_BITS - (ops.bits(x_BC, "i4") & _LARGEST_F32_BITS), count)


def _ids_of_smallest(ops: Ops, bits_BC: Array, count: int) -> Array:
    # A non-negative float's bits, read as an integer, are in its order; with the id below them every key is distinct,
    # so that which of two equal entries wins does not depend on a library's selection algorithm.
    classes = bits_BC.shape[-1]
    ids_C = ops.constant(np.arange(classes), "i8", bits_BC)
    keys_BC = ops.cast(bits_BC, "i8") * (1 << 32) + ids_C
    return ops.first(keys_BC, count) & 0xFFFFFFFF


def natural_log(ops: Ops, x: Array) -> Array:
    """ln x of float32 ≥ 0 within 2 units in the last place, to the same bits in every library; ln 0 is -inf.

    x = m 2^e with m in [√½, √2); ln m = 2 artanh(s), s = (m-1)/(m+1), by its series to s⁹: |s| ≤ 0.172, so the first
    term left out is below 2⁻²⁸. Source: Abramowitz and Stegun 1964, 4.1.27. e ln 2 is added in two parts (Cody and
    Waite 1980), the larger exact.
    """
    tiny = x < 2.0**-126
    bits = ops.bits(x * ops.where(tiny, ops.constant(2.0**24, "f4", x), ops.constant(1.0, "f4", x)), "i4")
    exponent = (bits >> 23) - 127
    m = ops.bits((bits & 0x7FFFFF) | 0x3F800000, "f4")
    high = m > 1.4142135
    m = ops.where(high, m * 0.5, m)
    e = ops.cast(exponent + ops.cast(high, "i4") - 24 * ops.cast(tiny, "i4"), "f4")
    s = (m - 1.0) / (m + 1.0)
    t = s * s
    series = t * 0.22222222 + 0.2857142857
    series = (series * t + 0.4) * t + 0.6666666667
    log_m = s * 2.0 + s * (t * series)
    result = e * 0.693145751953125 + (e * 1.4286068203e-6 + log_m)
    return ops.where(x > 0, result, -float("inf"))
