"""How do Parquet files become a transfer set? Row groups are read when rows of theirs are asked for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import JobError, MissingExtraError, UnreadableSampleError
from softlabels.ids import IdArray, as_ids
from softlabels.manifest import IdSpec
from softlabels.transfer import Samples
from softlabels.transfer_sets.arrow_columns import label_array, numbers, picture_bytes, refuse_nulls
from softlabels.transfer_sets.files import identity_of, matching
from softlabels.transfer_sets.names import examine_ids
from softlabels.transfer_sets.pictures import Decoder, PictureForm, picture_form

MOST_HELD_BYTES = 512 << 20
"""Row groups that are kept decoded, the last ones used: at least one, whatever its size."""

Fields = tuple[tuple[str, ...], str | None, str | None]
"""Columns of the input (several numbers may make one), of the label and of the id."""


class ParquetRows:
    """Samples in Parquet files, by position over all of them. Safe under threads; pickling re-opens.

    Args:
        paths: of the files, in order; they have the same columns.
        fields: see `Fields`.
        form: what pictures are brought to, and how many threads decode them.
        raw: dtype and shape of inputs that are kept as bytes, or the shape alone of numbers; None as they are.
        name: for people and manifests.
        spec: of the ids, where that is known; else every id is read once.
    Raises:
        JobError: a column that is not there, or holds what is no input. BadIdsError: an id stands twice.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        fields: Fields,
        form: tuple[PictureForm, int | None],
        raw: tuple[str | None, tuple[int, ...] | None],
        name: str,
        spec: IdSpec | None = None,
    ) -> None:
        self._arguments = (tuple(paths), fields, form, raw, name)
        self._paths, (self._inputs, self._label, self._id), self._raw = tuple(paths), fields, raw
        self._name = name
        self._files = [_opened(path) for path in paths]
        self._groups = [
            (file, group) for file in range(len(paths)) for group in range(self._files[file].num_row_groups)
        ]
        counts = [self._files[file].metadata.row_group(group).num_rows for file, group in self._groups]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._held: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._refuse_missing()
        pictures = raw[0] is None and self._holds_bytes()
        self._decoder = Decoder(*form) if pictures else None
        self._spec = spec or (IdSpec(kind="int", dense_start=0) if self._id is None else self._examined(self._id))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self._arguments, self._spec)

    @property
    def name(self) -> str:
        """A short name for people and manifests."""
        return self._name

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """The samples at these positions, in this order; positions may repeat.

        Raises:
            UnreadableSampleError: a file or a picture that cannot be read, or a null. ShapeMismatchError.
        """
        rows = self._rows(positions)
        ids: IdArray = positions.astype(np.int64)
        if self._id is not None:
            ids = as_ids(rows.column(self._id).to_pylist())
        labels = None
        if self._label is not None:
            labels = label_array(rows.column(self._label), self._label)
        return Samples(ids=ids, inputs=self._decoded(rows, ids), labels=labels)

    def id_spec(self) -> IdSpec:
        """How a store keeps the ids."""
        return self._spec

    def identity(self) -> Iterator[tuple[str, str]]:
        """Size and time of modification of each file."""
        return identity_of(self._paths)

    def _rows(self, positions: NDArray[np.int64]) -> Any:
        """The rows at these positions as one table, in this order."""
        import pyarrow as pa

        of_group = np.searchsorted(self._ends, positions, side="right")
        pieces, places = [], []
        for group in np.unique(of_group).tolist():
            here = np.flatnonzero(of_group == group)
            begin = int(self._ends[group - 1]) if group else 0
            pieces.append(self._group(group).take(pa.array(positions[here] - begin)))
            places.append(here)
        joined = pa.concat_tables(pieces)
        back = np.argsort(np.concatenate(places), kind="stable")
        return joined if np.array_equal(back, np.arange(len(back))) else joined.take(pa.array(back))

    def _group(self, group: int) -> Any:
        """A row group, decoded, of the columns that are needed."""
        import pyarrow as pa

        with self._lock:
            if group in self._held:
                self._held.move_to_end(group)
                return self._held[group]
            file, number = self._groups[group]
            columns = [*self._inputs, *(column for column in (self._label, self._id) if column is not None)]
            try:
                table = self._files[file].read_row_group(number, columns=list(dict.fromkeys(columns)))
            except (OSError, pa.ArrowException) as error:
                raise UnreadableSampleError(
                    f"row group {number} of {self._paths[file]} cannot be read: {error}"
                ) from error
            self._held[group] = table
            while len(self._held) > 1 and sum(kept.nbytes for kept in self._held.values()) > MOST_HELD_BYTES:
                self._held.popitem(last=False)
            return table

    def _decoded(self, rows: Any, ids: IdArray) -> NDArray[Any]:
        columns = [rows.column(name).combine_chunks() for name in self._inputs]
        for name, column in zip(self._inputs, columns, strict=True):
            refuse_nulls(column, name, ids)
        if not self._holds_bytes():
            parts = [numbers(column, name) for name, column in zip(self._inputs, columns, strict=True)]
            found = parts[0] if len(parts) == 1 else np.stack(parts, axis=1)
            return found if self._raw[1] is None else _shaped(found, self._raw[1])
        contents = [picture_bytes(value) for value in columns[0].to_pylist()]
        if self._decoder is not None:
            pairs = zip(contents, ids.tolist(), strict=True)
            return self._decoder.batch([(partial(bytes, body), str(name)) for body, name in pairs])
        dtype = np.dtype((self._raw[0], self._raw[1] or ()))
        for body, name in zip(contents, ids.tolist(), strict=True):
            if len(body) != dtype.itemsize:
                raise UnreadableSampleError(f"sample {name!r} has {len(body)} bytes, {dtype.itemsize} were said")
        return np.frombuffer(b"".join(contents), dtype=dtype.base).reshape(len(contents), *dtype.shape)

    def _holds_bytes(self) -> bool:
        import pyarrow as pa

        kind = self._files[0].schema_arrow.field(self._inputs[0]).type
        return bool(pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    def _refuse_missing(self) -> None:
        for path, file in zip(self._paths, self._files, strict=True):
            known = file.schema_arrow.names
            for column in (*self._inputs, self._label, self._id):
                if column is not None and column not in known:
                    raise JobError(f"{path} has no column {column!r}: it has {', '.join(known[:30])}")

    def _examined(self, column: str) -> IdSpec:
        blocks = (
            as_ids(batch.column(0).to_pylist()) for file in self._files for batch in file.iter_batches(columns=[column])
        )
        return examine_ids(blocks, len(self), self._name)


def parquet(
    path: str | list[str],
    input: str | list[str],
    label: str | None = None,
    id: str | None = None,
    dtype: str | None = None,
    shape: list[int] | None = None,
    size: int | list[int] | None = None,
    resize: int | None = None,
    mode: str = "RGB",
    layout: str = "chw",
    threads: int | None = None,
    name: str | None = None,
    base: Path | None = None,
) -> ParquetRows:
    """Samples in rows of Parquet files.

    Args:
        path: of the files: one, a list, or with `*`, `{00..31}`.
        input: its column: pictures (bytes, or a struct with `bytes`), lists of numbers, or numbers; a list of columns
            with one number each makes an input of them.
        label: the column with whole numbers; null and -1 are unlabelled. id: integers or strings; row numbers when
            left out.
        dtype, shape: of inputs that are kept as plain bytes; `shape` alone gives lists of numbers another one.
        size, resize, mode, layout, threads: of pictures, as `image_folder` takes them.
        name: of the transfer set; the first file's when left out.
        base: the folder that relative paths start from.
    Raises:
        JobError, DataUnavailableError: no such file or column. MissingExtraError: no pyarrow.
    """
    paths = matching(path, base, what="Parquet files")
    columns = (input,) if isinstance(input, str) else tuple(input)
    form = (picture_form(size, resize, mode, layout), threads)
    raw = (dtype, None if shape is None else tuple(shape))
    found = ParquetRows(paths, (columns, label, id), form, raw, name or paths[0].stem)
    if len(found) == 0:
        raise JobError(f"{paths[0]} holds no row: there is nothing to compute targets for")
    return found


def _opened(path: Path) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError(
            "reading Parquet needs pyarrow, which is not installed: `pip install softlabels[parquet]`", extra="parquet"
        ) from error
    try:
        return pq.ParquetFile(path, memory_map=False)
    except (OSError, pa.ArrowException) as error:
        raise JobError(f"{path} cannot be opened as a Parquet file: {error}") from error


def _shaped(found: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    try:
        return found.reshape(len(found), *shape)
    except ValueError as error:
        raise JobError(f"inputs of shape {list(found.shape[1:])} cannot take the shape {list(shape)}") from error
