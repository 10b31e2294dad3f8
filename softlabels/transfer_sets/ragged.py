"""Sequences of different lengths: the convention for padded batches, and a transfer set of sequences in memory.

A sample is [length, ...]: token ids, or frames of features. `take` returns a batch as one array [B, L, ...], L the
longest, padded at the end with `PADDING` (integers) or NaN (floats): never zeros, which a model would take for data.
`lengths` gives the length of each sample; without that method all samples have one length. Labels are [B, L], one per
position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import BadIdsError, ShapeMismatchError
from softlabels.ids import IdArray, as_ids
from softlabels.transfer_set import UNLABELLED, Samples

PADDING = -1
"""Pads sequences of integers: no token has that number."""


class RaggedTransferSet:
    """Sequences in memory.

    Args:
        name: name for messages and manifests.
        sequences: [length, ...] each, signed integers or floats, all of one type.
        labels: integers [length] each, `UNLABELLED` where absent; None when no position has one.
        ids: unique integers or strings; 0 … N-1 when None.
    Raises:
        BadIdsError: ids repeat. ShapeMismatchError: labels or ids do not fit the sequences.
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
            raise ShapeMismatchError(f"{len(self.ids)} ids for {len(self._sequences)} sequences: give one each")
        if len(np.unique(self.ids)) != len(self.ids):
            raise BadIdsError(f"sample ids of {name!r} repeat: each sample needs its own id")
        if self._labels is not None and [len(row) for row in self._labels] != [len(row) for row in self._sequences]:
            raise ShapeMismatchError(f"labels of {name!r} are not one per position: give each sequence as many labels")

    def __len__(self) -> int:
        return len(self._sequences)

    def lengths(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the length of each of these samples, [B]."""
        return np.array([len(self._sequences[position]) for position in positions.tolist()], dtype=np.int64)

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """Return the samples at these positions, in this order, padded to the longest."""
        labels = None
        if self._labels is not None:
            labels = pad_sequences([self._labels[position] for position in positions.tolist()], value=UNLABELLED)
        inputs = pad_sequences([self._sequences[position] for position in positions.tolist()])
        return Samples(ids=self.ids[positions], inputs=inputs, labels=labels)


def pad_sequences(sequences: Sequence[NDArray[Any]], *, value: float | None = None) -> NDArray[Any]:
    """Return sequences [length, ...] as one array [B, longest, ...].

    Args:
        sequences: arrays of one type, with the same shape beyond their length.
        value: padding; `PADDING` for integers and NaN for floats when None.
    Raises:
        ShapeMismatchError: types or shapes differ, or unsigned integers, which leave no number free for padding.
    """
    arrays = [np.asarray(sequence) for sequence in sequences]
    kinds = {(array.dtype.str, array.shape[1:]) for array in arrays}
    if len(kinds) != 1 or not all(array.ndim for array in arrays):
        raise ShapeMismatchError(f"sequences of types and shapes {sorted(map(str, kinds))} cannot share a batch")
    dtype = arrays[0].dtype
    if value is None:
        if dtype.kind not in "if":
            raise ShapeMismatchError(
                f"sequences of type {dtype} leave no number free for padding: use signed integers or floats"
            )
        value = PADDING if dtype.kind == "i" else np.nan
    longest = max(len(array) for array in arrays)
    joined = np.full((len(arrays), longest, *arrays[0].shape[1:]), value, dtype=dtype)
    for row, array in zip(joined, arrays, strict=True):
        row[: len(array)] = array
    return joined
