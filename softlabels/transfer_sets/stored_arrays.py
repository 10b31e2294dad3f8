"""How do arrays in files become a transfer set? Rows are read when they are asked for, and nothing is held."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import JobError, ShapeMismatchError, UnreadableSampleError
from softlabels.ids import IdArray, as_ids
from softlabels.manifest import IdSpec
from softlabels.transfer import Samples
from softlabels.transfer_sets.files import identity_of
from softlabels.transfer_sets.names import examine_ids

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
        return identity_of(self._files)

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
