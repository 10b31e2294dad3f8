"""Dense rows: every class as float32, float16 or bfloat16. Names `f32`, `f16`, `bf16`.

Errors in the kept logit z (row maximum 0): f32 none; f16 relative 2⁻¹¹ (absolute 2⁻²⁵ below 2⁻¹⁴), refused below
−65,504; bf16 relative 2⁻⁸ with the range of f32. Refused: NaN, +inf, rows without a finite entry. Rounding is to
nearest, ties to even. Source: IEEE 754-2019, § 3.6; bf16 is its upper half-word.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from softlabels.encodings.array_ops import NUMPY, Array, Ops
from softlabels.encodings.base import TARGETS, Encoding, Field, check_shape
from softlabels.errors import EncodingError

_BF16_INFINITY = 0x7F80


@dataclass(frozen=True, kw_only=True)
class DenseEncoding(Encoding):
    """Base of the dense encodings, which differ in how they narrow and widen an array."""

    classes: int

    name = ""
    dtype: ClassVar[str]
    largest: ClassVar[str]
    retemperable = True

    @property
    def fields(self) -> Mapping[str, Field]:
        """One array, [rows, classes]."""
        return {TARGETS: Field(dtype=np.dtype(self.dtype), row_shape=(self.classes,))}

    @abstractmethod
    def _narrow(self, ops: Ops, rows_BC: Array) -> Array:
        """Check rows and convert them to the kept type."""

    def _encode(self, ops: Ops, rows_BW: Array, keys_B: NDArray[np.uint64] | None) -> dict[str, Array]:
        return {TARGETS: ops.contiguous(self._narrow(ops, rows_BW))}

    def _decode(self, ops: Ops, encoded: Mapping[str, Array]) -> Array:
        return ops.cast(encoded[TARGETS], "f4")

    def _check_rows(self, ops: Ops, rows_BC: Array) -> None:
        check_shape(rows_BC, self.classes)
        # A finite maximum means no NaN, no +inf, and at least one class with a probability.
        bad = ops.rows_where(~ops.xp.isfinite(ops.max(rows_BC))[:, 0])
        if bad:
            raise EncodingError(
                f"{len(bad)} row(s) hold NaN, +inf or nothing finite, which are no distributions; check the teacher",
                rows=bad,
            )

    def _check_range(self, ops: Ops, overflowed_BC: Array) -> None:
        rows = ops.rows_where(overflowed_BC.any(-1)) if overflowed_BC.any() else []
        if rows:
            raise EncodingError(
                f"{self.name} cannot hold {len(rows)} row(s): a logit lies more than {self.largest} below its row's "
                "maximum and would become -inf; use encoding 'f32' (or 'bf16' in place of 'f16'), or check the teacher",
                rows=rows,
            )


@dataclass(frozen=True, kw_only=True)
class F32(DenseEncoding):
    """Rows as float32, exact."""

    name = "f32"
    dtype: ClassVar[str] = "<f4"

    def _narrow(self, ops: Ops, rows_BC: Array) -> Array:
        rows = ops.cast(rows_BC, "f4")
        self._check_rows(ops, rows)
        return rows


@dataclass(frozen=True, kw_only=True)
class F16(DenseEncoding):
    """Rows as float16: relative error 2⁻¹¹ of each logit below the row's maximum."""

    name = "f16"
    dtype: ClassVar[str] = "<f2"
    largest: ClassVar[str] = "65,504"

    def _narrow(self, ops: Ops, rows_BC: Array) -> Array:
        self._check_rows(ops, rows_BC)
        rounded = ops.cast(rows_BC, "f2")
        self._check_range(ops, ops.xp.isinf(rounded))
        return rounded


@dataclass(frozen=True, kw_only=True)
class BF16(DenseEncoding):
    """Rows as bfloat16, stored as its 16 bits in uint16: neither Zarr v3's core types nor HDF5's include bfloat16."""

    name = "bf16"
    dtype: ClassVar[str] = "<u2"
    largest: ClassVar[str] = "3.39e38"

    def _narrow(self, ops: Ops, rows_BC: Array) -> Array:
        if ops is not NUMPY:
            self._check_rows(ops, rows_BC)
            rounded = rows_BC.bfloat16()
            self._check_range(ops, rounded.isinf() & rows_BC.isfinite())
            return rounded.view(ops.xp.uint16)
        rows = ops.cast(rows_BC, "f4")
        self._check_rows(ops, rows)
        bits = ops.bits(rows, "u4")
        # Round half to even: add just under half of the dropped half-word, and 1 more if the kept half-word is odd.
        bits = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
        self._check_range(ops, ((bits & np.uint32(0x7FFF)) == _BF16_INFINITY) & np.isfinite(rows))
        return bits.astype("<u2")

    def _decode(self, ops: Ops, encoded: Mapping[str, Array]) -> Array:
        kept = encoded[TARGETS]
        return widened_bf16(kept) if ops is NUMPY else kept.view(ops.xp.bfloat16).float()


def widened_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return float32 of bfloat16's 16 bits, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
