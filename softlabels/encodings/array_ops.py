"""Array operations over NumPy and torch, from which encoders and decoders are written once for both libraries.

Elementwise steps are single IEEE operations (no fused multiply-add, no library logarithm), so both libraries decode to
the same bits. torch is imported when the first tensor arrives, never on import.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

if TYPE_CHECKING:
    import torch

Array: TypeAlias = Any
"""A NumPy array or a torch tensor, whichever the `Ops` beside it is for."""

_LARGEST_F32_BITS = 0x7FFFFFFF


class Ops:
    """The operations over NumPy arrays, the reference.

    Element types are f2, f4, f8, i1, i4, i8, u1, u2 and u4. Reductions are along each row and keep the
    dimension: [B, N] gives [B, 1].
    """

    xp: Any = np
    """NumPy or torch, for elementwise functions; torch takes NumPy's keywords, such as `axis`, too."""

    def cast(self, x: Array, kind: str) -> Array:
        """Convert to another element type, without a copy if it is that already; overflow gives infinity."""
        if x.dtype == kind:  # first, because errstate takes longer than the decoding of a float32 batch
            return x
        with np.errstate(over="ignore"):  # as torch does; encoders check for infinities where they can arise
            return x.astype(kind)

    def contiguous(self, x: Array) -> Array:
        """Return the array in row-major order, copied if it is not."""
        return np.ascontiguousarray(x)

    def constant(self, x: Any, kind: str, like: Array) -> Array:
        """Return a NumPy constant on the device of `like`."""
        return np.asarray(x, dtype=kind)

    def zeros(self, shape: tuple[int, ...], kind: str, like: Array) -> Array:
        """Return zeros on the device of `like`."""
        return np.zeros(shape, dtype=kind)

    def bits(self, x: Array, kind: str) -> Array:
        """Reinterpret the bytes as another element type, copying where they are not contiguous."""
        return np.ascontiguousarray(x).view(f"<{kind}")

    def max(self, x: Array) -> Array:
        """Return each row's maximum; NaN if the row has one."""
        return np.maximum.reduce(x, axis=-1, keepdims=True)  # np.amax adds 5 µs a call

    def min(self, x: Array) -> Array:
        """Return each row's minimum; NaN if the row has one."""
        return np.minimum.reduce(x, axis=-1, keepdims=True)

    def sum(self, x: Array) -> Array:
        """Return each row's sum."""
        return x.sum(axis=-1, keepdims=True)

    def round(self, x: Array) -> Array:
        """Round to the nearest whole number, ties to even."""
        return np.rint(x)  # np.round adds 2 µs a call

    def concat(self, parts: list[Array]) -> Array:
        """Join columns."""
        return self.xp.concatenate(parts, axis=-1)

    def exact_product(self, x: Array, y: Array) -> Array:
        """Return the matrix product of float32 arrays of whole numbers whose sums are below 2²⁴, without rounding."""
        return x @ y

    def gather(self, x: Array, ids_BK: Array) -> Array:
        """Return x[b, ids[b, k]]."""
        return np.take_along_axis(x, ids_BK, axis=-1)

    def scatter(self, x: Array, ids_BK: Array, values_BK: Array) -> None:
        """Set x[b, ids[b, k]] = values[b, k] in place."""
        np.put_along_axis(x, ids_BK, values_BK, axis=-1)

    def count(self, ids_BN: Array, classes: int) -> Array:
        """Count how often each class occurs in a row of ids, int32 [B, classes]."""
        rows = len(ids_BN)
        flat = ids_BN + np.arange(rows)[:, None] * classes
        return np.bincount(flat.ravel(), minlength=rows * classes).reshape(rows, classes).astype(np.int32)

    def smallest(self, keys_BC: Array, count: int) -> Array:
        """Return the `count` smallest int64 keys of each row, ascending."""
        if count < keys_BC.shape[-1]:
            keys_BC = np.partition(keys_BC, count - 1, axis=-1)[:, :count]
        return np.sort(keys_BC, axis=-1)

    def rank(self, sorted_BC: Array, values_BN: Array) -> Array:
        """Count the entries of each ascending row that are at most each value, [B, N]."""
        pairs = zip(sorted_BC, values_BN, strict=True)
        ranks = [np.searchsorted(row, values, side="right") for row, values in pairs]
        return np.array(ranks, dtype=np.int64).reshape(values_BN.shape)

    def nonzero(self, x: Array) -> Array:
        """Return the positions of nonzero entries in the flattened array, int64."""
        return np.flatnonzero(x)

    def rows_where(self, flags_B: Array) -> list[int]:
        """Return the positions of flagged rows."""
        return cast("list[int]", self.nonzero(flags_B).tolist())


class _TorchOps(Ops):
    """The operations over torch tensors, on their own device."""

    def __init__(self) -> None:
        import torch

        self.xp = torch
        self._dtypes: dict[str, torch.dtype] = {
            "u1": torch.uint8,
            "u2": torch.uint16,
            "u4": torch.uint32,
            "i1": torch.int8,
            "i4": torch.int32,
            "i8": torch.int64,
            "f2": torch.float16,
            "f4": torch.float32,
            "f8": torch.float64,
        }

    def cast(self, x: Array, kind: str) -> Array:
        return x.to(self._dtypes[kind])

    def contiguous(self, x: Array) -> Array:
        return x.contiguous()

    def constant(self, x: Any, kind: str, like: Array) -> Array:
        # A copy, because torch warns of read-only arrays.
        return self.xp.from_numpy(np.array(x, dtype=kind)).to(like.device)

    def zeros(self, shape: tuple[int, ...], kind: str, like: Array) -> Array:
        return self.xp.zeros(shape, dtype=self._dtypes[kind], device=like.device)

    def bits(self, x: Array, kind: str) -> Array:
        wanted = self._dtypes[kind]
        # Flattened first: a slice of a single row counts as contiguous, yet `view` objects to its row stride.
        flat = x.contiguous().reshape(-1)
        # torch refuses a view whose start is not a multiple of the wider element's size.
        if (flat.storage_offset() * flat.itemsize) % wanted.itemsize:
            flat = flat.clone()
        return flat.view(wanted).reshape(*x.shape[:-1], x.shape[-1] * x.itemsize // wanted.itemsize)

    def max(self, x: Array) -> Array:
        return x.amax(-1, keepdim=True)

    def min(self, x: Array) -> Array:
        return x.amin(-1, keepdim=True)

    def round(self, x: Array) -> Array:
        return x.round()

    def exact_product(self, x: Array, y: Array) -> Array:
        if self._rounds_products(x.device.type):
            # Neither TF32 (11 significant bits) nor autocast applies to float64.
            return (x.double() @ y.double()).float()
        return x @ y

    def _rounds_products(self, device: str) -> bool:
        """Return whether a setting of the process, or of this block, lets float32 products be rounded to fewer bits."""
        try:
            return bool(self.xp.is_autocast_enabled(device)) or self.xp.get_float32_matmul_precision() != "highest"
        except RuntimeError:  # the precision was set for one backend alone, by torch's newer interface
            return True

    def gather(self, x: Array, ids_BK: Array) -> Array:
        return x.gather(-1, ids_BK)

    def scatter(self, x: Array, ids_BK: Array, values_BK: Array) -> None:
        x.scatter_(-1, ids_BK, values_BK)

    def count(self, ids_BN: Array, classes: int) -> Array:
        counts = self.xp.zeros((len(ids_BN), classes), dtype=self.xp.int32, device=ids_BN.device)
        return counts.scatter_add_(-1, ids_BN, self.xp.ones_like(ids_BN, dtype=self.xp.int32))

    def smallest(self, keys_BC: Array, count: int) -> Array:
        return keys_BC.topk(count, dim=-1, largest=False, sorted=True).values

    def rank(self, sorted_BC: Array, values_BN: Array) -> Array:
        return self.xp.searchsorted(sorted_BC.contiguous(), values_BN.contiguous(), right=True)

    def nonzero(self, x: Array) -> Array:
        return x.flatten().nonzero()[:, 0]


NUMPY = Ops()


@cache
def torch_ops() -> Ops:
    """Return the operations over torch, which the first call imports."""
    return _TorchOps()


# -- Built from several operations, and still the same bits in both libraries --------------------------------------


def top_k_shifted(ops: Ops, x_BC: Array, count: int) -> Array:
    """Return the ids of the largest entries of rows whose maximum is 0, largest first, int64 [B, count].

    Args:
        ops: library of `x_BC`.
        x_BC: float32 without NaN, none above 0.
        count: at most the number of columns, of which there are fewer than 2³¹. Ties go to the lower id.
    """
    return _ids_of_smallest(ops, ops.bits(x_BC, "i4") & _LARGEST_F32_BITS, count)


def top_k(ops: Ops, x_BC: Array, count: int) -> Array:
    """Return the ids of the largest of non-negative float32 entries, largest first; ties go to the lower id."""
    return _ids_of_smallest(ops, _LARGEST_F32_BITS - (ops.bits(x_BC, "i4") & _LARGEST_F32_BITS), count)


def _ids_of_smallest(ops: Ops, bits_BC: Array, count: int) -> Array:
    # The bits of non-negative floats, read as integers, sort as the floats do. With the id in the low half every key is
    # distinct, so the winner of a tie does not depend on a library's selection algorithm.
    ids_C = ops.constant(np.arange(bits_BC.shape[-1]), "i8", bits_BC)
    keys_BC = ops.cast(bits_BC, "i8") * (1 << 32) + ids_C
    return ops.smallest(keys_BC, count) & 0xFFFFFFFF


def natural_log(ops: Ops, x: Array) -> Array:
    """Return ln x of float32 ≥ 0 within 2 units in the last place, the same bits in every library; ln 0 is -inf.

    x = m 2^e with m in [√½, √2); ln m = 2 artanh(s), s = (m-1)/(m+1), by its series to s⁹: |s| ≤ 0.172, so the first
    omitted term is below 2⁻²⁸. Source: Abramowitz and Stegun 1964, 4.1.27. e ln 2 is added in two parts (Cody and
    Waite 1980), the larger exact.
    """
    # Subnormal numbers have no exponent to read: they are scaled by 2²⁴ into the normal range, and 24 is subtracted.
    tiny = x < 2.0**-126
    bits = ops.bits(x * ops.xp.where(tiny, ops.constant(2.0**24, "f4", x), ops.constant(1.0, "f4", x)), "i4")
    exponent = (bits >> 23) - 127
    m = ops.bits((bits & 0x7FFFFF) | 0x3F800000, "f4")
    high = m > 1.4142135
    m = ops.xp.where(high, m * 0.5, m)
    e = ops.cast(exponent + ops.cast(high, "i4") - 24 * ops.cast(tiny, "i4"), "f4")
    s = (m - 1.0) / (m + 1.0)
    t = s * s
    series = t * 0.22222222 + 0.2857142857
    series = (series * t + 0.4) * t + 0.6666666667
    log_m = s * 2.0 + s * (t * series)
    result = e * 0.693145751953125 + (e * 1.4286068203e-6 + log_m)
    return ops.xp.where(x > 0, result, -float("inf"))
