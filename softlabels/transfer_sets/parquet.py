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

from softlabels.errors import JobError, MissingExtraError, ShapeMismatchError, UnreadableSampleError
from softlabels.ids import IdArray, as_ids
from softlabels.manifest import IdSpec
from softlabels.transfer_set import UNLABELLED, Samples
from softlabels.transfer_sets.images import Decoder, PictureForm, picture_form
from softlabels.transfer_sets.sample_ids import examine_ids
from softlabels.transfer_sets.source_files import file_identities, matching

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
        return file_identities(self._paths)

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


# MERGED from softlabels.transfer_sets.parquet: What do Arrow columns hold for a transfer set? Arrays of numbers, labels, and pictures as bytes.


def numbers(column: Any, name: str) -> NDArray[Any]:
    """A column of numbers, or of lists of them as deep as they may be, as one array.

    Args:
        column: a pyarrow array.
        name: for messages.
    Raises:
        ShapeMismatchError: lists of several lengths. UnreadableSampleError: a null. JobError: no numbers.
    """
    import pyarrow as pa

    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    shape = [len(column)]
    while (
        pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type)
    ):
        flat = column.flatten()
        each = len(flat) // len(column) if len(column) else 0
        fixed = pa.types.is_fixed_size_list(column.type)
        if column.null_count or (not fixed and not bool((column.value_lengths().to_numpy() == each).all())):
            raise ShapeMismatchError(
                f"lists of column {name!r} differ in length: a transfer set has samples of one shape"
            )
        shape.append(each)
        column = flat
    if column.null_count:
        raise UnreadableSampleError(f"column {name!r} has a null among its numbers")
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise JobError(f"column {name!r} holds {column.type}, which is neither numbers nor pictures")
    found: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return found.reshape(shape)


def label_array(column: Any, name: str) -> NDArray[np.int64]:
    """A column of labels, [B]; null is unlabelled. Raises JobError: they are no whole numbers."""
    import pyarrow as pa

    if not (pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
        raise JobError(f"labels of column {name!r} are {column.type}, no whole numbers: -1 or null where there is none")
    return np.array([UNLABELLED if value is None else value for value in column.to_pylist()], dtype=np.int64)


def refuse_nulls(column: Any, name: str, ids: IdArray) -> None:
    """Let a column pass that has a value for each of these samples. Raises UnreadableSampleError."""
    if column.null_count:
        absent = ids.tolist()[int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])]
        raise UnreadableSampleError(f"sample {absent!r} has no input: its {name!r} is null", sample=absent)


def picture_bytes(value: Any) -> bytes:
    """The contents of a picture's file: kept as bytes, or as a struct with bytes or a path, as `datasets` does."""
    if not isinstance(value, dict):
        return bytes(value)
    found, path = value.get("bytes"), value.get("path")
    if found is not None:
        return bytes(found)
    if path is None:
        raise UnreadableSampleError("a picture's row holds neither bytes nor a path")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UnreadableSampleError(f"picture {path} cannot be read: {error}", sample=str(path)) from error
