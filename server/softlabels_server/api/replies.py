"""Reply formats: safetensors, Arrow, .npy and JSON, chosen by `Accept` and sent as buffers of known length."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from starlette.exceptions import HTTPException
from starlette.types import Send

from softlabels import wire
from softlabels.errors import BatchTooLargeError, RequestError
from softlabels.ids import from_fixed_bytes
from softlabels.manifest import FINGERPRINTS, IDS, ROW_OFFSETS
from softlabels.wire import MEDIA_TYPE
from softlabels_server.fast_path.response_plan import reply_headers
from softlabels_server.fast_path.socket_writer import as_view

Format: TypeAlias = Literal["safetensors", "arrow", "npy", "json"]

MEDIA_TYPES: dict[Format, str] = {
    "safetensors": MEDIA_TYPE,
    "arrow": "application/vnd.apache.arrow.stream",
    "npy": "application/x-npy",
    "json": "application/json",
}
"""Formats in the server's order of preference, which decides if a client accepts several equally."""

MAX_JSON_NUMBERS = 1_000_000
"""JSON is meant for reading: a number takes ten times the bytes and thousands of times the encoding time."""


async def send_buffers(
    send: Send, buffers: Sequence[bytes | NDArray[Any]], *, media_type: str, digest: str, checksum: int | None
) -> None:
    """Send a reply of several buffers without joining them.

    The transport may hold the buffers after this returns, so they must not be modified.

    Args:
        send: ASGI's.
        buffers: body, in order.
        media_type: media type of the body.
        digest: version of the store.
        checksum: checksum of question and body, for formats that do not carry it themselves.
    """
    views = list(map(as_view, buffers))
    headers = reply_headers(sum(map(len, views)), digest=digest, media_type=media_type)
    if checksum is not None:
        headers.append((wire.CHECKSUM_HEADER.encode(), b"%08x" % checksum))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    last = len(views) - 1
    for position, view in enumerate(views):
        await send({"type": "http.response.body", "body": view, "more_body": position < last})


def accepted_format(accept: str | None) -> Format:
    """Return the format of the reply.

    Args:
        accept: value of the `Accept` header, None if there is none.
    Raises:
        HTTPException: 406, no format of this server is acceptable.
    Source: RFC 9110, section 12.5.1.
    """
    if not accept or accept == MEDIA_TYPE:
        return "safetensors"
    ranges = [_media_range(part) for part in accept.split(",") if part.strip()]
    weights: dict[Format, float] = {name: _weight(media_type, ranges) for name, media_type in MEDIA_TYPES.items()}
    best = max(weights, key=lambda name: weights[name])  # the first of equals: the server's preference
    if weights[best] <= 0:
        raise HTTPException(406, f"it accepts only {accept[:128]!r}; available: {', '.join(MEDIA_TYPES.values())}")
    return best


def encode_arrays(
    reply_format: Format, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]
) -> list[bytes | NDArray[Any]]:
    """Return arrays and metadata as buffers in any format but safetensors, which `ReplyLayout` writes.

    Raises:
        RequestError: several arrays for `.npy`, which holds one. BatchTooLargeError: too many numbers for JSON.
        HTTPException: 406, Arrow without pyarrow.
    """
    if reply_format == "json":
        return [_json(arrays, metadata)]
    if reply_format == "npy":
        return _npy(arrays)
    assert reply_format == "arrow", "safetensors replies are written by ReplyLayout"
    return [_arrow(arrays, metadata)]


def _media_range(part: str) -> tuple[str, float]:
    """Return one entry of an `Accept` header as media range and quality."""
    media_range, *parameters = (piece.strip().lower() for piece in part.split(";"))
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return media_range, min(max(float(value), 0.0), 1.0)
            except ValueError:
                return media_range, 0.0
    return media_range, 1.0


def _weight(media_type: str, ranges: list[tuple[str, float]]) -> float:
    """Return the quality of the most specific range that covers a type; 0 where none does."""
    specificity = {media_type: 3, media_type.partition("/")[0] + "/*": 2, "*/*": 1}
    found = [(specificity[media_range], quality) for media_range, quality in ranges if media_range in specificity]
    return max(found)[1] if found else 0.0


def _json(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    numbers = sum(array.size for array in arrays.values())
    if numbers > MAX_JSON_NUMBERS:
        raise BatchTooLargeError(
            f"{numbers} numbers exceed the {MAX_JSON_NUMBERS} allowed as JSON: ask for fewer rows or {MEDIA_TYPE}",
            most=MAX_JSON_NUMBERS,
        )
    shown = {name: _nested(from_fixed_bytes(a) if _is_text(name, a) else a) for name, a in arrays.items()}
    return json.dumps({"metadata": dict(metadata), "arrays": shown}, allow_nan=False).encode()


def _nested(array: NDArray[Any]) -> Any:
    """Return nested lists, with null for infinity, which JSON lacks: the log-probability of a class with p = 0."""
    if array.dtype.kind == "f":
        numbers = array.astype(object)
        numbers[~np.isfinite(array)] = None
        return numbers.tolist()
    return array.tolist()


def npy_header(array: NDArray[Any]) -> bytes:
    """Return the bytes before an array's own in a `.npy` file, as `numpy.save` writes them."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return header.getvalue()


def _npy(arrays: Mapping[str, NDArray[Any]]) -> list[bytes | NDArray[Any]]:
    names = [name for name in arrays if name != IDS] or [IDS]
    if len(names) != 1:
        raise RequestError(
            f"a .npy file has one array, this reply {', '.join(names)}: name one in `fields` or ask for {MEDIA_TYPE}"
        )
    array = np.ascontiguousarray(arrays[names[0]])
    return [npy_header(array), array]


def _arrow(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> NDArray[np.uint8]:
    try:
        pa: Any = importlib.import_module("pyarrow")
    except ImportError as error:
        raise HTTPException(
            406,
            f"{MEDIA_TYPES['arrow']} needs pyarrow on the server: its operator can `pip install 'softlabels[arrow]'`",
        ) from error
    offsets = arrays.get(ROW_OFFSETS)
    columns: dict[str, Any] = {}
    for name, array in arrays.items():
        if name != ROW_OFFSETS:
            column = pa.array(from_fixed_bytes(array).tolist()) if _is_text(name, array) else _column(pa, array)
            once_a_sample = offsets is None or name in (IDS, FINGERPRINTS)
            columns[name] = column if once_a_sample else pa.LargeListArray.from_arrays(pa.array(offsets), column)
    batch = pa.record_batch(columns).replace_schema_metadata(dict(metadata))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return np.frombuffer(sink.getvalue(), dtype=np.uint8)


def _is_text(name: str, array: NDArray[Any]) -> bool:
    """Return whether an array has string ids, as fixed-width UTF-8."""
    return name == IDS and array.ndim == 2


def _column(pa: Any, array: NDArray[Any]) -> Any:
    """Return an array of any shape as an Arrow column: each axis after the first nests one fixed-size list."""
    column = pa.array(np.ascontiguousarray(array).reshape(-1))
    for extent in reversed(array.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, extent)
    return column
