"""What every encoding can do: turn distributions into fixed-size rows of bytes and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


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
    a fixed size, so that a row has an address. Decoding the same bytes gives the same bits in NumPy and torch.
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
        """JSON-able parameters that, with the name and the class count, rebuild this encoding."""
        ...

    @property
    def fields(self) -> Mapping[str, Field]:
        """The arrays that rows are kept in, by name."""
        ...

    @property
    def retemperable(self) -> bool:
        """Whether decoded rows may be brought to another temperature (a truncated or sampled row may not)."""
        ...

    def encode(self, logits_BC: NDArray[np.floating[Any]]) -> dict[str, NDArray[Any]]:
        """Encode rows.

        Args:
            logits_BC: [rows, classes], natural-log units, finite, each row's largest 0.
        Returns:
            One array a field, [rows, *row_shape].
        Raises:
            EncodingError: a row that this encoding cannot hold within its bound; `context["rows"]` are positions.
        """
        ...

    def decode(self, encoded: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Decode rows: logits_BC float32, up to a row constant."""
        ...

    def encode_torch(self, logits_BC: Tensor) -> dict[str, Tensor]:
        """`encode` on the tensor's own device, to the same bytes."""
        ...

    def decode_torch(self, encoded: Mapping[str, Tensor]) -> Tensor:
        """`decode` on the tensors' own device, to the same bits."""
        ...
