"""Which array operations do encodings need, and how do NumPy and torch each do them?

An encoding's steps are written once, over `Ops`; two implementations stand behind it, so both libraries take the same
steps in the same order. Everything elementwise is one IEEE operation at a time (no fused multiply-add, no library
logarithm), which is what makes decoded bits equal. Torch is imported only when a tensor comes in.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

if TYPE_CHECKING:
    import torch

Array = Any
"""A NumPy array or a torch tensor; each function takes and gives the kind that its `Ops` is for."""


class Ops(Protocol):
    """The operations; `cast` names are NumPy's without the byte order: f2, f4, f8, u1, i4, i8, b1."""

    def cast(self, x: Array, kind: str) -> Array:
        """To another element type, always a new contiguous array when the type changes."""
        ...

    def constant(self, x: Any, kind: str, like: Array) -> Array:
        """A NumPy constant where `like` lives."""
        ...

    def zeros(self, shape: tuple[int, ...], kind: str, like: Array) -> Array:
        """Zeros where `like` lives."""
        ...

    def bits(self, x: Array, kind: str) -> Array:
        """The same bytes read as another element type; a contiguous copy is made where needed."""
        ...

    def max(self, x: Array) -> Array:
        """Largest of each row, [B, 1]; NaN if there is one."""
        ...

    def min(self, x: Array) -> Array:
        """Smallest of each row, [B, 1]; NaN if there is one."""
        ...

    def sum(self, x: Array) -> Array:
        """Sum of each row, [B, 1]."""
        ...

    def cumsum(self, x: Array) -> Array:
        """Running sums along each row."""
        ...

    def clip(self, x: Array, low: Any, high: Any) -> Array:
        """Between two scalars."""
        ...

    def maximum(self, x: Array, y: Array) -> Array:
        """The larger, elementwise."""
        ...

    def where(self, condition: Array, x: Any, y: Any) -> Array:
        """One or the other, elementwise."""
        ...

    def round(self, x: Array) -> Array:
        """To the nearest whole number, ties to even."""
        ...

    def floor(self, x: Array) -> Array:
        """To the next whole number below."""
        ...

    def exp(self, x: Array) -> Array:
        """Of each element. Encoders only: libraries differ in the last bit."""
        ...

    def isfinite(self, x: Array) -> Array:
        """Neither NaN nor infinite."""
        ...

    def concat(self, parts: list[Array]) -> Array:
        """Columns side by side."""
        ...

    def gather(self, x: Array, ids_BK: Array) -> Array:
        """x[b, ids[b, k]]."""
        ...

    def scatter(self, x: Array, ids_BK: Array, values_BK: Array) -> None:
        """x[b, ids[b, k]] = values[b, k], in place."""
        ...

    def count(self, ids_BN: Array, classes: int) -> Array:
        """How often each class stands in a row of ids, int32 [B, classes]."""
        ...

    def first(self, keys_BC: Array, count: int) -> Array:
        """The `count` smallest int64 keys of each row, ascending."""
        ...

    def rank(self, sorted_BC: Array, values_BN: Array) -> Array:
        """How many entries of each ascending row are at most the value, [B, N]."""
        ...

    def sort(self, x: Array) -> Array:
        """Ascending along each row."""
        ...

    def rows_where(self, flags_B: Array) -> list[int]:
        """Positions of the rows that are flagged."""
        ...

    def positions(self, x: Array) -> Array:
        """Where the entries of the flattened array are not 0, int64."""
        ...


class _NumpyOps:
    """`Ops` over NumPy arrays: the reference."""

    def cast(self, x: Array, kind: str) -> Array:
        with np.errstate(over="ignore"):  # to infinity, as in torch; encoders look for it where it can come up
            return np.asarray(x).astype(kind)

    def constant(self, x: Any, kind: str, like: Array) -> Array:
        return np.asarray(x, dtype=kind)

    def zeros(self, shape: tuple[int, ...], kind: str, like: Array) -> Array:
        return np.zeros(shape, dtype=kind)

    def bits(self, x: Array, kind: str) -> Array:
        return np.ascontiguousarray(x).view(f"<{kind}")

    def max(self, x: Array) -> Array:
        return x.max(axis=-1, keepdims=True)

    def min(self, x: Array) -> Array:
        return x.min(axis=-1, keepdims=True)

    def sum(self, x: Array) -> Array:
        return x.sum(axis=-1, keepdims=True)

    def cumsum(self, x: Array) -> Array:
        return np.cumsum(x, axis=-1)

    def clip(self, x: Array, low: Any, high: Any) -> Array:
        return np.clip(x, low, high)

    def maximum(self, x: Array, y: Array) -> Array:
        return np.maximum(x, y)

    def where(self, condition: Array, x: Any, y: Any) -> Array:
        return np.where(condition, x, y)

    def round(self, x: Array) -> Array:
        return np.rint(x)

    def floor(self, x: Array) -> Array:
        return np.floor(x)

    def exp(self, x: Array) -> Array:
        return np.exp(x)

    def isfinite(self, x: Array) -> Array:
        return np.isfinite(x)

    def concat(self, parts: list[Array]) -> Array:
        return np.concatenate(parts, axis=-1)

    def gather(self, x: Array, ids_BK: Array) -> Array:
        return np.take_along_axis(x, ids_BK, axis=-1)

    def scatter(self, x: Array, ids_BK: Array, values_BK: Array) -> None:
        np.put_along_axis(x, ids_BK, values_BK, axis=-1)

    def count(self, ids_BN: Array, classes: int) -> Array:
        rows = len(ids_BN)
        flat = ids_BN + np.arange(rows)[:, None] * classes
        return np.bincount(flat.ravel(), minlength=rows * classes).reshape(rows, classes).astype(np.int32)

    def first(self, keys_BC: Array, count: int) -> Array:
        if count < keys_BC.shape[-1]:
            keys_BC = np.partition(keys_BC, count - 1, axis=-1)[:, :count]
        return np.sort(keys_BC, axis=-1)

    def rank(self, sorted_BC: Array, values_BN: Array) -> Array:
        pairs = zip(sorted_BC, values_BN, strict=True)
        ranks = [np.searchsorted(row, values, side="right") for row, values in pairs]
        return np.array(ranks, dtype=np.int64).reshape(values_BN.shape)

    def sort(self, x: Array) -> Array:
        return np.sort(x, axis=-1)

    def rows_where(self, flags_B: Array) -> list[int]:
        return np.flatnonzero(flags_B).tolist()

    def positions(self, x: Array) -> Array:
        return np.flatnonzero(x)


class _TorchOps:
    """`Ops` over torch tensors, on whatever device they live."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._dtypes: dict[str, torch.dtype] = {
            "b1": torch.bool,
            "u1": torch.uint8,
            "i4": torch.int32,
            "i8": torch.int64,
            "f2": torch.float16,
            "f4": torch.float32,
            "f8": torch.float64,
        }

    def cast(self, x: Array, kind: str) -> Array:
        return x.to(self._dtypes[kind])

    def constant(self, x: Any, kind: str, like: Array) -> Array:
        # A copy: constants are read-only arrays, which torch would warn of.
        return self._torch.from_numpy(np.array(x, dtype=kind)).to(like.device)

    def zeros(self, shape: tuple[int, ...], kind: str, like: Array) -> Array:
        return self._torch.zeros(shape, dtype=self._dtypes[kind], device=like.device)

    def bits(self, x: Array, kind: str) -> Array:
        wanted = self._dtypes[kind]
        # Flat first: a slice of a single row counts as contiguous, and torch would still mind its row stride.
        flat = x.contiguous().reshape(-1)
        if (flat.storage_offset() * flat.itemsize) % wanted.itemsize:
            flat = flat.clone()
        return flat.view(wanted).reshape(*x.shape[:-1], x.shape[-1] * x.itemsize // wanted.itemsize)

    def max(self, x: Array) -> Array:
        return x.amax(dim=-1, keepdim=True)

    def min(self, x: Array) -> Array:
        return x.amin(dim=-1, keepdim=True)

    def sum(self, x: Array) -> Array:
        return x.sum(dim=-1, keepdim=True)

    def cumsum(self, x: Array) -> Array:
        return x.cumsum(dim=-1)

    def clip(self, x: Array, low: Any, high: Any) -> Array:
        return x.clamp(low, high)

    def maximum(self, x: Array, y: Array) -> Array:
        return self._torch.maximum(x, y)

    def where(self, condition: Array, x: Any, y: Any) -> Array:
        return self._torch.where(condition, x, y)

    def round(self, x: Array) -> Array:
        return x.round()

    def floor(self, x: Array) -> Array:
        return x.floor()

    def exp(self, x: Array) -> Array:
        return x.exp()

    def isfinite(self, x: Array) -> Array:
        return x.isfinite()

    def concat(self, parts: list[Array]) -> Array:
        return self._torch.cat(parts, dim=-1)

    def gather(self, x: Array, ids_BK: Array) -> Array:
        return x.gather(-1, ids_BK)

    def scatter(self, x: Array, ids_BK: Array, values_BK: Array) -> None:
        x.scatter_(-1, ids_BK, values_BK)

    def count(self, ids_BN: Array, classes: int) -> Array:
        counts = self._torch.zeros((len(ids_BN), classes), dtype=self._torch.int32, device=ids_BN.device)
        return counts.scatter_add_(-1, ids_BN, self._torch.ones_like(ids_BN, dtype=self._torch.int32))

    def first(self, keys_BC: Array, count: int) -> Array:
        return keys_BC.topk(count, dim=-1, largest=False, sorted=True).values

    def rank(self, sorted_BC: Array, values_BN: Array) -> Array:
        return self._torch.searchsorted(sorted_BC.contiguous(), values_BN.contiguous(), right=True)

    def sort(self, x: Array) -> Array:
        return x.sort(dim=-1).values

    def rows_where(self, flags_B: Array) -> list[int]:
        return cast("list[int]", flags_B.nonzero()[:, 0].tolist())

    def positions(self, x: Array) -> Array:
        return x.flatten().nonzero()[:, 0]


NUMPY: Ops = _NumpyOps()


@cache
def torch_ops() -> Ops:
    """The operations over torch, imported at the first call."""
    return _TorchOps()


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
