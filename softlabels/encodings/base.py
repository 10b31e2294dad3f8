"""What every encoding can do: turn distributions into fixed-size rows of bytes and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from softlabels.encodings.array_ops import NUMPY, Array, Ops, torch_ops
from softlabels.errors import EncodingError, ShapeMismatchError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from torch import Tensor

TARGETS = "targets"
"""The array that holds rows kept in one array: dense logits, or packed bytes."""

RowKind: TypeAlias = Literal["logits", "hidden_states"]
"""What an encoding takes as a row: the logits themselves, or hidden states that a stored head turns into logits."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """One array of an encoded row: `dtype` and the shape that each row has in it."""

    dtype: np.dtype[Any]
    row_shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes that one row takes in this array."""
        return self.dtype.itemsize * int(np.prod(self.row_shape, dtype=np.int64))


class Encoding(Protocol):
    """How one distribution over `classes` classes becomes bytes.

    Rows are logits up to a row constant, shifted so that a row's largest is 0; decoding gives such rows back. Rows have
    a fixed size, so that a row has an address. Decoding the same bytes gives the same bits in NumPy and torch (but for
    `hidden`, a matrix product of floats); encoding the same rows gives the same bytes, but for values that stand on a
    rounding edge.
    """

    @property
    def name(self) -> str:
        """The name in job files and manifests."""
        ...

    @property
    def classes(self) -> int:
        """How many classes a row has."""
        ...

    @property
    def params(self) -> Mapping[str, Any]:
        """JSON-able parameters that, with the name, the class count and the constants, rebuild this encoding."""
        ...

    @property
    def constants(self) -> Mapping[str, NDArray[Any]]:
        """Arrays learnt for one store, without which its rows cannot be read; empty for most encodings."""
        ...

    @property
    def fields(self) -> Mapping[str, Field]:
        """The arrays that rows are kept in, by name."""
        ...

    @property
    def row_kind(self) -> RowKind:
        """What a row is that `encode` takes. Only logits have a mean over an ensemble."""
        ...

    @property
    def retemperable(self) -> bool:
        """Whether decoded rows may be brought to another temperature.

        Where False (truncated and sampled rows), the rows given to `encode` are tempered at the captured T already.
        """
        ...

    def encode(
        self, logits_BC: NDArray[np.floating[Any]], /, *, keys_B: NDArray[np.uint64] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Encode rows.

        Args:
            logits_BC: [rows, classes], natural-log units, finite, each row's largest 0; for `hidden`, hidden states
                [rows, width].
            keys_B: [rows] the rows' keys for random numbers, see `softlabels.splitmix64.rng_keys`. Needed by
                encodings that draw (`sampled`), ignored by the rest.
        Returns:
            One array a field, [rows, *row_shape].
        Raises:
            EncodingError: a row that this encoding cannot hold within its bound; `context["rows"]` are positions.
        """
        ...

    def decode(self, encoded: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Decode rows: logits_BC float32, up to a row constant; -inf where an encoding says that p is 0."""
        ...

    def encode_torch(self, logits_BC: Tensor, /, *, keys_B: NDArray[np.uint64] | None = None) -> dict[str, Tensor]:
        """`encode` on the tensor's own device, to the same bytes; `keys_B` stay on the host."""
        ...

    def decode_torch(self, encoded: Mapping[str, Tensor]) -> Tensor:
        """`decode` on the tensors' own device, to the same bits."""
        ...

    def decode_rows(self, encoded: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Decode to rows of the kind that `encode` takes, which is cheaper than `decode` for hidden states."""
        ...

    def logits_of(self, rows_BW: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """Return the logits that rows of this kind stand for: the rows themselves, unless they are hidden states."""
        ...

    def logits_of_torch(self, rows_BW: Tensor) -> Tensor:
        """`logits_of` on the tensor's own device."""
        ...


class LogitsEncoding(ABC):
    """The members of `Encoding` that are alike in all encodings whose rows are logits and that learn no arrays."""

    row_kind: ClassVar[RowKind] = "logits"

    @property
    def constants(self) -> Mapping[str, NDArray[Any]]:
        """No arrays: nothing is learnt."""
        return {}

    @abstractmethod
    def decode(self, encoded: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Decode rows."""

    def decode_rows(self, encoded: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Decode rows: the logits themselves."""
        return self.decode(encoded)

    def logits_of(self, rows_BW: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """Return the rows: they are logits."""
        return rows_BW

    def logits_of_torch(self, rows_BW: Tensor) -> Tensor:
        """Return the rows: they are logits."""
        return rows_BW


def row_bytes(encoding: Encoding) -> int:
    """Bytes that one row takes in all arrays together."""
    return sum(field.row_bytes for field in encoding.fields.values())


# Encoders work on blocks of about this many entries: 256 kB of float32, so that what one step writes the next finds in
# a core's second-level cache. Only the CPU does so; a device takes the whole batch at once.
_BLOCK_ENTRIES = 1 << 16


class PackedRows(LogitsEncoding):
    """An encoding whose row is one run of bytes in the array `targets`, written once over `Ops`.

    A subclass says how long a row is, and encodes and decodes arrays of either library.
    """

    classes: int

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """Bytes of one row."""

    @abstractmethod
    def _pack(self, ops: Ops, logits_BC: Array, keys_B: NDArray[np.uint64] | None) -> Array:
        """Rows to bytes, uint8 [B, size_bytes]."""

    @abstractmethod
    def _unpack(self, ops: Ops, bytes_BS: Array) -> Array:
        """Bytes to logits, float32 [B, classes]."""

    def __getstate__(self) -> dict[str, Any]:
        # What was derived stays behind: it may live on a device that the other process has not.
        return {field.name: getattr(self, field.name) for field in fields(cast("DataclassInstance", self))}

    @property
    def fields(self) -> Mapping[str, Field]:
        """One array, uint8 [rows, bytes]."""
        return {TARGETS: Field(dtype=np.dtype("u1"), row_shape=(self.size_bytes,))}

    def encode(
        self, logits_BC: NDArray[np.floating[Any]], *, keys_B: NDArray[np.uint64] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Rows to bytes; raises EncodingError for rows outside what the class's docstring names."""
        self._check_shape(logits_BC.shape, keys_B)
        packed = np.empty((len(logits_BC), self.size_bytes), dtype=np.uint8)
        for part in _blocks(len(logits_BC), self.classes):
            with rows_from(part.start):
                packed[part] = self._pack(NUMPY, logits_BC[part], None if keys_B is None else keys_B[part])
        return {TARGETS: packed}

    def decode(self, encoded: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Bytes to rows; leading dimensions (views, members) are kept."""
        packed = encoded[TARGETS]
        decoded: NDArray[np.float32] = self._unpack(NUMPY, packed.reshape(-1, self.size_bytes))
        return decoded.reshape(*packed.shape[:-1], self.classes)

    def encode_torch(self, logits_BC: Tensor, *, keys_B: NDArray[np.uint64] | None = None) -> dict[str, Tensor]:
        """Rows to bytes on their device."""
        self._check_shape(tuple(logits_BC.shape), keys_B)
        if logits_BC.device.type != "cpu" or len(logits_BC) == 0:
            return {TARGETS: self._pack(torch_ops(), logits_BC, keys_B)}
        packed = logits_BC.new_empty((len(logits_BC), self.size_bytes), dtype=torch_uint8())
        for part in _blocks(len(logits_BC), self.classes):
            with rows_from(part.start):
                packed[part] = self._pack(torch_ops(), logits_BC[part], None if keys_B is None else keys_B[part])
        return {TARGETS: packed}

    def decode_torch(self, encoded: Mapping[str, Tensor]) -> Tensor:
        """Bytes to rows on their device; leading dimensions are kept."""
        packed = encoded[TARGETS]
        decoded: Tensor = self._unpack(torch_ops(), packed.reshape(-1, self.size_bytes))
        return decoded.reshape(*packed.shape[:-1], self.classes)

    def _check_shape(self, shape: tuple[int, ...], keys_B: NDArray[np.uint64] | None) -> None:
        check_shape(shape, self.classes, None if keys_B is None else keys_B.shape)


def torch_uint8() -> Any:
    """torch.uint8, without importing torch where nobody did."""
    import torch

    return torch.uint8


@contextmanager
def rows_from(start: int) -> Iterator[None]:
    """Number the rows that an EncodingError names from `start`, where a batch is encoded in blocks."""
    try:
        yield
    except EncodingError as error:
        error.context["rows"] = [row + start for row in error.context.get("rows", [])]
        raise


def check_shape(shape: tuple[int, ...], classes: int, keys: tuple[int, ...] | None = None) -> None:
    """Let rows of the right shape pass.

    Raises:
        ShapeMismatchError: not [rows, classes], or not one key a row.
    """
    if len(shape) != 2 or shape[1] != classes:
        raise ShapeMismatchError(
            f"this encoding holds rows of {classes} classes and was given an array of shape {list(shape)}; give "
            f"[rows, {classes}]",
            shape=list(shape),
            classes=classes,
        )
    if keys is not None and keys != shape[:1]:
        raise ShapeMismatchError(f"{shape[0]} rows need as many keys, not {list(keys)}", rows=shape[0], keys=list(keys))


def shifted_rows(ops: Ops, logits_BC: Array, *, name: str, minus_inf: bool = False) -> Array:
    """Rows as float32 with their largest at 0.

    Args:
        ops: what `logits_BC` is an array of.
        logits_BC: [B, C].
        name: of the encoding, for the error.
        minus_inf: whether -inf (a class of probability 0) is to be let through.
    Raises:
        EncodingError: NaN, +inf, no finite entry, -inf where it is not let through, or a row so wide that its
            differences overflow float32.
    """
    z = ops.cast(logits_BC, "f4")
    if z.shape[0] == 0:
        return z
    high_B1 = ops.max(z)
    bad_B1 = ~ops.isfinite(high_B1)
    if not minus_inf:
        with np.errstate(over="ignore", invalid="ignore"):
            bad_B1 = bad_B1 | ~ops.isfinite(ops.min(z) - high_B1)
    rows = ops.rows_where(bad_B1[:, 0])
    if rows:
        allowed = "" if minus_inf else ", -inf (a class of probability 0) or a span beyond float32"
        raise EncodingError(
            f"{len(rows)} row(s) hold NaN, +inf{allowed}, which encoding {name!r} cannot keep; check the teacher, or "
            "mask classes by a large finite negative logit, or use an encoding that keeps every bit ('f32')",
            rows=rows,
        )
    return z - high_B1


def _blocks(rows: int, classes: int) -> list[slice]:
    step = max(1, _BLOCK_ENTRIES // classes)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
