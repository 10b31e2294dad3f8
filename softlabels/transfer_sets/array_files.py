"""Arrays in npy, Zarr and HDF5 files: rows are read when they are asked for, and nothing is kept in memory.

Shapes: N samples, B of them in a batch.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import JobError, ShapeMismatchError, UnreadableSampleError
from softlabels.extras import needs_extra
from softlabels.ids import IdArray, as_ids
from softlabels.manifest import IdSpec
from softlabels.transfer_set import Samples
from softlabels.transfer_sets.sample_ids import examine_ids
from softlabels.transfer_sets.source_files import FileTransferSet, existing_path
from softlabels.transfer_sets.sources import Source

_IDS_PER_BLOCK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Column:
    """An array in a file.

    Attributes:
        array: the library's own array, with a `shape`.
        read: returns the rows at some positions, [B, ...], in their order; positions may repeat.
    """

    array: Any
    read: Callable[[Any, NDArray[np.int64]], NDArray[Any]]

    def __len__(self) -> int:
        return int(self.array.shape[0])

    def rows(self, positions: NDArray[np.int64]) -> NDArray[Any]:
        """Return the rows at these positions."""
        return self.read(self.array, positions)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Arrays of one length that make a transfer set; None where there are no labels or ids."""

    inputs: Column
    labels: Column | None = None
    ids: Column | None = None


class StoredArrays(FileTransferSet):
    """Samples whose inputs, labels and ids are arrays on disk. Safe for threads and fork; pickling re-opens files.

    Args:
        name: name for messages and manifests.
        open_columns: opens the files; a module's function with its arguments bound, so that it can be pickled.
        files: files that it opens, for `identity`; folders stand for all files in them.
        one_at_a_time: whether reads have to be serialised.
        spec: how a store keeps the ids, if known already; else every id is read once.
    Raises:
        ShapeMismatchError: the arrays differ in length. BadIdsError: an id occurs twice.
    """

    def __init__(
        self,
        name: str,
        open_columns: Callable[[], Columns],
        files: Sequence[Path],
        one_at_a_time: bool = False,
        spec: IdSpec | None = None,
    ) -> None:
        self._open, self._one_at_a_time = open_columns, one_at_a_time
        self._lock = threading.RLock()
        self._opened, self._pid = open_columns(), os.getpid()
        lengths = {key: len(column) for key, column in vars(self._opened).items() if column is not None}
        self._count = lengths["inputs"]
        if len(set(lengths.values())) > 1:
            raise ShapeMismatchError(f"the arrays of {name!r} differ in length: {lengths}")
        super().__init__(name, files, spec or self._examine(name))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self._open, self._files, self._one_at_a_time, self._spec)

    def __len__(self) -> int:
        return self._count

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """Return the samples at these positions, in this order; positions may repeat.

        Raises:
            UnreadableSampleError: a file cannot be read. JobError: labels are not integers.
        """
        columns = self._columns()
        try:
            if self._one_at_a_time:
                with self._lock:
                    return self._take(columns, positions)
            return self._take(columns, positions)
        except OSError as error:
            raise UnreadableSampleError(
                f"samples {int(positions.min())} to {int(positions.max())} of {self.name!r} cannot be read ({error}): "
                f"check {', '.join(map(str, self._files[:3]))}"
            ) from error

    def _take(self, columns: Columns, positions: NDArray[np.int64]) -> Samples:
        labels = None if columns.labels is None else columns.labels.rows(positions)
        if labels is not None and (labels.dtype.kind not in "iu" or labels.ndim != 1):
            raise JobError(
                f"labels of {self.name!r} are {labels.dtype}{list(labels.shape[1:])} a sample, not one integer; use -1 "
                "for no label"
            )
        ids = positions.astype(np.int64) if columns.ids is None else _as_ids(columns.ids.rows(positions))
        return Samples(
            ids=ids,
            inputs=columns.inputs.rows(positions),
            labels=None if labels is None else labels.astype(np.int64),
        )

    def _columns(self) -> Columns:
        if self._pid != os.getpid():  # open files and the locks of their libraries do not survive a fork
            self._lock = threading.RLock()
            self._opened, self._pid = self._open(), os.getpid()
        return self._opened

    def _examine(self, name: str) -> IdSpec:
        ids = self._opened.ids
        if ids is None:
            return IdSpec(kind="int", dense_start=0)
        blocks = (
            _as_ids(ids.rows(np.arange(start, min(start + _IDS_PER_BLOCK, self._count), dtype=np.int64)))
            for start in range(0, self._count, _IDS_PER_BLOCK)
        )
        return examine_ids(blocks, self._count, name)


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
            raise ValueError(
                "a file without a header needs both `dtype` and `shape` of one sample; a .npy file neither"
            )

    def load(self, base: Path | None) -> StoredArrays:
        """Return the samples. Raises JobError or DataUnavailableError: a file is missing or holds no such array."""
        named = {"inputs": self.inputs, "labels": self.labels, "ids": self.ids}
        paths = {
            key: existing_path(path, base, what=f"file of {key}") for key, path in named.items() if path is not None
        }
        sample = None if self.dtype is None else (self.dtype, tuple(self.shape or ()))
        return StoredArrays(self.name or paths["inputs"].stem, partial(_open_npy, paths, sample), tuple(paths.values()))


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

    def _keys(self) -> dict[str, str]:
        keys = {"inputs": self.inputs, "labels": self.labels, "ids": self.ids}
        return {key: array for key, array in keys.items() if array is not None}


class Hdf5Source(_NamedArrays, frozen=True, kw_only=True):
    """Samples in data sets of an HDF5 file; arguments as for Zarr."""

    def load(self, base: Path | None) -> StoredArrays:
        """Return the samples.

        Raises:
            JobError, DataUnavailableError: no such file or data set. MissingExtraError: h5py is not installed.
        """
        file = existing_path(self.path, base, what="HDF5 file")
        # h5py holds a lock of its own around every call, so threads gain nothing.
        return StoredArrays(
            self.name or file.stem, partial(_open_hdf5, file, self._keys()), (file,), one_at_a_time=True
        )


class ZarrSource(_NamedArrays, frozen=True, kw_only=True):
    """Samples in arrays of a Zarr group, format 2 or 3."""

    def load(self, base: Path | None) -> StoredArrays:
        """Return the samples.

        Raises:
            JobError, DataUnavailableError: no such group or array. MissingExtraError: zarr is not installed.
        """
        folder = existing_path(self.path, base, what="Zarr group")
        return StoredArrays(self.name or folder.stem, partial(_open_zarr, folder, self._keys()), (folder,))


def _open_npy(paths: dict[str, Path], sample: tuple[str, tuple[int, ...]] | None) -> Columns:
    arrays = {key: _mapped(path, sample if key == "inputs" else None) for key, path in paths.items()}
    return Columns(**{key: Column(array=array, read=_read_mapped) for key, array in arrays.items()})


def _open_hdf5(path: Path, keys: dict[str, str]) -> Columns:
    with needs_extra("store", "reading HDF5 files"):
        import h5py
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise JobError(f"{path} cannot be opened as an HDF5 file: {error}") from error
    return Columns(
        **{key: Column(array=_dataset(h5py, file, name, path), read=_read_hdf5) for key, name in keys.items()}
    )


def _open_zarr(folder: Path, keys: dict[str, str]) -> Columns:
    with needs_extra("store", "reading Zarr groups"):
        import zarr
    try:
        group = zarr.open_group(folder, mode="r")
    except (OSError, ValueError, KeyError) as error:
        raise JobError(f"{folder} cannot be opened as a Zarr group: {error}") from error
    return Columns(
        **{key: Column(array=_zarr_array(zarr, group, name, folder), read=_read_zarr) for key, name in keys.items()}
    )


def _mapped(path: Path, sample: tuple[str, tuple[int, ...]] | None) -> NDArray[Any]:
    try:
        if sample is not None:
            dtype = np.dtype(sample)
            if dtype.hasobject or path.stat().st_size % dtype.itemsize:
                raise ValueError(f"{path.stat().st_size} bytes are not a whole number of samples of {dtype.itemsize}")
            return np.memmap(path, dtype=dtype, mode="r")
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, TypeError, EOFError) as error:
        raise JobError(f"{path} cannot be mapped as an array of numbers or strings: {error}") from error
    if not isinstance(array, np.ndarray):
        raise JobError(f"{path} holds several arrays, which cannot be mapped: save each as a .npy file")
    if array.ndim == 0:
        raise JobError(f"{path} holds a single number, no array of samples")
    return array


def _dataset(h5py: Any, file: Any, name: str, path: Path) -> Any:
    if name not in file:
        known: list[str] = []
        file.visititems(lambda inner, node: known.append(inner) if isinstance(node, h5py.Dataset) else None)
        raise JobError(f"{path} has no data set {name!r}: it has {', '.join(known[:20]) or 'none'}")
    found = file[name]
    if not isinstance(found, h5py.Dataset) or not found.shape:
        raise JobError(f"{name!r} of {path} is no data set of samples")
    return found


def _zarr_array(zarr: Any, group: Any, path: str, folder: Path) -> Any:
    try:
        found = group[path]
    except KeyError as error:
        known = ", ".join(sorted(group.keys())[:20])
        raise JobError(f"Zarr group {folder} has no array {path!r}: it has {known or 'nothing'}") from error
    if not isinstance(found, zarr.Array) or not found.shape:
        raise JobError(f"{path!r} of Zarr group {folder} is no array of samples")
    return found


def _read_mapped(array: Any, positions: NDArray[np.int64]) -> NDArray[Any]:
    return np.asarray(array[positions])


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
    """Return ids as files store them: integers, strings of any kind, or UTF-8 bytes. Raises BadIdsError otherwise."""
    if stored.dtype.kind == "S":
        return as_ids(np.char.decode(stored, "utf-8"))
    if stored.dtype.kind in "OT":
        return as_ids([entry.decode() if isinstance(entry, bytes) else entry for entry in stored.tolist()])
    return as_ids(stored)
