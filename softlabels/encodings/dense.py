"""Dense rows: every class as float32, float16 or bfloat16. Names `f32`, `f16`, `bf16`.

Errors in the kept logit z (row maximum 0): f32 none; f16 relative 2⁻¹¹ (absolute 2⁻²⁵ below 2⁻¹⁴), refused below
−65,504; bf16 relative 2⁻⁸ with the range of f32. Refused: NaN, +inf, rows without a finite entry. Rounding is to
nearest, ties to even. Source: IEEE 754-2019, § 3.6; bf16 is its upper half-word.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from softlabels.encodings.array_ops import NUMPY, Array, Ops, torch_ops
from softlabels.encodings.base import TARGETS, Field, LogitsEncoding, check_shape
from softlabels.errors import EncodingError

if TYPE_CHECKING:
    from torch import Tensor

_BF16_INFINITY = 0x7F80


@dataclass(frozen=True, kw_only=True)
class DenseEncoding(LogitsEncoding):
    """Base of the dense encodings, which differ in how they narrow and widen an array."""

    classes: int

    name = ""
    dtype: ClassVar[str]
    largest: ClassVar[str]
    retemperable = True

    @property
    def params(self) -> Mapping[str, Any]:
        """No parameters."""
        return {}

    @property
    def fields(self) -> Mapping[str, Field]:
        """One array, [rows, classes]."""
        return {TARGETS: Field(dtype=np.dtype(self.dtype), row_shape=(self.classes,))}

    def encode(
        self, logits_BC: NDArray[np.floating[Any]], *, keys_B: NDArray[np.uint64] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Encode rows. Raises EncodingError for rows that are no distributions or out of range."""
        return {TARGETS: self._narrow(np.asarray(logits_BC))}

    def decode(self, encoded: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Widen to float32, exactly."""
        return self._widen(np.asarray(encoded[TARGETS]))

    def encode_torch(self, logits_BC: Tensor, *, keys_B: NDArray[np.uint64] | None = None) -> dict[str, Tensor]:
        """Encode rows on their device."""
        return {TARGETS: self._narrow_torch(logits_BC)}

    def decode_torch(self, encoded: Mapping[str, Tensor]) -> Tensor:
        """Widen to float32 on the tensor's device, exactly."""
        return encoded[TARGETS].float()

    @abstractmethod
    def _narrow(self, rows_BC: NDArray[Any]) -> NDArray[Any]:
        """Check rows and convert them to the kept type."""

    @abstractmethod
    def _narrow_torch(self, rows_BC: Tensor) -> Tensor:
        """`_narrow` on the tensor's device."""

    def _widen(self, kept: NDArray[Any]) -> NDArray[np.float32]:
        return kept.astype(np.float32, copy=False)

    def _check_rows(self, ops: Ops, rows_BC: Array) -> None:
        check_shape(tuple(rows_BC.shape), self.classes)
        if len(rows_BC) == 0:
            return
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

    def _narrow(self, rows_BC: NDArray[Any]) -> NDArray[Any]:
        rows = np.ascontiguousarray(rows_BC, dtype="<f4")
        self._check_rows(NUMPY, rows)
        return rows

    def _narrow_torch(self, rows_BC: Tensor) -> Tensor:
        rows = rows_BC.float().contiguous()
        self._check_rows(torch_ops(), rows)
        return rows


@dataclass(frozen=True, kw_only=True)
class F16(DenseEncoding):
    """Rows as float16: relative error 2⁻¹¹ of each logit below the row's maximum."""

    name = "f16"
    dtype: ClassVar[str] = "<f2"
    largest: ClassVar[str] = "65,504"

    def _narrow(self, rows_BC: NDArray[Any]) -> NDArray[Any]:
        self._check_rows(NUMPY, rows_BC)
        with np.errstate(over="ignore"):
            rounded: NDArray[Any] = rows_BC.astype("<f2")
        self._check_range(NUMPY, np.isinf(rounded))
        return rounded

    def _narrow_torch(self, rows_BC: Tensor) -> Tensor:
        self._check_rows(torch_ops(), rows_BC)
        rounded = rows_BC.half()
        self._check_range(torch_ops(), rounded.isinf())
        return rounded.contiguous()


@dataclass(frozen=True, kw_only=True)
class BF16(DenseEncoding):
    """Rows as bfloat16, stored as its 16 bits in uint16: neither Zarr v3's core types nor HDF5's include bfloat16."""

    name = "bf16"
    dtype: ClassVar[str] = "<u2"
    largest: ClassVar[str] = "3.39e38"

    def _narrow(self, rows_BC: NDArray[Any]) -> NDArray[Any]:
        rows = np.ascontiguousarray(rows_BC, dtype="<f4")
        self._check_rows(NUMPY, rows)
        bits = rows.view("<u4")
        # Round half to even: add just under half of the dropped half-word, and 1 more if the kept half-word is odd.
        rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
        self._check_range(NUMPY, ((rounded & np.uint32(0x7FFF)) == _BF16_INFINITY) & np.isfinite(rows))
        kept: NDArray[Any] = rounded.astype("<u2")
        return kept

    def _narrow_torch(self, rows_BC: Tensor) -> Tensor:
        import torch

        self._check_rows(torch_ops(), rows_BC)
        rounded = rows_BC.bfloat16().contiguous()
        self._check_range(torch_ops(), rounded.isinf() & rows_BC.isfinite())
        return rounded.view(torch.uint16)

    def _widen(self, kept: NDArray[Any]) -> NDArray[np.float32]:
        return (kept.astype(np.uint32) << np.uint32(16)).view(np.float32)

    def decode_torch(self, encoded: Mapping[str, Tensor]) -> Tensor:
        """Widen to float32 on the tensor's device, exactly."""
        import torch

        return encoded[TARGETS].view(torch.bfloat16).float()
