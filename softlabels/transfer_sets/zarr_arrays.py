"""How do Zarr arrays become a transfer set? Chunks are read when rows of theirs are asked for."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import JobError, MissingExtraError
from softlabels.transfer_sets.files import existing
from softlabels.transfer_sets.stored_arrays import Columns, StoredArrays


class ZarrColumn:
    """A Zarr array: consecutive rows by a slice, others so that each chunk is read once."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __len__(self) -> int:
        return int(self._array.shape[0])

    def rows(self, positions: NDArray[np.int64]) -> NDArray[Any]:
        """The rows at these positions, [B, ...], in this order; positions may repeat."""
        wanted, back = np.unique(positions, return_inverse=True)
        if len(wanted) and wanted[-1] - wanted[0] == len(wanted) - 1:
            found = np.asarray(self._array[int(wanted[0]) : int(wanted[-1]) + 1])
        else:
            found = np.asarray(self._array.oindex[wanted])
        return found if np.array_equal(wanted, positions) else found[back.reshape(-1)]


def zarr_arrays(
    path: str,
    inputs: str = "inputs",
    labels: str | None = None,
    ids: str | None = None,
    name: str | None = None,
    base: Path | None = None,
) -> StoredArrays:
    """Samples in arrays of a Zarr group, format 2 or 3.

    Args:
        path: the group's folder.
        inputs: the array with the inputs, [N, ...], by its path in the group: "train/images".
        labels: the array with whole numbers [N], -1 for none; unlabelled when left out.
        ids: the array with integers or strings [N]; positions when left out.
        name: of the transfer set; the folder's when left out.
        base: the folder that relative paths start from.
    Raises:
        JobError, DataUnavailableError: no such group or array. MissingExtraError: no zarr.
    """
    folder = existing(path, base, what="Zarr group")
    keys = {"inputs": inputs, "labels": labels, "ids": ids}
    chosen = {key: array for key, array in keys.items() if array is not None}
    return StoredArrays(name or folder.stem, partial(_opened, folder, chosen), (folder,))


def _opened(folder: Path, keys: dict[str, str]) -> Columns:
    try:
        import zarr
    except ImportError as error:
        raise MissingExtraError(
            "reading Zarr needs zarr, which is not installed: `pip install softlabels[store]`", extra="store"
        ) from error
    try:
        group = zarr.open_group(folder, mode="r")
    except (OSError, ValueError, KeyError) as error:
        raise JobError(f"{folder} cannot be opened as a Zarr group: {error}") from error
    return Columns(**{key: ZarrColumn(_array(zarr, group, array, folder)) for key, array in keys.items()})


def _array(zarr: Any, group: Any, path: str, folder: Path) -> Any:
    try:
        found = group[path]
    except KeyError as error:
        known = ", ".join(sorted(group.keys())[:20])
        raise JobError(f"Zarr group {folder} has no array {path!r}: it has {known or 'nothing'}") from error
    if not isinstance(found, zarr.Array) or not found.shape:
        raise JobError(f"{path!r} of Zarr group {folder} is no array of samples")
    return found
