"""Arrays in npy, Zarr and HDF5 files: rows are read on demand, and nothing is kept in memory.

Shapes: N samples, B of them in a batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import JobError, ShapeMismatchError, UnreadableSampleError
from softlabels.extras import needs_extra
from softlabels.ids import IdArray, as_ids
from softlabels.manifest import IdSpec
from softlabels.mapping_guard import GuardedRange
from softlabels.transfer_set import Samples
from softlabels.transfer_sets.sample_ids import IDS_PER_BLOCK, examine_ids
from softlabels.transfer_sets.source_files import NPY_ERRORS, FileTransferSet, existing_path
from softlabels.transfer_sets.sources import Source

OpenArrays = Callable[[], dict[str, Any]]
ReadRows = Callable[[Any, NDArray[np.int64]], NDArray[Any]]


class StoredArrays(FileTransferSet):
    """Samples whose inputs, labels and ids are arrays on disk. Safe for threads and fork; pickling re-opens the files.

    Args:
        name: name for messages and manifests.
        open_arrays: returns the libraries' own arrays under "inputs" and, where there are any, "labels" and "ids"; a
            function of a module with its arguments bound, so that it can be pickled.
        read: returns an array's rows at some positions, in their order; positions may repeat.
        files: files that it opens, for `identity`; folders stand for all files in them.
        spec: how a store keeps the ids, if known already; else every id is read once.
    Raises:
        ShapeMismatchError: the arrays differ in length. BadIdsError: an id occurs twice.
    """

    def __init__(
        self, name: str, open_arrays: OpenArrays, read: ReadRows, files: Sequence[Path], spec: IdSpec | None = None
    ) -> None:
        self._open, self._read = open_arrays, read
        self._opened, self._pid = open_arrays(), os.getpid()
        lengths = {key: int(array.shape[0]) for key, array in self._opened.items()}
        self._count = lengths["inputs"]
        if len(set(lengths.values())) > 1:
            raise ShapeMismatchError(f"the arrays of {name!r} differ in length: {lengths}")
        if spec is None and "ids" in self._opened:
            spec = examine_ids(self.all_ids(), self._count, name)
        super().__init__(name, files, spec or IdSpec(kind="int", dense_start=0))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self._open, self._read, self._files, self._spec)

    def __len__(self) -> int:
        return self._count

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """Return the samples at these positions. Raises JobError, besides others, if labels are not integers."""
        try:
            rows = {key: self._read(array, positions) for key, array in self._arrays().items()}
        except OSError as error:
            raise UnreadableSampleError(
                f"samples {int(positions.min())} to {int(positions.max())} of {self.name!r} cannot be read ({error}): "
                f"check {', '.join(map(str, self._files[:3]))}"
            ) from error
        labels = rows.get("labels")
        if labels is not None and (labels.dtype.kind not in "iu" or labels.ndim != 1):
            raise JobError(
                f"labels of {self.name!r} are {labels.dtype}{list(labels.shape[1:])} per sample, not one integer; use "
                "-1 for no label"
            )
        return Samples(
            ids=_as_ids(rows["ids"]) if "ids" in rows else positions.astype(np.int64),
            inputs=rows["inputs"],
            labels=None if labels is None else labels.astype(np.int64),
        )

    def _arrays(self) -> dict[str, Any]:
        if self._pid != os.getpid():  # open files and the locks of their libraries do not survive a fork
            self._opened, self._pid = self._open(), os.getpid()
        return self._opened

    def all_ids(self) -> Iterator[IdArray]:
        """Yield the ids of the array of ids."""
        for start in range(0, self._count, IDS_PER_BLOCK):
            yield _as_ids(self._read(self._arrays()["ids"], np.arange(start, min(start + IDS_PER_BLOCK, self._count))))


class NpySource(Source, frozen=True, kw_only=True):
    """Samples in .npy files, mapped into memory.

    Attributes:
        inputs: file with the inputs, [N, ...]; with `dtype` and `shape`, numbers without a header.
        labels: file with integers [N], -1 for none; unlabelled when left out.
        ids: file with integers or strings [N]; positions when left out.
        dtype, shape: type and shape of one sample in a file without a header, such as "<f4" and [3, 32, 32].
        name: by default the name of the inputs' file.
    """

    inputs: str
    labels: str | None = None
    ids: str | None = None
    dtype: str | None = None
    shape: list[int] | None = None

    def __post_init__(self) -> None:
        if (self.dtype is None) != (self.shape is None):
            raise ValueError("a file without a header needs both `dtype` and `shape` of a sample, a .npy file neither")

    def load(self, base: Path | None) -> StoredArrays:
        """Return the samples."""
        paths = {key: existing_path(path, base, what=f"file of {key}") for key, path in _array_names(self).items()}
        sample = None if self.dtype is None else (self.dtype, tuple(self.shape or ()))
        open_arrays = partial(_open_npy, paths, sample)
        return StoredArrays(self.name or paths["inputs"].stem, open_arrays, _read_mapped, tuple(paths.values()))


class _NamedArrays(Source, frozen=True, kw_only=True):
    """Samples in named arrays of one file or folder.

    Attributes:
        path: the file or folder; its name is the transfer set's by default.
        inputs: array of inputs, [N, ...], by its path in the file: "train/images".
        labels: array of integers [N], -1 for none; unlabelled when left out.
        ids: array of integers or strings [N]; positions when left out.
    """

    path: str
    inputs: str = "inputs"
    labels: str | None = None
    ids: str | None = None


class Hdf5Source(_NamedArrays, frozen=True, kw_only=True):
    """Samples in data sets of an HDF5 file; arguments as for Zarr."""

    def load(self, base: Path | None) -> StoredArrays:
        """Return the samples."""
        file = existing_path(self.path, base, what="HDF5 file")
        open_arrays = partial(_open_hdf5, file, _array_names(self))
        # No lock is needed: h5py holds its own around every call.
        return StoredArrays(self.name or file.stem, open_arrays, _read_hdf5, (file,))


class ZarrSource(_NamedArrays, frozen=True, kw_only=True):
    """Samples in arrays of a Zarr group, format 2 or 3."""

    def load(self, base: Path | None) -> StoredArrays:
        """Return the samples."""
        folder = existing_path(self.path, base, what="Zarr group")
        open_arrays = partial(_open_zarr, folder, _array_names(self))
        return StoredArrays(self.name or folder.stem, open_arrays, _read_zarr, (folder,))


def _array_names(source: NpySource | _NamedArrays) -> dict[str, str]:
    names = {"inputs": source.inputs, "labels": source.labels, "ids": source.ids}
    return {key: name for key, name in names.items() if name is not None}


def _open_npy(paths: dict[str, Path], sample: tuple[str, tuple[int, ...]] | None) -> dict[str, Any]:
    return {key: _mapped(path, sample if key == "inputs" else None) for key, path in paths.items()}


def _open_hdf5(path: Path, names: dict[str, str]) -> dict[str, Any]:
    with needs_extra("store", "reading HDF5 files"):
        import h5py
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise JobError(f"{path} cannot be opened as an HDF5 file: {error}") from error
    return {key: _dataset(h5py, file, name, path) for key, name in names.items()}


def _open_zarr(folder: Path, names: dict[str, str]) -> dict[str, Any]:
    with needs_extra("store", "reading Zarr groups"):
        import zarr
    try:
        group = zarr.open_group(folder, mode="r")
    except (OSError, ValueError, KeyError) as error:
        raise JobError(f"{folder} cannot be opened as a Zarr group: {error}") from error
    return {key: _zarr_array(zarr, group, name, folder) for key, name in names.items()}


class _MappedArray:
    """An array that is mapped from a file; reading one that was cut meanwhile raises OSError, and no SIGBUS."""

    def __init__(self, array: NDArray[Any]) -> None:
        self.shape, self._array = array.shape, array
        self._guard = GuardedRange(array.ctypes.data, array.nbytes)

    def rows(self, positions: NDArray[np.int64]) -> NDArray[Any]:
        """Return copies of the rows at these positions. Raises OSError."""
        found = np.asarray(self._array[positions])
        # Also for pages that an earlier read lost: they stay zeros for as long as the file is mapped.
        if self._guard.lost_pages:
            raise OSError("the file became shorter after it was opened")
        return found


def _mapped(path: Path, sample: tuple[str, tuple[int, ...]] | None) -> _MappedArray:
    try:
        if sample is not None:
            dtype = np.dtype(sample)
            if dtype.hasobject or path.stat().st_size % dtype.itemsize:
                raise ValueError(f"{path.stat().st_size} bytes are not a whole number of samples of {dtype.itemsize}")
            return _MappedArray(np.memmap(path, dtype=dtype, mode="r"))
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except NPY_ERRORS as error:
        raise JobError(f"{path} cannot be mapped as an array of numbers or strings: {error}") from error
    if not isinstance(array, np.ndarray):
        raise JobError(f"{path} holds several arrays, which cannot be mapped: save each as a .npy file")
    if array.ndim == 0:
        raise JobError(f"{path} holds a single number, not an array of samples")
    return _MappedArray(array)


def _dataset(h5py: Any, file: Any, name: str, path: Path) -> Any:
    if name not in file:
        known: list[str] = []
        file.visititems(lambda inner, node: known.append(inner) if isinstance(node, h5py.Dataset) else None)
        raise JobError(f"{path} has no data set {name!r}: it has {', '.join(known[:20]) or 'none'}")
    found = file[name]
    if not isinstance(found, h5py.Dataset) or not found.shape:
        raise JobError(f"{name!r} of {path} is not a data set of samples")
    return found


def _zarr_array(zarr: Any, group: Any, path: str, folder: Path) -> Any:
    try:
        found = group[path]
    except KeyError as error:
        known = ", ".join(sorted(group.keys())[:20])
        raise JobError(f"Zarr group {folder} has no array {path!r}: it has {known or 'nothing'}") from error
    if not isinstance(found, zarr.Array) or not found.shape:
        raise JobError(f"{path!r} of Zarr group {folder} is not an array of samples")
    return found


def _read_mapped(array: _MappedArray, positions: NDArray[np.int64]) -> NDArray[Any]:
    return array.rows(positions)


def _read_hdf5(array: Any, positions: NDArray[np.int64]) -> NDArray[Any]:
    # Runs of consecutive rows are read as slices, because h5py's own fancy indexing is slow for long lists.
    wanted, back = np.unique(positions, return_inverse=True)
    cuts = np.flatnonzero(np.diff(wanted) != 1) + 1
    runs = [np.asarray(array[int(run[0]) : int(run[-1]) + 1]) for run in np.split(wanted, cuts) if len(run)]
    found: NDArray[Any] = np.concatenate(runs) if runs else np.asarray(array[:0])
    return found if np.array_equal(wanted, positions) else found[back.reshape(-1)]


def _read_zarr(array: Any, positions: NDArray[np.int64]) -> NDArray[Any]:
    # Consecutive rows by a slice; for others `oindex` reads each chunk once.
    wanted, back = np.unique(positions, return_inverse=True)
    if len(wanted) and wanted[-1] - wanted[0] == len(wanted) - 1:
        found = np.asarray(array[int(wanted[0]) : int(wanted[-1]) + 1])
    else:
        found = np.asarray(array.oindex[wanted])
    return found if np.array_equal(wanted, positions) else found[back.reshape(-1)]


def _as_ids(stored: NDArray[Any]) -> IdArray:
    # Files store strings in many ways: fixed or variable length, as text or as UTF-8 bytes.
    if stored.dtype.kind == "S":
        return as_ids(np.char.decode(stored, "utf-8"))
    if stored.dtype.kind in "OT":
        return as_ids([entry.decode() if isinstance(entry, bytes) else entry for entry in stored.tolist()])
    return as_ids(stored)
