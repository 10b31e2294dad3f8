"""How do .npy files, or raw arrays in files, become a transfer set? Mapped into memory, row by row."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import JobError
from softlabels.transfer_sets.files import existing
from softlabels.transfer_sets.stored_arrays import Columns, StoredArrays


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
    return StoredArrays(name or paths["inputs"].stem, partial(_opened, paths, form), tuple(paths.values()))


def _opened(paths: dict[str, Path], form: tuple[str, tuple[int, ...]] | None) -> Columns:
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
