"""Samples in rows of Arrow tables: what Parquet files and Hugging Face data sets share.

Shapes: B rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import JobError, ShapeMismatchError, UnreadableSampleError
from softlabels.ids import IdArray, as_ids
from softlabels.manifest import IdSpec
from softlabels.transfer_set import UNLABELLED, Samples
from softlabels.transfer_sets.images import ImageDecoder, ImageFile
from softlabels.transfer_sets.sample_ids import examine_ids
from softlabels.transfer_sets.source_files import FileTransferSet


@dataclass(frozen=True, kw_only=True)
class ArrowColumns:
    """Names of the columns that make a sample; several `inputs` hold a number each."""

    inputs: tuple[str, ...]
    label: str | None = None
    id: str | None = None

    def names(self) -> list[str]:
        """Return all names, each once."""
        return list(dict.fromkeys(name for name in (*self.inputs, self.label, self.id) if name is not None))

    def check(self, known: Sequence[str], what: str) -> None:
        """Raise JobError if a column is not among the `known` ones of `what`."""
        for column in self.names():
            if column not in known:
                raise JobError(f"{what} has no column {column!r}: it has {', '.join(known[:30])}")


class ArrowRows(FileTransferSet):
    """A transfer set over Arrow tables; subclasses give the rows. `decoder` is None where inputs are not images."""

    def __init__(
        self, columns: ArrowColumns, decoder: ImageDecoder | None, name: str, files: Sequence[Path] = ()
    ) -> None:
        super().__init__(name, files, IdSpec(kind="int", dense_start=0))
        self._columns, self._decoder = columns, decoder

    def __len__(self) -> int:
        raise NotImplementedError

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """Return the samples at these positions. Raises JobError for inputs that are neither numbers nor images."""
        rows, columns = self._rows(positions), self._columns
        ids: IdArray = positions.astype(np.int64)
        if columns.id is not None:
            ids = as_ids(rows.column(columns.id).to_pylist())
        labels = None if columns.label is None else _label_array(rows.column(columns.label), columns.label)
        return Samples(ids=ids, inputs=self._inputs(rows, ids), labels=labels)

    def _rows(self, positions: NDArray[np.int64]) -> Any:
        """Return the rows at these positions as one pyarrow table, in this order."""
        raise NotImplementedError

    def _inputs(self, rows: Any, ids: IdArray) -> NDArray[Any]:
        columns = [rows.column(name).combine_chunks() for name in self._columns.inputs]
        for name, column in zip(self._columns.inputs, columns, strict=True):
            if column.null_count:
                absent = ids.tolist()[int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])]
                raise UnreadableSampleError(f"sample {absent!r} has no input: its {name!r} is null", sample=absent)
        if self._decoder is None:
            return self._arrays(columns, ids)
        sources = [image_file(value) for value in columns[0].to_pylist()]
        return self._decoder.decode_batch(sources, [str(name) for name in ids.tolist()])

    def _arrays(self, columns: list[Any], ids: IdArray) -> NDArray[Any]:
        """Return inputs that are not images, [B, ...]."""
        parts = [_numbers(column, name) for name, column in zip(self._columns.inputs, columns, strict=True)]
        return parts[0] if len(parts) == 1 else np.stack(parts, axis=1)

    def all_ids(self) -> Iterator[IdArray]:
        """Yield the ids of the column of ids."""
        return (as_ids(block.to_pylist()) for block in self._id_blocks())

    def _id_blocks(self) -> Iterator[Any]:
        """Yield the column of ids as Arrow arrays."""
        raise NotImplementedError

    def _examine(self) -> None:
        """Set how a store keeps the ids. Raises BadIdsError: an id occurs twice."""
        if self._columns.id is not None:
            self._spec = examine_ids(self.all_ids(), len(self), self.name)


def _numbers(column: Any, name: str) -> NDArray[Any]:
    """Return a pyarrow array of numbers, or of lists of them nested to any depth, as one NumPy array."""
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
        raise JobError(f"column {name!r} holds {column.type}, which is neither numbers nor images")
    found: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return found.reshape(shape)


def _label_array(column: Any, name: str) -> NDArray[np.int64]:
    import pyarrow as pa

    if not (pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
        raise JobError(f"labels of column {name!r} are {column.type}, not integers; use -1 or null for no label")
    return np.array([UNLABELLED if value is None else value for value in column.to_pylist()], dtype=np.int64)


def image_file(value: Any) -> ImageFile:
    """Return an image as Parquet files and `datasets` store it: its bytes, or a struct with its bytes or its path."""
    if not isinstance(value, dict):
        return bytes(value)
    if value.get("bytes") is not None:
        return bytes(value["bytes"])
    if value.get("path") is None:
        raise UnreadableSampleError("an image's row holds neither bytes nor a path")
    return Path(value["path"])
