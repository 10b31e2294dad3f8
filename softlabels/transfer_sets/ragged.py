"""What does a transfer set of sequences look like, whose samples have many positions each, and not all as many?

A sample is [length, ...]: token ids, or frames of features. `take` gives a batch of them as one array [B, L, ...] with
L the longest, filled up at the end with `PADDING` where they are whole numbers and NaN where they are floats: what is
not there is never a zero that a model would take for real. How long each is, `lengths` says. A transfer set without
`lengths` has samples of one length, all of it real. Labels, where there are any, are [B, L], one a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import BadIdsError, ShapeMismatchError
from softlabels.ids import IdArray, as_ids
from softlabels.transfer_set import UNLABELLED, Samples

PADDING = -1
"""Fills up shorter sequences of whole numbers: no token and no code has that number."""


@runtime_checkable
class SupportsLengths(Protocol):
    """A transfer set whose samples are sequences of different lengths."""

    def lengths(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many positions these samples have, [B]; without reading more of them than that takes."""
        ...


class RaggedTransferSet:
    """Sequences that lie in memory.

    Args:
        name: for people and manifests.
        sequences: [length, ...] each, signed whole numbers or floats, all of one type.
        labels: whole numbers [length] each, `UNLABELLED` where absent; None when no position has one.
        ids: unique integers or strings; 0 … N-1 when left out.
    Raises:
        BadIdsError: ids repeat. ShapeMismatchError: labels or ids that do not fit the sequences.
    """

    def __init__(
        self,
        name: str,
        sequences: Sequence[NDArray[Any]],
        *,
        labels: Sequence[NDArray[Any]] | None = None,
        ids: IdArray | None = None,
    ) -> None:
        self.name = name
        self._sequences = list(sequences)
        self._labels = None if labels is None else [np.asarray(row).astype(np.int64) for row in labels]
        self.ids: IdArray = np.arange(len(self._sequences), dtype=np.int64) if ids is None else as_ids(ids)
        if len(self.ids) != len(self._sequences):
            raise ShapeMismatchError(f"{len(self.ids)} ids do not name {len(self._sequences)} sequences: give one each")
        if len(np.unique(self.ids)) != len(self.ids):
            raise BadIdsError(f"sample ids of {name!r} repeat: each sample needs an id of its own")
        if self._labels is not None and [len(row) for row in self._labels] != [len(row) for row in self._sequences]:
            raise ShapeMismatchError(f"labels of {name!r} are not one a position: give each sequence as many as it has")

    def __len__(self) -> int:
        return len(self._sequences)

    def lengths(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many positions these samples have, [B]."""
        return np.array([len(self._sequences[position]) for position in positions.tolist()], dtype=np.int64)

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """The samples at these positions, in this order, filled up to the longest."""
        labels = None
        if self._labels is not None:
            labels = padded([self._labels[position] for position in positions.tolist()], filler=UNLABELLED)
        return Samples(
            ids=self.ids[positions],
            inputs=padded([self._sequences[position] for position in positions.tolist()]),
            labels=labels,
        )


def padded(sequences: Sequence[NDArray[Any]], *, filler: float | None = None) -> NDArray[Any]:
    """Sequences [length, ...] as one array [B, longest, ...].

    Args:
        sequences: of one type, the same beyond their length.
        filler: for what is not there; `PADDING` in whole numbers and NaN in floats when None.
    Raises:
        ShapeMismatchError: other types or shapes, or unsigned numbers, which leave no number free for padding.
    """
    arrays = [np.asarray(sequence) for sequence in sequences]
    kinds = {(array.dtype.str, array.shape[1:]) for array in arrays}
    if len(kinds) != 1 or not all(array.ndim for array in arrays):
        raise ShapeMismatchError(f"sequences of types and shapes {sorted(map(str, kinds))} cannot share a batch")
    dtype = arrays[0].dtype
    if filler is None:
        if dtype.kind not in "if":
            raise ShapeMismatchError(
                f"sequences of type {dtype} leave no number free for padding: give signed whole numbers or floats"
            )
        filler = PADDING if dtype.kind == "i" else np.nan
    longest = max(len(array) for array in arrays)
    joined = np.full((len(arrays), longest, *arrays[0].shape[1:]), filler, dtype=dtype)
    for row, array in zip(joined, arrays, strict=True):
        row[: len(array)] = array
    return joined
