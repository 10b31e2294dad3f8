"""How do HDF5 data sets become a transfer set? Rows are read when they are asked for."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from softlabels.errors import JobError, MissingExtraError
from softlabels.transfer_sets.files import existing
from softlabels.transfer_sets.stored_arrays import Columns, SlicedColumn, StoredArrays


def hdf5_arrays(
    path: str,
    inputs: str = "inputs",
    labels: str | None = None,
    ids: str | None = None,
    name: str | None = None,
    base: Path | None = None,
) -> StoredArrays:
    """Samples in data sets of an HDF5 file.

    Args:
        path: the file.
        inputs: the data set with the inputs, [N, ...], by its path in the file: "train/images".
        labels: the data set with whole numbers [N], -1 for none; unlabelled when left out.
        ids: the data set with integers or strings [N]; positions when left out.
        name: of the transfer set; the file's when left out.
        base: the folder that relative paths start from.
    Raises:
        JobError, DataUnavailableError: no such file or data set. MissingExtraError: no h5py.
    """
    file = existing(path, base, what="HDF5 file")
    keys = {"inputs": inputs, "labels": labels, "ids": ids}
    chosen = {key: array for key, array in keys.items() if array is not None}
    return StoredArrays(name or file.stem, partial(_opened, file, chosen), (file,), one_at_a_time=True)


def _opened(path: Path, keys: dict[str, str]) -> Columns:
    try:
        import h5py
    except ImportError as error:
        raise MissingExtraError(
            "reading HDF5 needs h5py, which is not installed: `pip install softlabels[store]`", extra="store"
        ) from error
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise JobError(f"{path} cannot be opened as an HDF5 file: {error}") from error
    return Columns(**{key: SlicedColumn(_dataset(h5py, file, name, path)) for key, name in keys.items()})


def _dataset(h5py: Any, file: Any, name: str, path: Path) -> Any:
    if name not in file:
        known: list[str] = []
        file.visititems(lambda inner, node: known.append(inner) if isinstance(node, h5py.Dataset) else None)
        raise JobError(f"{path} has no data set {name!r}: it has {', '.join(known[:20]) or 'none'}")
    found = file[name]
    if not isinstance(found, h5py.Dataset) or not found.shape:
        raise JobError(f"{name!r} of {path} is no data set of samples")
    return found
