"""Map-style torch data sets: items by position, which must be the same each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from softlabels.transfer_sets.source_files import NPY_ERRORS, existing_path, file_states, match_files
from softlabels.transfer_sets.sources import Source

_PROBED_ITEMS = 3
"""Items that are read twice to find random augmentation: the first, the last, and one between."""


class TorchDataset(SequenceTransferSet):
    """Samples of a map-style torch data set; `files` are those that the job says it reads."""

    files: Sequence[Path] = ()

    def identity(self) -> Iterator[tuple[str, str]]:
        """Yield size and modification time of the files."""
        return file_states(self.files)

    def id_spec(self) -> IdSpec:
        """Return how a store keeps the ids. Raises BadIdsError: an id occurs twice."""
        if self.ids is None:
            return IdSpec(kind="int", dense_start=0)
        return examine_ids([self.ids], len(self), self.name)


class SelectedItems:
    """A data set of (input, label) pairs, or of inputs alone, taken from items that are tuples or mappings."""

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


class TorchSource(Source, frozen=True, kw_only=True):
    """Samples of a map-style `torch.utils.data.Dataset`, or of anything with `len` and items by position.

    Attributes:
        dataset: reference to a callable that returns the data set, or to the data set itself.
        arguments: keyword arguments of the callable.
        input_key, label_key: index or key in items that are tuples or mappings; when both are left out, an item is an
            input, or a tuple (input, label, …).
        ids: attribute of the data set with the ids, or a .npy file of them; positions when left out.
        files: files that the data set reads, `*` and `{0..9}` allowed: a job that resumes checks that none changed.
        name: by default the class name of the data set.
    """

    dataset: str
    arguments: dict[str, Any] | None = None
    input_key: int | str | None = None
    label_key: int | str | None = None
    ids: str | None = None
    files: str | list[str] | None = None

    def load(self, base: Path | None) -> TorchDataset:
        """Return the samples.

        Raises:
            JobError: an iterable data set, or one whose items change from read to read.
        """
        made = self._make(load_reference(self.dataset, base=base))
        _refuse_iterable(made, self.dataset)
        items = made
        if self.input_key is not None or self.label_key is not None:
            items = SelectedItems(made, self.input_key or 0, self.label_key)
        found = TorchDataset(items, ids=_ids(made, self.ids, base), name=self.name or type(made).__name__)
        found.files = match_files(self.files or [], base, what="files of the data set")
        _refuse_random_items(found, self.dataset)
        return found

    def _make(self, maker: Any) -> Any:
        if _is_map_style(maker) and not isinstance(maker, type):
            return maker
        if not callable(maker):
            raise JobError(f"{self.dataset} is a {type(maker).__name__}: neither a data set nor a callable")
        arguments = self.arguments or {}
        try:
            return cast("Callable[..., Any]", maker)(**arguments)
        except TypeError as error:
            raise JobError(f"data set {self.dataset} does not take {arguments}: {error}") from error


def _is_map_style(value: Any) -> bool:
    return hasattr(value, "__getitem__") and hasattr(value, "__len__")


def _refuse_iterable(made: Any, dataset: str) -> None:
    import torch.utils.data

    # torch's IterableDataset inherits a `__getitem__` that only raises.
    if isinstance(made, torch.utils.data.IterableDataset) or not _is_map_style(made):
        raise JobError(
            f"data set {dataset} gives a {type(made).__name__}, which has no items by position: its samples have no "
            "stable ids and a job could not resume. Use a map-style data set (`__len__` and `__getitem__`), or write "
            "the samples to webdataset tars, Parquet or arrays"
        )


def _ids(made: Any, ids: str | None, base: Path | None) -> IdArray | None:
    if ids is None:
        return None
    if not ids.endswith(".npy"):
        if not hasattr(made, ids):
            raise JobError(f"the data set has no attribute {ids!r} with the ids; a file of ids ends with .npy")
        found = getattr(made, ids)
        return as_ids(np.asarray(found) if hasattr(found, "__array__") else found)
    path = existing_path(ids, base, what="file of ids")
    try:
        stored: NDArray[Any] = np.load(path, allow_pickle=False)
    except NPY_ERRORS as error:
        raise JobError(f"{path} cannot be read as an array of ids: {error}") from error
    return as_ids(stored)


def _refuse_random_items(found: TorchDataset, dataset: str) -> None:
    # A data set that augments at random would give the teacher one input and the student another.
    last, count = max(0, len(found) - 1), min(_PROBED_ITEMS, len(found))
    for position in np.unique(np.linspace(0, last, count).astype(np.int64)):
        first, second = (found.take(np.array([position])) for _ in range(2))
        if not np.array_equal(first.inputs, second.inputs, equal_nan=first.inputs.dtype.kind == "f"):
            raise JobError(
                f"data set {dataset} returns another input when item {position} is read again: it augments at random. "
                "Leave out random transforms, so that the student sees the inputs that the teacher saw"
            )
