"""Sample ids as arrays: integers or strings, never a mixture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import BadIdsError

IdArray: TypeAlias = NDArray[np.int64] | NDArray[np.str_]
"""Sample ids, shape [B]: int64 or unicode strings."""

IdKind: TypeAlias = Literal["int", "str"]

MAX_STRING_ID_BYTES = 4096
"""A longer id is almost always the content of a file passed by mistake; the limit also bounds a hostile manifest."""


def as_ids(values: Iterable[Any] | NDArray[Any]) -> IdArray:
    """Return integers or strings, in anything that `numpy.asarray` takes, as a 1-D array of int64 or unicode.

    Raises:
        BadIdsError: a mixture, floats, booleans, integers beyond int64, empty strings, or more than one dimension.
    """
    array = values if isinstance(values, np.ndarray) else _array_of_sequence(values)
    if array.ndim != 1:
        raise BadIdsError(f"sample ids must be one-dimensional, not of shape {array.shape}: pass a flat list of ids")
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.dtype.kind == "i":
        return array.astype(np.int64, copy=False)
    if array.dtype.kind == "u":
        if array.dtype.itemsize == 8 and int(array.max()) > np.iinfo(np.int64).max:
            raise BadIdsError("integer sample ids must fit in a signed 64-bit integer: use strings for larger ones")
        return array.astype(np.int64)
    if array.dtype.kind == "U":
        return _checked_strings(array)
    raise BadIdsError(
        f"sample ids must be all integers or all strings, not {array.dtype}: a float or mixed id cannot name a sample"
    )


def id_kind(ids: IdArray) -> IdKind:
    """Return the kind of these ids."""
    return "str" if ids.dtype.kind == "U" else "int"


def utf8(ids: IdArray) -> NDArray[np.bytes_]:
    """Return string ids as UTF-8, zero-padded to the longest."""
    assert ids.dtype.kind == "U", "integer ids have no encoding"
    return np.char.encode(cast("NDArray[np.str_]", ids), "utf-8")


def to_fixed_bytes(ids: IdArray, *, width_bytes: int) -> NDArray[np.uint8]:
    """Return string ids as zero-padded UTF-8: uint8, shape [B, width_bytes].

    Raises:
        BadIdsError: an id is longer than the width.
    """
    encoded = utf8(ids)
    if encoded.dtype.itemsize > width_bytes:
        raise BadIdsError(
            f"an id of {encoded.dtype.itemsize} UTF-8 bytes does not fit the store's {width_bytes}: "
            "declare a larger id width when the store is made"
        )
    padded = encoded.astype(f"S{width_bytes}")
    return np.frombuffer(padded.tobytes(), dtype=np.uint8).reshape(len(ids), width_bytes)


def from_fixed_bytes(ids_BW: NDArray[np.uint8]) -> NDArray[np.str_]:
    """Return zero-padded UTF-8 ids, shape [B, width], as strings, shape [B]."""
    rows = np.ascontiguousarray(ids_BW)
    if rows.shape[0] == 0:
        return np.empty(0, dtype=np.str_)
    return np.char.decode(rows.view(f"S{rows.shape[1]}")[:, 0], "utf-8")


def _array_of_sequence(values: Iterable[Any]) -> NDArray[Any]:
    items = values if isinstance(values, list | tuple | range) else list(values)
    if len(items) == 0:
        return np.empty(0, dtype=np.int64)
    # numpy would turn [1, "2"] into two strings and [True, 2] into [1, 2]; both hide a mistake.
    kinds = set() if isinstance(items, range) else {str if isinstance(item, str) else type(item) for item in items}
    if bool in kinds or (str in kinds and len(kinds) > 1):
        raise BadIdsError("sample ids must be all integers or all strings, not a mixture, nor true and false")
    if kinds == {str}:
        _refuse_bad_strings(items)
    try:
        return np.asarray(items)
    except (ValueError, OverflowError) as error:
        raise BadIdsError(f"these cannot be sample ids: {error}") from error


def _refuse_bad_strings(items: Sequence[Any]) -> None:
    # Before NumPy sees them: in its arrays each entry takes the space of the longest, and trailing NULs are lost.
    if max(map(len, items)) > MAX_STRING_ID_BYTES:
        raise BadIdsError(f"a string id may have at most {MAX_STRING_ID_BYTES} bytes: pass the name, not the contents")
    if any("\0" in item for item in items):
        raise BadIdsError("a string id may not hold a NUL character: arrays of strings drop it, and two ids become one")


def _checked_strings(array: NDArray[np.str_]) -> NDArray[np.str_]:
    if bool((np.char.str_len(array) == 0).any()):
        raise BadIdsError("an empty string cannot be a sample id")
    if array.dtype.itemsize // 4 > MAX_STRING_ID_BYTES:
        raise BadIdsError(f"a string id may have at most {MAX_STRING_ID_BYTES} bytes: pass the name, not the contents")
    return array
