"""Dense rows: every class kept, as f32, f16 or bf16.

Errors in the kept logit z (row maximum 0): f32 none; f16 relative 2⁻¹¹ (absolute 2⁻²⁵ below 2⁻¹⁴), refused below
−65,504; bf16 relative 2⁻⁸ with the range of f32. Source: IEEE 754-2019, § 3.6; bf16 is its upper half-word.
"""

from __future__ import annotations

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
class _Dense(LogitsEncoding):
    classes: int

    name: ClassVar[str]
    dtype: ClassVar[str]
    retemperable: ClassVar[bool] = True

    @property
    def params(self) -> Mapping[str, Any]:
        """Dense encodings have no parameters."""
        return {}

    @property
    def fields(self) -> Mapping[str, Field]:
        """One array, [rows, classes]."""
        return {TARGETS: Field(dtype=np.dtype(self.dtype), row_shape=(self.classes,))}


@dataclass(frozen=True, kw_only=True)
class F32(_Dense):
    """Rows as float32, exact."""

    name: ClassVar[str] = "f32"
    dtype: ClassVar[str] = "<f4"

    def encode(
        self, logits_BC: NDArray[np.floating[Any]], *, keys_B: NDArray[np.uint64] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Keep the rows as they are; raises EncodingError for NaN and +inf."""
        rows = np.ascontiguousarray(logits_BC, dtype="<f4")
        _refuse_unsound(NUMPY, rows, self)
        return {TARGETS: rows}

    def decode(self, encoded: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The rows as they were."""
        return np.asarray(encoded[TARGETS], dtype=np.float32)

    def encode_torch(self, logits_BC: Tensor, *, keys_B: NDArray[np.uint64] | None = None) -> dict[str, Tensor]:
        """Keep the rows as they are, on their device."""
        rows = logits_BC.float().contiguous()
        _refuse_unsound(torch_ops(), rows, self)
        return {TARGETS: rows}

    def decode_torch(self, encoded: Mapping[str, Tensor]) -> Tensor:
        """The rows as they were, on their device."""
        return encoded[TARGETS].float()


@dataclass(frozen=True, kw_only=True)
class F16(_Dense):
    """Rows as float16: relative error 2⁻¹¹ of each logit below the row's maximum."""

    name: ClassVar[str] = "f16"
    dtype: ClassVar[str] = "<f2"

    def encode(
        self, logits_BC: NDArray[np.floating[Any]], *, keys_B: NDArray[np.uint64] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Round to nearest even.

        Raises:
            EncodingError: a finite logit lies more than 65,504 below its row's maximum.
        """
        _refuse_unsound(NUMPY, np.asarray(logits_BC), self)
        with np.errstate(over="ignore"):
            rounded = np.asarray(logits_BC).astype("<f2")
        overflowed = np.isinf(rounded).any(axis=-1)
        if overflowed.any():
            raise _out_of_range(np.flatnonzero(overflowed).tolist())
        return {TARGETS: rounded}

    def decode(self, encoded: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Widen to float32, exactly."""
        return np.asarray(encoded[TARGETS]).astype(np.float32)

    def encode_torch(self, logits_BC: Tensor, *, keys_B: NDArray[np.uint64] | None = None) -> dict[str, Tensor]:
        """Round to nearest even, on the rows' device; the range is checked there too."""
        _refuse_unsound(torch_ops(), logits_BC, self)
        rounded = logits_BC.half()
        overflowed = rounded.isinf().any(dim=-1)
        if bool(overflowed.any()):
            raise _out_of_range(overflowed.nonzero()[:, 0].tolist())
        return {TARGETS: rounded.contiguous()}

    def decode_torch(self, encoded: Mapping[str, Tensor]) -> Tensor:
        """Widen to float32, exactly, on the tensor's device."""
        return encoded[TARGETS].float()


@dataclass(frozen=True, kw_only=True)
class BF16(_Dense):
    """Rows as bfloat16, kept as its 16 bits in uint16 because neither Zarr v3's core types nor HDF5's name it."""

    name: ClassVar[str] = "bf16"
    dtype: ClassVar[str] = "<u2"

    def encode(
        self, logits_BC: NDArray[np.floating[Any]], *, keys_B: NDArray[np.uint64] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Round to nearest even: add half of the dropped half-word's range, ties to the even kept half-word."""
        rows = np.ascontiguousarray(logits_BC, dtype="<f4")
        _refuse_unsound(NUMPY, rows, self)
        bits = rows.view("<u4")
        rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
        overflowed = ((rounded & np.uint32(0x7FFF)) == _BF16_INFINITY) & np.isfinite(rows)
        if overflowed.any():
            raise _out_of_range(np.flatnonzero(overflowed.any(axis=-1)).tolist(), "bf16", "3.39e38")
        return {TARGETS: rounded.astype("<u2")}

    def decode(self, encoded: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Widen to float32, exactly."""
        return (np.asarray(encoded[TARGETS], dtype=np.uint32) << np.uint32(16)).view(np.float32)

    def encode_torch(self, logits_BC: Tensor, *, keys_B: NDArray[np.uint64] | None = None) -> dict[str, Tensor]:
        """Round to nearest even, on the rows' device."""
        import torch

        _refuse_unsound(torch_ops(), logits_BC, self)
        rounded = logits_BC.bfloat16().contiguous()
        overflowed = (rounded.isinf() & logits_BC.isfinite()).any(dim=-1)
        if bool(overflowed.any()):
            raise _out_of_range(overflowed.nonzero()[:, 0].tolist(), "bf16", "3.39e38")
        return {TARGETS: rounded.view(torch.uint16)}

    def decode_torch(self, encoded: Mapping[str, Tensor]) -> Tensor:
        """Widen to float32, exactly, on the tensor's device."""
        import torch

        return encoded[TARGETS].view(torch.bfloat16).float()


def _refuse_unsound(ops: Ops, logits_BC: Array, encoding: _Dense) -> None:
    check_shape(tuple(logits_BC.shape), encoding.classes)
    if len(logits_BC) == 0:
        return
    # The largest is finite: no NaN, no +inf, and some class has a probability.
    rows = ops.rows_where(~ops.isfinite(ops.max(logits_BC))[:, 0])
    if rows:
        raise EncodingError(
            f"{len(rows)} row(s) hold NaN, +inf or nothing finite, which are no distributions; check the teacher",
            rows=rows,
        )


def _out_of_range(rows: list[int], name: str = "f16", limit: str = "65,504") -> EncodingError:
    return EncodingError(
        f"{name} cannot hold {len(rows)} row(s): a logit lies more than {limit} below its row's maximum and would "
        "become -inf; use encoding 'f32' (or 'bf16' in place of 'f16'), or check the teacher",
        rows=rows,
    )
