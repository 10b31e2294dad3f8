"""Hidden states: a row is the input of the teacher's last layer, and that layer is stored once. Name `hidden`.

A row has D numbers (the width of the model) instead of C (its vocabulary). It decodes to what the teacher computes,

    z = (hidden @ head.T + bias) x scale, then softcap x tanh(z / softcap) if the model caps its logits,

shifted so that a row's largest is 0: every class is present, at any T. The head is kept without loss, in half precision
if all its numbers are exact there, else in float32.

Row, by `kept_as`: `f32`, `f16` or `bf16` numbers as in the dense encodings, or `q8`: int8 codes and one float32 scale
for each row, x = code x scale with scale = max |x| / 127. Bounds on a hidden number: f32 none, f16 relative 2⁻¹¹, bf16
relative 2⁻⁸, q8 half its row's scale; the audit measures what that does to the targets. Refused: NaN, ±inf, beyond
±65,504 in f16. NumPy and torch decode to the same logits only up to the rounding of a float32 matrix product.
Legend: B rows, C classes, D width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from softlabels.encodings.array_ops import NUMPY, Array, Ops
from softlabels.encodings.base import TARGETS, Encoding, Field, check_shape
from softlabels.encodings.dense import BF16, F16, F32, DenseEncoding, widened_bf16
from softlabels.errors import EncodingError, UnknownEncodingError

if TYPE_CHECKING:
    from torch import Tensor

KeptAs = Literal["f32", "f16", "bf16", "q8"]
KEPT_AS: tuple[KeptAs, ...] = get_args(KeptAs)

SCALES = "scales"
HEAD_TYPES = ("<f4", "<f2", "<u2")
"""Element types of a stored head: float32, float16, or bfloat16 as its 16 bits."""

_DENSE: Mapping[str, type[DenseEncoding]] = {"f32": F32, "f16": F16, "bf16": BF16}
_LARGEST_CODE = 127.0
_LARGEST_FACTOR = 1e30  # of `scale` and `softcap`: any integer is allowed in JSON, and float32 ends at 3.4e38


@dataclass(frozen=True, kw_only=True, eq=False)
class Hidden(Encoding):
    """Hidden states, and the head that turns them into logits.

    Attributes:
        classes: C.
        kept_as: type of a row's numbers.
        scale: factor of the logits after the head.
        softcap: smooth limit of the logits; 0 for none.
        head_CD: float32, float16, or the bits of bfloat16.
        bias_C: float32; None if the head has none.
    """

    name = "hidden"
    row_kind = "hidden_states"
    retemperable = True
    param_names = ("kept_as", "scale", "softcap")

    classes: int
    kept_as: KeptAs = "f16"
    scale: float = 1.0
    softcap: float = 0.0
    head_CD: NDArray[Any] = field(repr=False)
    bias_C: NDArray[np.float32] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        problem = _find_problem(self)
        if problem:
            raise UnknownEncodingError(f"encoding 'hidden' cannot be made: {problem}")

    @property
    def width(self) -> int:
        """D, the number of entries of a hidden state."""
        return int(self.head_CD.shape[1])

    @property
    def constants(self) -> Mapping[str, NDArray[Any]]:
        """The last layer: `head`, and `bias` if it has one."""
        return {"head": self.head_CD} | ({} if self.bias_C is None else {"bias": self.bias_C})

    @property
    def fields(self) -> Mapping[str, Field]:
        """One array [rows, D] and, for q8, the scale of each row."""
        if self.kept_as != "q8":
            return self._dense.fields
        return {
            TARGETS: Field(dtype=np.dtype("i1"), row_shape=(self.width,)),
            SCALES: Field(dtype=np.dtype("<f4"), row_shape=(1,)),
        }

    def decode_rows(self, encoded: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Decode to hidden states, [B, D] float32: for a student's own head, or for few of the classes."""
        rows_BD: NDArray[np.float32] = self._decode_rows(NUMPY, encoded)
        return rows_BD

    def logits_of(self, rows_BW: NDArray[np.floating[Any]], /) -> NDArray[np.float32]:
        """Return the head's logits of hidden states, each row's largest 0."""
        z = np.asarray(rows_BW, dtype=np.float32) @ self._head_DC
        if self.bias_C is not None:
            z += self.bias_C
        if self.scale != 1:
            z *= np.float32(self.scale)
        if self.softcap:
            z = np.float32(self.softcap) * np.tanh(z / np.float32(self.softcap))
        z -= z.max(axis=-1, keepdims=True)
        return z

    def logits_of_torch(self, rows_BW: Tensor, /) -> Tensor:
        """`logits_of` on the tensor's device."""
        import torch

        head_CD, bias_C = self._head_on(rows_BW.device)
        # Autocast would round the product to half precision.
        with torch.autocast(rows_BW.device.type, enabled=False):
            z = torch.nn.functional.linear(rows_BW.float(), head_CD, bias_C)
        if self.scale != 1:
            z = z * self.scale
        if self.softcap:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z - z.amax(dim=-1, keepdim=True)

    @cached_property
    def _dense(self) -> DenseEncoding:
        return _DENSE[self.kept_as](classes=self.width)

    @cached_property
    def _head_DC(self) -> NDArray[np.float32]:
        return _widened(self.head_CD).T

    @cached_property
    def _heads_by_device(self) -> dict[Any, tuple[Tensor, Tensor | None]]:
        return {}

    def _head_on(self, device: Any) -> tuple[Tensor, Tensor | None]:
        import torch

        if device not in self._heads_by_device:
            # Copied, because torch warns of read-only arrays.
            head_CD = torch.from_numpy(np.array(_widened(self.head_CD)))
            bias_C = None if self.bias_C is None else torch.from_numpy(np.array(self.bias_C)).to(device)
            self._heads_by_device[device] = head_CD.to(device), bias_C
        return self._heads_by_device[device]

    def _encode(self, ops: Ops, rows_BW: Array, keys_B: NDArray[np.uint64] | None) -> dict[str, Array]:
        check_shape(rows_BW, self.width, what="numbers")
        rows = ops.rows_where(~ops.xp.isfinite(rows_BW).all(-1))
        if rows:
            raise EncodingError(f"{len(rows)} hidden state(s) hold NaN or Inf; check the teacher", rows=rows)
        if self.kept_as == "q8":
            codes_BD, scale_B1 = _quantise(ops, rows_BW)
            return {TARGETS: ops.cast(codes_BD, "i1"), SCALES: scale_B1}
        try:
            return self._dense._encode(ops, rows_BW, None)
        except EncodingError as error:  # whose message is about logits
            rows = error.context.get("rows", [])
            raise EncodingError(
                f"{self.kept_as} has no number for an entry of {len(rows)} hidden state(s): keep them as 'bf16' or "
                "'f32'",
                rows=rows,
            ) from error

    def _decode(self, ops: Ops, encoded: Mapping[str, Array]) -> Array:
        rows_BD = self._decode_rows(ops, encoded)
        return self.logits_of(rows_BD) if ops is NUMPY else self.logits_of_torch(rows_BD)

    def _decode_rows(self, ops: Ops, encoded: Mapping[str, Array]) -> Array:
        if self.kept_as != "q8":
            return self._dense._decode(ops, encoded)
        return ops.cast(encoded[TARGETS], "f4") * ops.cast(encoded[SCALES], "f4")


def hidden_encoding(
    head_CD: NDArray[np.floating[Any]], bias_C: NDArray[np.floating[Any]] | None = None, **params: Any
) -> Hidden:
    """Return the encoding for a teacher's head, stored in the fewest bytes that hold it exactly.

    Args:
        head_CD, bias_C: float32.
        params: `kept_as`, `scale`, `softcap`.
    """
    return Hidden(
        classes=len(head_CD),
        head_CD=_narrowed(np.ascontiguousarray(head_CD, dtype="<f4")),
        bias_C=None if bias_C is None else np.ascontiguousarray(bias_C, dtype="<f4"),
        **params,
    )


def _quantise(ops: Ops, hidden_BD: Array) -> tuple[Array, Array]:
    """Return codes of -127 to 127, still float32, and the scale of each row."""
    x = ops.cast(hidden_BD, "f4")
    scale_B1 = ops.max(abs(x)) / _LARGEST_CODE
    # A row of zeros has the scale 0 and is divided by 1, since 0/0 would be NaN.
    codes = ops.round(x / ops.xp.where(scale_B1 > 0, scale_B1, scale_B1 + 1.0))
    return ops.xp.clip(codes, -_LARGEST_CODE, _LARGEST_CODE), scale_B1


def _narrowed(head_CD: NDArray[np.float32]) -> NDArray[Any]:
    """Return the head in half precision if that loses no bit."""
    with np.errstate(over="ignore"):
        half = head_CD.astype("<f2")
    if np.array_equal(half.astype("<f4"), head_CD):
        return half
    bits = head_CD.view("<u4")
    return (bits >> np.uint32(16)).astype("<u2") if not (bits & np.uint32(0xFFFF)).any() else head_CD


def _widened(head_CD: NDArray[Any]) -> NDArray[np.float32]:
    if head_CD.dtype == np.uint16:
        return widened_bf16(head_CD)
    return np.asarray(head_CD, dtype=np.float32)


def _find_problem(given: Hidden) -> str:
    """Return why these parameters and arrays make no encoding, or an empty string."""
    head_CD, bias_C = given.head_CD, given.bias_C
    if head_CD.ndim != 2 or len(head_CD) != given.classes or head_CD.shape[1] < 1:
        return f"a head of {list(head_CD.shape)} for {given.classes} classes"
    if head_CD.dtype.str not in HEAD_TYPES:
        return f"a head of type {head_CD.dtype.str}, not one of {', '.join(HEAD_TYPES)}"
    if not np.isfinite(_widened(head_CD)).all():
        return "its head holds NaN or Inf"
    if bias_C is not None and (
        bias_C.shape != (given.classes,) or bias_C.dtype.str != "<f4" or not np.isfinite(bias_C).all()
    ):
        return f"a bias {bias_C.dtype.str}{list(bias_C.shape)}; it has to be one finite float32 for each class"
    if given.kept_as not in KEPT_AS:
        return f"kept_as = {given.kept_as!r}, not one of {', '.join(KEPT_AS)}"
    if not 0 < given.scale <= _LARGEST_FACTOR or not 0 <= given.softcap <= _LARGEST_FACTOR:
        return f"a scale of {given.scale} and a softcap of {given.softcap}"
    return ""
