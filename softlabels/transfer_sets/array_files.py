"""How do arrays in files become a transfer set? Rows are read when they are asked for, and nothing is held."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import JobError, MissingExtraError, ShapeMismatchError, UnreadableSampleError
from softlabels.ids import IdArray, as_ids
from softlabels.manifest import IdSpec
from softlabels.transfer_set import Samples
from softlabels.transfer_sets.sample_ids import examine_ids
from softlabels.transfer_sets.source_files import existing, file_identities

_IDS_AT_ONCE = 1 << 16


class Column(Protocol):
    """An array in a file: how many rows it has, and some of them."""

    def __len__(self) -> int: ...

    def rows(self, positions: NDArray[np.int64]) -> NDArray[Any]:
        """The rows at these positions, [B, ...], in this order; positions may repeat."""
        ...


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The arrays of a transfer set, of one length; labels and ids where there are any."""

    inputs: Column
    labels: Column | None = None
    ids: Column | None = None


class StoredArrays:
    """Samples whose inputs, labels and ids lie in arrays on disk. Safe under threads and after fork; pickling re-opens.

    Args:
        name: for people and manifests.
        open_columns: opens the files; a function of a module with its arguments bound, so that it pickles.
        files: what it opens, for `identity`; folders with all that is in them.
        one_at_a_time: whether reading has to be taken in turns.
    Raises:
        ShapeMismatchError: the arrays differ in length. BadIdsError: an id stands twice. JobError: no numbers.
    """

    def __init__(
        self,
        name: str,
        open_columns: Callable[[], Columns],
        files: Sequence[Path],
        *,
        one_at_a_time: bool = False,
        spec: IdSpec | None = None,
    ) -> None:
        self._name, self._open, self._files = name, open_columns, tuple(files)
        self._one_at_a_time = one_at_a_time
        self._lock = threading.RLock()
        self._opened, self._opened_in = open_columns(), os.getpid()
        lengths = {key: len(column) for key, column in vars(self._opened).items() if column is not None}
        self._count = lengths["inputs"]
        if len(set(lengths.values())) > 1:
            raise ShapeMismatchError(f"the arrays of {name!r} differ in length: {lengths}")
        self._spec = spec or self._examined()

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self._name, self._open, self._files, self._one_at_a_time, self._spec)

    @property
    def name(self) -> str:
        """A short name for people and manifests."""
        return self._name

    def __len__(self) -> int:
        return self._count

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """The samples at these positions, in this order; positions may repeat.

        Raises:
            UnreadableSampleError: a file cannot be read there. JobError: labels that are no whole numbers.
        """
        columns = self._columns()
        try:
            if self._one_at_a_time:
                with self._lock:
                    return self._taken(columns, positions)
            return self._taken(columns, positions)
        except OSError as error:
            raise UnreadableSampleError(
                f"samples {int(positions.min())} to {int(positions.max())} of {self._name!r} cannot be read ({error}): "
                f"look at {', '.join(map(str, self._files[:3]))}"
            ) from error

    def id_spec(self) -> IdSpec:
        """How a store keeps the ids."""
        return self._spec

    def identity(self) -> Iterator[tuple[str, str]]:
        """Size and time of modification of each file."""
        return file_identities(self._files)

    def _taken(self, columns: Columns, positions: NDArray[np.int64]) -> Samples:
        labels = None if columns.labels is None else columns.labels.rows(positions)
        if labels is not None and (labels.dtype.kind not in "iu" or labels.ndim != 1):
            raise JobError(
                f"labels of {self._name!r} are {labels.dtype}{list(labels.shape[1:])} a sample: one whole number is "
                "meant, -1 where there is none"
            )
        ids = positions.astype(np.int64) if columns.ids is None else id_array(columns.ids.rows(positions))
        return Samples(
            ids=ids,
            inputs=columns.inputs.rows(positions),
            labels=None if labels is None else labels.astype(np.int64),
        )

    def _columns(self) -> Columns:
        if self._opened_in != os.getpid():  # open files, and the locks of their libraries, do not survive a fork well
            self._lock = threading.RLock()
            self._opened, self._opened_in = self._open(), os.getpid()
        return self._opened

    def _examined(self) -> IdSpec:
        ids = self._opened.ids
        if ids is None:
            return IdSpec(kind="int", dense_start=0)
        blocks = (
            id_array(ids.rows(np.arange(start, min(start + _IDS_AT_ONCE, self._count), dtype=np.int64)))
            for start in range(0, self._count, _IDS_AT_ONCE)
        )
        return examine_ids(blocks, self._count, self._name)


class SlicedColumn:
    """An array that gives slices of itself: consecutive rows by one slice, all others run by run.

    Args:
        array: with `len`, and rows by slices.
    """

    def __init__(self, array: Any) -> None:
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    def rows(self, positions: NDArray[np.int64]) -> NDArray[Any]:
        """The rows at these positions, [B, ...], in this order; positions may repeat."""
        wanted, back = np.unique(positions, return_inverse=True)
        cuts = np.flatnonzero(np.diff(wanted) != 1) + 1
        runs = [np.asarray(self._array[int(run[0]) : int(run[-1]) + 1]) for run in np.split(wanted, cuts) if len(run)]
        found: NDArray[Any] = np.concatenate(runs) if runs else np.asarray(self._array[:0])
        return found if np.array_equal(wanted, positions) else found[back.reshape(-1)]


def id_array(kept: NDArray[Any]) -> IdArray:
    """Ids as files keep them: integers, strings of any kind, or UTF-8 bytes. Raises BadIdsError: anything else."""
    if kept.dtype.kind == "S":
        return as_ids(np.char.decode(kept, "utf-8"))
    if kept.dtype.kind in "OT":
        return as_ids([entry.decode() if isinstance(entry, bytes) else entry for entry in kept.tolist()])
    return as_ids(kept)


def _again(
    name: str, open_columns: Callable[[], Columns], files: tuple[Path, ...], one_at_a_time: bool, spec: IdSpec
) -> StoredArrays:
    return StoredArrays(name, open_columns, files, one_at_a_time=one_at_a_time, spec=spec)


# MERGED from softlabels.transfer_sets.array_files: How do .npy files, or raw arrays in files, become a transfer set? Mapped into memory, row by row.


class MappedColumn:
    """An array that is mapped into memory."""

    def __init__(self, array: NDArray[Any]) -> None:
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    def rows(self, positions: NDArray[np.int64]) -> NDArray[Any]:
        """The rows at these positions, [B, ...], in this order; positions may repeat."""
        return np.asarray(self._array[positions])


def npy_arrays(
    inputs: str,
    labels: str | None = None,
    ids: str | None = None,
    dtype: str | None = None,
    shape: list[int] | None = None,
    name: str | None = None,
    base: Path | None = None,
) -> StoredArrays:
    """Samples in .npy files.

    Args:
        inputs: the file with the inputs, [N, ...]; with `dtype` and `shape`, numbers without any header.
        labels: the file with whole numbers [N], -1 for none; unlabelled when left out.
        ids: the file with integers or strings [N]; positions when left out.
        dtype, shape: of one sample in a file without a header, such as "<f4" and [3, 32, 32].
        name: of the transfer set; the inputs' file's when left out.
        base: the folder that relative paths start from.
    Raises:
        JobError, DataUnavailableError: a file that is missing or holds no such array.
    """
    if (dtype is None) != (shape is None):
        raise JobError("a file without a header needs both `dtype` and `shape` of one sample; a .npy file neither")
    paths = {
        key: existing(path, base, what=f"file of {key}")
        for key, path in (("inputs", inputs), ("labels", labels), ("ids", ids))
        if path is not None
    }
    form = None if dtype is None else (dtype, tuple(shape or ()))
    return StoredArrays(name or paths["inputs"].stem, partial(_open_npy, paths, form), tuple(paths.values()))


def _open_npy(paths: dict[str, Path], form: tuple[str, tuple[int, ...]] | None) -> Columns:
    columns = {key: MappedColumn(_mapped(path, form if key == "inputs" else None)) for key, path in paths.items()}
    return Columns(**columns)


def _mapped(path: Path, form: tuple[str, tuple[int, ...]] | None) -> NDArray[Any]:
    try:
        if form is not None:
            dtype = np.dtype((form[0], form[1]))
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


# MERGED from softlabels.transfer_sets.array_files: How do HDF5 data sets become a transfer set? Rows are read when they are asked for.


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
    return StoredArrays(name or file.stem, partial(_open_hdf5, file, chosen), (file,), one_at_a_time=True)


def _open_hdf5(path: Path, keys: dict[str, str]) -> Columns:
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


# MERGED from softlabels.transfer_sets.array_files: How do Zarr arrays become a transfer set? Chunks are read when rows of theirs are asked for.


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
    return StoredArrays(name or folder.stem, partial(_open_zarr, folder, chosen), (folder,))


def _open_zarr(folder: Path, keys: dict[str, str]) -> Columns:
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
