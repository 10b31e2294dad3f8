"""How do a trainer's inputs become samples with ids? Transfer sets and stores bring them, sequences get them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import RequestError, UnknownFieldError
from softlabels.ids import as_ids
from softlabels.opening import INPUTS, TargetStore
from softlabels.transfer import ArrayTransferSet, MapStyle, Samples, SequenceTransferSet, TransferSet


class StoreInputs:
    """The samples that a store keeps beside its targets, near or far, as a transfer set of their own.

    Args:
        store: what `softlabels.open` returned.
        ids: [N] of the samples to take; all of the store's when None.
    Raises:
        UnknownFieldError: the store keeps no inputs.
    """

    def __init__(self, store: TargetStore, ids: Iterable[Any] | NDArray[Any] | None = None) -> None:
        if INPUTS not in store.manifest.arrays:
            raise UnknownFieldError(
                f"{store.manifest.name!r} keeps no inputs, so a student cannot be trained from it alone: pass the "
                "inputs, or precompute with `inputs = true` in the job's [store] table",
                field=INPUTS,
            )
        self._store = store
        self.ids = store.ids() if ids is None else as_ids(ids)

    @property
    def name(self) -> str:
        """The name of the transfer set that the targets were computed for."""
        return self._store.manifest.transfer_set.name

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """The samples at these positions, in this order; positions may repeat. One request."""
        targets = self._store.batch(self.ids[positions], inputs=True)
        assert targets.inputs is not None
        return Samples(ids=targets.ids, inputs=targets.inputs, labels=targets.labels)


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
