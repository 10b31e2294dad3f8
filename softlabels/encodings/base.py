"""Base classes of encodings: `Encoding`, written once over NumPy and torch, and `PackedRows` for rows of bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from softlabels.encodings.array_ops import NUMPY, Array, Ops, torch_ops
from softlabels.errors import EncodingError, ShapeMismatchError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from torch import Tensor

TARGETS = "targets"
"""Name of the array of encodings that keep a row in one array: dense logits, or packed bytes."""

RowKind: TypeAlias = Literal["logits", "hidden_states"]
"""What an encoding takes as a row: the logits themselves, or hidden states that a stored head turns into logits."""

_LABELLED = ("head", "k", "tail", "residual_bits", "draws", "kept_as")

# Encoders on the CPU work on blocks of about this many entries: 256 kB of float32, so that what one step writes is
# still in the core's second-level cache for the next. A GPU takes the whole batch at once.
_BLOCK_ENTRIES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Field:
    """One array of an encoded row: its element type and the shape of one row in it."""

    dtype: np.dtype[Any]
    row_shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in this array."""
        return self.dtype.itemsize * int(np.prod(self.row_shape, dtype=np.int64))


class Encoding(ABC):
    """How one distribution over `classes` classes becomes bytes. Subclasses are frozen dataclasses.

    Rows are logits up to a row constant, shifted so that a row's largest is 0, and decode to such rows. A row has a
    fixed size, so its address in a file is arithmetic. The same bytes decode to the same bits in NumPy and torch
    (except `hidden`, which multiplies matrices of floats). The same rows encode to the same bytes, except for values
    that lie on a rounding edge.

    Attributes:
        name: name in job files and manifests.
        classes: C.
        row_kind: what a row given to `encode` is. Only logits can be averaged over an ensemble.
        retemperable: whether decoded rows may be brought to another temperature. If not (truncated and sampled rows),
            rows are tempered at the captured temperature before they are encoded.
        param_names: attributes that `params` has.
    """

    name: str
    classes: int
    row_kind: RowKind = "logits"
    retemperable: bool
    param_names: ClassVar[tuple[str, ...]] = ()

    @property
    def params(self) -> Mapping[str, Any]:
        """JSON parameters from which `make_encoding` rebuilds the encoding, beside name, classes and constants."""
        return {name: getattr(self, name) for name in self.param_names}

    @property
    def constants(self) -> Mapping[str, NDArray[Any]]:
        """Arrays that belong to one store and are needed to decode its rows; empty for most encodings."""
        return {}

    @property
    @abstractmethod
    def fields(self) -> Mapping[str, Field]:
        """The arrays that rows are kept in, by name."""

    def encode(
        self, rows_BW: NDArray[np.floating[Any]], /, *, keys_B: NDArray[np.uint64] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Encode rows.

        Args:
            rows_BW: logits [rows, classes], natural-log units, finite, each row's largest 0; for `hidden`, hidden
                states [rows, width].
            keys_B: random-number keys [rows] from `rng_keys`, needed by encodings that sample and ignored by others.
        Returns:
            One array for each field, [rows, *row_shape].
        Raises:
            EncodingError: a row is outside the range of this encoding; `context["rows"]` has the row numbers.
        """
        return self._encode(NUMPY, np.asarray(rows_BW), keys_B)

    def decode(self, encoded: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Decode to logits, up to a row constant; -inf is a probability of 0. Leading dimensions are kept."""
        decoded: NDArray[np.float32] = self._decode(NUMPY, encoded)
        return decoded

    def encode_torch(self, rows_BW: Tensor, /, *, keys_B: NDArray[np.uint64] | None = None) -> dict[str, Tensor]:
        """`encode` on the tensor's device, to the same bytes; `keys_B` stays on the host."""
        return self._encode(torch_ops(), rows_BW, keys_B)

    def decode_torch(self, encoded: Mapping[str, Tensor]) -> Tensor:
        """`decode` on the tensors' device, to the same bits."""
        decoded: Tensor = self._decode(torch_ops(), encoded)
        return decoded

    def decode_rows(self, encoded: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Decode to rows of the kind that `encode` takes, which is cheaper than `decode` for hidden states."""
        return self.decode(encoded)

    def logits_of(self, rows_BW: NDArray[np.floating[Any]], /) -> NDArray[np.floating[Any]]:
        """Return the logits that rows of this kind stand for: the rows themselves, unless they are hidden states."""
        return rows_BW

    def logits_of_torch(self, rows_BW: Tensor, /) -> Tensor:
        """`logits_of` on the tensor's device."""
        return rows_BW

    @abstractmethod
    def _encode(self, ops: Ops, rows_BW: Array, keys_B: NDArray[np.uint64] | None) -> dict[str, Array]: ...

    @abstractmethod
    def _decode(self, ops: Ops, encoded: Mapping[str, Array]) -> Array: ...

    def __getstate__(self) -> dict[str, Any]:
        # Cached properties are not pickled: they may hold tensors on a device that the other process does not have.
        return {field.name: getattr(self, field.name) for field in fields(cast("DataclassInstance", self))}


class PackedRows(Encoding):
    """An encoding whose row is one run of bytes in the array `targets`."""

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """Bytes of one row."""

    @abstractmethod
    def _pack(self, ops: Ops, logits_BC: Array, keys_B: NDArray[np.uint64] | None) -> Array:
        """Return rows as bytes, uint8 [B, size_bytes]."""

    @abstractmethod
    def _unpack(self, ops: Ops, bytes_BS: Array) -> Array:
        """Return bytes as logits, float32 [B, classes]."""

    @property
    def fields(self) -> Mapping[str, Field]:
        """One array, uint8 [rows, bytes]."""
        return {TARGETS: Field(dtype=np.dtype("u1"), row_shape=(self.size_bytes,))}

    def _encode(self, ops: Ops, rows_BW: Array, keys_B: NDArray[np.uint64] | None) -> dict[str, Array]:
        check_shape(rows_BW, self.classes, keys_B)
        if str(rows_BW.device) != "cpu":
            return {TARGETS: self._pack(ops, rows_BW, keys_B)}
        packed = ops.zeros((len(rows_BW), self.size_bytes), "u1", rows_BW)
        step = max(1, _BLOCK_ENTRIES // self.classes)
        for start in range(0, len(rows_BW), step):
            block = slice(start, start + step)
            try:
                packed[block] = self._pack(ops, rows_BW[block], None if keys_B is None else keys_B[block])
            except EncodingError as error:  # which numbers the rows of its block from 0
                error.context["rows"] = [row + start for row in error.context.get("rows", [])]
                raise
        return {TARGETS: packed}

    def _decode(self, ops: Ops, encoded: Mapping[str, Array]) -> Array:
        packed = encoded[TARGETS]
        return self._unpack(ops, packed.reshape(-1, self.size_bytes)).reshape(*packed.shape[:-1], self.classes)


def encoding_label(encoding: Encoding) -> str:
    """Return a short description for tables and messages, for example "q6 head=16"."""
    return " ".join([encoding.name, *(f"{key}={value}" for key, value in encoding.params.items() if key in _LABELLED)])


def row_bytes(encoding: Encoding) -> int:
    """Return the bytes of one row in all arrays together."""
    return sum(field.row_bytes for field in encoding.fields.values())


def check_shape(rows_BW: Array, width: int, keys_B: NDArray[np.uint64] | None = None, *, what: str = "classes") -> None:
    """Raise ShapeMismatchError unless rows have the shape [rows, width] and there is one key for each."""
    shape = list(rows_BW.shape)
    if len(shape) != 2 or shape[1] != width:
        raise ShapeMismatchError(
            f"this encoding holds rows of {width} {what} and was given an array of shape {shape}; give [rows, {width}]",
            **{"shape": shape, what: width},
        )
    if keys_B is not None and keys_B.shape != (shape[0],):
        keys = list(keys_B.shape)
        raise ShapeMismatchError(f"{shape[0]} rows need as many keys, not {keys}", rows=shape[0], keys=keys)


def shifted_rows(ops: Ops, logits_BC: Array, *, name: str, minus_inf: bool = False) -> Array:
    """Return rows as float32 with their largest at 0.

    Args:
        ops: library of `logits_BC`.
        logits_BC: shape [B, C].
        name: name of the encoding, for the error message.
        minus_inf: whether -inf (a class of probability 0) is allowed.
    Raises:
        EncodingError: NaN, +inf, no finite entry, -inf where it is not allowed, or a row so wide that its differences
            overflow float32.
    """
    z = ops.cast(logits_BC, "f4")
    high_B1 = ops.max(z)
    bad_B1 = ~ops.xp.isfinite(high_B1)
    if not minus_inf:
        with np.errstate(over="ignore", invalid="ignore"):
            bad_B1 = bad_B1 | ~ops.xp.isfinite(ops.min(z) - high_B1)
    rows = ops.rows_where(bad_B1[:, 0])
    if rows:
        refused = "" if minus_inf else ", -inf (a class of probability 0) or a span beyond float32"
        raise EncodingError(
            f"{len(rows)} row(s) hold NaN, +inf{refused}, which encoding {name!r} cannot keep; check the teacher, or "
            "mask classes by a large finite negative logit, or use an encoding that keeps every bit ('f32')",
            rows=rows,
        )
    return z - high_B1
