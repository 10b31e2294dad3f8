"""Parquet files: row groups are decoded on demand, and those used last are cached."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import JobError, UnreadableSampleError
from softlabels.extras import needs_extra
from softlabels.ids import IdArray
from softlabels.manifest import IdSpec
from softlabels.transfer_sets.arrow_rows import ArrowColumns, ArrowRows, image_file
from softlabels.transfer_sets.images import ImageSource
from softlabels.transfer_sets.source_files import match_files

MAX_CACHED_BYTES = 512 << 20
"""Largest size of the cached row groups, decoded; the one used last is cached whatever its size."""


class ParquetRows(ArrowRows):
    """Samples in Parquet files, by position over all of them. Safe under threads; pickling re-opens the files.

    Args:
        paths: the files, in order; all have the same columns.
        source: columns, and format of images and raw inputs.
        name: name for messages and manifests.
        spec: how a store keeps the ids, if known already; else every id is read once.
    Raises:
        JobError: a column is missing. BadIdsError: an id occurs twice.
    """

    def __init__(self, paths: Sequence[Path], source: ParquetSource, name: str, spec: IdSpec | None = None) -> None:
        self._source = source
        self._readers = [_open(path) for path in paths]
        columns = source.columns()
        for path, file in zip(paths, self._readers, strict=True):
            columns.check(file.schema_arrow.names, str(path))
        self._holds_bytes = _is_bytes(self._readers[0].schema_arrow.field(columns.inputs[0]).type)
        super().__init__(columns, source.decoder() if self._holds_bytes and source.dtype is None else None, name, paths)
        self._groups = [
            (file, group) for file in range(len(paths)) for group in range(self._readers[file].num_row_groups)
        ]
        counts = [self._readers[file].metadata.row_group(group).num_rows for file, group in self._groups]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()
        if spec is None:
            self._examine()
        else:
            self._spec = spec

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._files, self._source, self.name, self._spec)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _id_blocks(self) -> Iterator[Any]:
        return (batch.column(0) for file in self._readers for batch in file.iter_batches(columns=[self._columns.id]))

    def _rows(self, positions: NDArray[np.int64]) -> Any:
        import pyarrow as pa

        group_of = np.searchsorted(self._ends, positions, side="right")
        pieces, rows = [], []
        for group in np.unique(group_of).tolist():
            here = np.flatnonzero(group_of == group)
            begin = int(self._ends[group - 1]) if group else 0
            pieces.append(self._row_group(group).take(pa.array(positions[here] - begin)))
            rows.append(here)
        joined = pa.concat_tables(pieces)
        back = np.argsort(np.concatenate(rows), kind="stable")
        return joined if np.array_equal(back, np.arange(len(back))) else joined.take(pa.array(back))

    def _row_group(self, group: int) -> Any:
        import pyarrow as pa

        # Held while decoding too: two threads that want one row group decode it once.
        with self._lock:
            if group in self._cache:
                self._cache.move_to_end(group)
                return self._cache[group]
            file, number = self._groups[group]
            try:
                table = self._readers[file].read_row_group(number, columns=self._columns.names())
            except (OSError, pa.ArrowException) as error:
                raise UnreadableSampleError(
                    f"row group {number} of {self._files[file]} cannot be read: {error}"
                ) from error
            self._cache[group] = table
            while len(self._cache) > 1 and sum(cached.nbytes for cached in self._cache.values()) > MAX_CACHED_BYTES:
                self._cache.popitem(last=False)
            return table

    def _arrays(self, columns: list[Any], ids: IdArray) -> NDArray[Any]:
        shape = None if self._source.shape is None else tuple(self._source.shape)
        if self._holds_bytes:
            return _from_bytes(columns[0], np.dtype((self._source.dtype, shape or ())), ids)
        found = super()._arrays(columns, ids)
        try:
            return found if shape is None else found.reshape(len(found), *shape)
        except ValueError as error:
            raise JobError(
                f"inputs of shape {list(found.shape[1:])} cannot take the shape {list(shape or ())}"
            ) from error


class ParquetSource(ImageSource, frozen=True, kw_only=True):
    """Samples in rows of Parquet files.

    Attributes:
        path: a file or a list of files, `*` and `{00..31}` allowed; the first one's name is the default `name`.
        input: column of images (bytes, or a struct with `bytes`), of lists of numbers, or of numbers; a list of columns
            with a number each makes one input of them.
        label: column of integers; null and -1 are unlabelled.
        id: column of integers or strings; row numbers when left out.
        dtype, shape: type and shape of inputs that are stored as plain bytes; `shape` alone reshapes lists of numbers.
    """

    path: str | list[str]
    input: str | list[str]
    label: str | None = None
    id: str | None = None
    dtype: str | None = None
    shape: list[int] | None = None

    def load(self, base: Path | None) -> ParquetRows:
        """Return the rows of the files."""
        paths = match_files(self.path, base, what="Parquet files")
        found = ParquetRows(paths, self, self.name or paths[0].stem)
        if len(found) == 0:
            raise JobError(f"{paths[0]} holds no row: there is nothing to compute targets for")
        return found

    def columns(self) -> ArrowColumns:
        """Return the columns that make a sample."""
        inputs = (self.input,) if isinstance(self.input, str) else tuple(self.input)
        return ArrowColumns(inputs=inputs, label=self.label, id=self.id)


def _open(path: Path) -> Any:
    with needs_extra("parquet", "reading Parquet files"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    try:
        return pq.ParquetFile(path, memory_map=False)
    except (OSError, pa.ArrowException) as error:
        raise JobError(f"{path} cannot be opened as a Parquet file: {error}") from error


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _contents_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UnreadableSampleError(f"{file} cannot be read: {error}", sample=str(file)) from error


def _from_bytes(column: Any, dtype: np.dtype[Any], ids: IdArray) -> NDArray[Any]:
    files = [image_file(value) for value in column.to_pylist()]
    contents = [file if isinstance(file, bytes) else _contents_of(file) for file in files]
    for body, name in zip(contents, ids.tolist(), strict=True):
        if len(body) != dtype.itemsize:
            raise UnreadableSampleError(
                f"sample {name!r} has {len(body)} bytes; `dtype` and `shape` make {dtype.itemsize}"
            )
    return np.frombuffer(b"".join(contents), dtype=dtype.base).reshape(len(contents), *dtype.shape)
