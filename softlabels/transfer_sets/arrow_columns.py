"""What do Arrow columns hold for a transfer set? Arrays of numbers, labels, and pictures as bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import JobError, ShapeMismatchError, UnreadableSampleError
from softlabels.ids import IdArray
from softlabels.transfer import UNLABELLED


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
