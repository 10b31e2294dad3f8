"""What every encoding can do: turn distributions into fixed-size rows of bytes and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

TARGETS = "targets"
"""The array that holds rows kept in one array: dense logits, or packed bytes."""

NO_CONSTANTS: Mapping[str, NDArray[Any]] = {}


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
            keys_B: [rows] the rows' keys for random numbers, see `softlabels.encodings.draws.draw_keys`. Needed by
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


def row_bytes(encoding: Encoding) -> int:
    """Bytes that one row takes in all arrays together."""
    return sum(field.row_bytes for field in encoding.fields.values())
