"""How do a trainer's own data become samples with ids? Transfer sets bring them, sequences get them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import BadIdsError, RequestError, ShapeMismatchError
from softlabels.ids import as_ids
from softlabels.softmath import UNLABELLED
from softlabels.transfer import ArrayTransferSet, Samples, TransferSet


class MapStyle(Protocol):
    """Anything with a length and items by position: a list, an array, a map-style torch data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: Any, /) -> Any: ...


class SequenceTransferSet:
    """Samples of a sequence or a map-style torch data set.

    Args:
        items: each one an input (an array or a tensor), or a tuple (input, label).
        ids: [N], unique; the ids that the targets were computed under.
        name: for people.
    Raises:
        BadIdsError: ids repeat. ShapeMismatchError: there are not as many ids as items.
    """

    def __init__(self, items: MapStyle, *, ids: Iterable[Any] | NDArray[Any], name: str = "inputs") -> None:
        self._items = items
        self._ids = as_ids(ids)
        self._name = name
        if len(self._ids) != len(items):
            raise ShapeMismatchError(f"{len(self._ids)} ids do not name {len(items)} inputs: give one id an input")
        if len(np.unique(self._ids)) != len(self._ids):
            raise BadIdsError("sample ids of the inputs repeat: each sample needs an id of its own")

    @property
    def name(self) -> str:
        """A short name for people."""
        return self._name

    def __len__(self) -> int:
        return len(self._items)

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """The samples at these positions, in this order; positions may repeat.

        Raises:
            ShapeMismatchError: inputs of different shapes.
        """
        items = [self._items[position] for position in positions.tolist()]
        with_labels = all(isinstance(item, tuple) and len(item) >= 2 for item in items)
        inputs = [np.asarray(item[0] if with_labels else item) for item in items]
        shapes = sorted({array.shape for array in inputs})
        if len(shapes) > 1:
            raise ShapeMismatchError(
                f"inputs of shapes {shapes[:4]} cannot share a batch: bring them to one shape first"
            )
        labels = None
        if with_labels:
            labels = np.array([UNLABELLED if item[1] is None else int(item[1]) for item in items], dtype=np.int64)
        return Samples(ids=self._ids[positions], inputs=np.stack(inputs), labels=labels)


def as_transfer_set(inputs: TransferSet | MapStyle, ids: Iterable[Any] | NDArray[Any] | None) -> TransferSet:
    """The trainer's data as a transfer set.

    Args:
        inputs: a transfer set, which knows its ids, or a sequence, an array or a map-style torch data set.
        ids: for the latter; None for a transfer set.
    Raises:
        RequestError: ids are missing, or given twice.
    """
    # Arrays and tensors can `take` too, but have no name.
    if hasattr(inputs, "take") and isinstance(getattr(inputs, "name", None), str):
        if ids is not None:
            raise RequestError("a transfer set brings its own ids: leave `ids` out, or pass the bare inputs with `ids`")
        return cast(TransferSet, inputs)
    if ids is None:
        raise RequestError(
            "these inputs have no sample ids: pass `ids`, the ids that their targets were computed under; a position "
            "in a shuffled or filtered data set is no id, and targets would go to other samples without a sign"
        )
    if isinstance(inputs, np.ndarray):
        return ArrayTransferSet("inputs", inputs, ids=as_ids(ids))
    return SequenceTransferSet(cast(MapStyle, inputs), ids=ids, name=type(inputs).__name__)
