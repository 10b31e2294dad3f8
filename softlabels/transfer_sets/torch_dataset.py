"""How does a map-style torch data set become a transfer set? Items by position, the same each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import JobError
from softlabels.ids import IdArray, as_ids
from softlabels.manifest import IdSpec
from softlabels.references import load_reference
from softlabels.transfer_set import MapStyleDataset, SequenceTransferSet
from softlabels.transfer_sets.sample_ids import examine_ids
from softlabels.transfer_sets.source_files import existing, file_identities, matching

_PROBED = 3
"""Items that are asked for twice: the first, the last, and one between."""


class TorchDataset(SequenceTransferSet):
    """Samples of a map-style torch data set, with what a store wants to know of their ids.

    Attributes:
        files: those that the data set reads, as far as its owner named them.
    """

    files: tuple[Path, ...] = ()

    def identity(self) -> Iterator[tuple[str, str]]:
        """Size and time of modification of the files."""
        return file_identities(self.files)

    def id_spec(self) -> IdSpec:
        """How a store keeps the ids. Raises BadIdsError: one stands twice."""
        if self.ids is None:
            return IdSpec(kind="int", dense_start=0)
        return examine_ids([self.ids], len(self), self.name)


class Picked:
    """A data set of (input, label) pairs made of one whose items are tuples or mappings.

    Args:
        items: the data set.
        input_key: position or key of the input in each item.
        label_key: of the label; None where there is none.
    """

    def __init__(self, items: MapStyleDataset, input_key: int | str, label_key: int | str | None) -> None:
        self._items, self._input_key, self._label_key = items, input_key, label_key

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, position: int) -> Any:
        item = self._items[position]
        try:
            found = item[self._input_key]
            return found if self._label_key is None else (found, item[self._label_key])
        except (KeyError, IndexError, TypeError) as error:
            shape = ", ".join(map(str, item)) if isinstance(item, Mapping) else f"{type(item).__name__}"
            raise JobError(
                f"item {position} of the data set has no {self._input_key!r} or {self._label_key!r}: it is {shape}"
            ) from error


def torch_dataset(
    dataset: str,
    arguments: dict[str, Any] | None = None,
    input_key: int | str | None = None,
    label_key: int | str | None = None,
    ids: str | None = None,
    files: str | list[str] | None = None,
    name: str | None = None,
    base: Path | None = None,
) -> TorchDataset:
    """Samples of a map-style `torch.utils.data.Dataset`, or of anything with `len` and items by position.

    Args:
        dataset: a reference to what makes it, or to the data set itself.
        arguments: for what makes it.
        input_key, label_key: where an item that is a tuple or a mapping has them; when both are left out, an item is an
            input, or a tuple (input, label, …).
        ids: an attribute of the data set with the samples' ids, or a .npy file of them; positions when left out.
        files: that the data set reads, with `*` and `{0..9}`: noted when the job begins, and compared when it goes on.
        name: of the transfer set; the data set's class when left out.
        base: the folder that relative paths and file references start from.
    Raises:
        JobError: an iterable data set, one that gives another item the second time, or items of no known form.
    """
    made = _made(load_reference(dataset, base=base), dataset, arguments or {})
    _refuse_iterable(made, dataset)
    items = made if input_key is None and label_key is None else Picked(made, input_key or 0, label_key)
    found = TorchDataset(items, ids=_ids(made, ids, base), name=name or type(made).__name__)
    found.files = tuple(matching(files or [], base, what="files of the data set"))
    _refuse_restless(found, dataset)
    return found


def _made(maker: Any, dataset: str, arguments: dict[str, Any]) -> Any:
    is_one = hasattr(maker, "__getitem__") and hasattr(maker, "__len__") and not isinstance(maker, type)
    if is_one:
        return maker
    if not callable(maker):
        raise JobError(f"{dataset} is a {type(maker).__name__}: neither a data set nor something that makes one")
    try:
        return cast("Callable[..., Any]", maker)(**arguments)
    except TypeError as error:
        raise JobError(f"data set {dataset} does not take {arguments}: {error}") from error


def _refuse_iterable(made: Any, dataset: str) -> None:
    import torch.utils.data

    mapped = hasattr(made, "__getitem__") and hasattr(made, "__len__")
    if isinstance(made, torch.utils.data.IterableDataset) or not mapped:
        raise JobError(
            f"data set {dataset} gives a {type(made).__name__}, which has no items by position: a sample of it has no "
            "id that lasts, a shard could not be computed again, and a job not go on where it stopped. Use a map-style "
            "data set (`__len__` and `__getitem__`), or write the samples to webdataset tars, Parquet or arrays"
        )


def _ids(made: Any, ids: str | None, base: Path | None) -> IdArray | None:
    if ids is None:
        return None
    if not ids.endswith(".npy"):
        if not hasattr(made, ids):
            raise JobError(f"the data set has no attribute {ids!r} with the ids; a file of ids ends with .npy")
        found = getattr(made, ids)
        return as_ids(np.asarray(found) if hasattr(found, "__array__") else found)
    path = existing(ids, base, what="file of ids")
    try:
        kept: NDArray[Any] = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise JobError(f"{path} cannot be read as an array of ids: {error}") from error
    return as_ids(kept)


def _refuse_restless(found: TorchDataset, dataset: str) -> None:
    """A data set that augments at random gives the teacher one input and the student another."""
    for position in np.unique(np.linspace(0, max(0, len(found) - 1), min(_PROBED, len(found))).astype(np.int64)):
        once, again = (found.take(np.array([position])) for _ in range(2))
        if not np.array_equal(once.inputs, again.inputs, equal_nan=once.inputs.dtype.kind == "f"):
            raise JobError(
                f"data set {dataset} gives another input the second time that item {position} is asked for: it "
                "augments at random. Leave its random transforms out, so that a student can show the very inputs that "
                "the teacher saw"
            )
