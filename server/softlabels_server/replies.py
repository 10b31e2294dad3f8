"""How arrays leave: as buffers in the form that was asked for, sent without being joined, their length known before."""

from __future__ import annotations

import importlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from softlabels.errors import BatchTooLargeError, RequestError
from softlabels.ids import from_fixed_bytes
from softlabels.manifest import FINGERPRINTS, IDS, ROW_OFFSETS
from softlabels_server.forms import as_buffer
from softlabels_server.negotiation import MEDIA_TYPES, Form

DIGEST_HEADER = "softlabels-digest"
"""Response header: the version of the store that the rows come from."""

MOST_JSON_NUMBERS = 1_000_000
"""JSON is for people to look at; a number takes ten times its bytes in it and thousands of times its time."""


class BufferedReply:
    """A plain ASGI reply of several buffers.

    The buffers belong to the transport from the moment they are sent: they must not be written again.

    Args:
        buffers: the body, in order.
        media_type: of the body.
        digest: version of the store.
    """

    def __init__(self, buffers: Sequence[bytes | memoryview], *, media_type: str, digest: str) -> None:
        self._buffers = buffers
        self._headers = reply_headers(sum(map(len, buffers)), digest=digest, media_type=media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the header, then one message a buffer."""
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
        last = len(self._buffers) - 1
        for position, buffer in enumerate(self._buffers):
            await send({"type": "http.response.body", "body": buffer, "more_body": position < last})


def reply_headers(
    size_bytes: int, *, digest: str, media_type: str = MEDIA_TYPES["safetensors"]
) -> list[tuple[bytes, bytes]]:
    """The header lines of a reply of rows."""
    return [
        (b"content-type", media_type.encode()),
        (b"content-length", str(size_bytes).encode()),
        (DIGEST_HEADER.encode(), digest.encode()),
        # One address, several forms: a cache between must not hand one client's form to another.
        (b"vary", b"accept"),
    ]


def in_form(form: Form, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """Arrays and metadata in any form but safetensors.

    Raises:
        RequestError: `.npy` holds one array, and these are more. BatchTooLargeError: too much for JSON.
        HTTPException: 406, Arrow without pyarrow.
    """
    if form == "json":
        return [_json(arrays, metadata)]
    if form == "npy":
        return _npy(arrays)
    assert form == "arrow", "safetensors replies are laid out by `forms`"
    return [_arrow(arrays, metadata)]


def _json(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    numbers = sum(array.size for array in arrays.values())
    if numbers > MOST_JSON_NUMBERS:
        raise BatchTooLargeError(
            f"{numbers} numbers are more than the {MOST_JSON_NUMBERS} that are written as JSON: ask for fewer rows, "
            f"or for {MEDIA_TYPES['safetensors']}",
            most=MOST_JSON_NUMBERS,
        )
    shown = {name: _nested(_readable(name, array)) for name, array in arrays.items()}
    return json.dumps({"metadata": dict(metadata), "arrays": shown}, allow_nan=False).encode()


def _readable(name: str, array: NDArray[Any]) -> NDArray[Any]:
    return from_fixed_bytes(array) if name == IDS and array.ndim == 2 else array


def _nested(array: NDArray[Any]) -> Any:
    values = array.tolist()
    if array.dtype.kind != "f" or bool(np.isfinite(array).all()):
        return values
    return _without_infinities(values)


def _without_infinities(value: Any) -> Any:
    """JSON has no infinity: null stands for the log-probability of a class that has none."""
    if isinstance(value, list):
        return [_without_infinities(item) for item in value]
    return value if math.isfinite(value) else None


def _npy(arrays: Mapping[str, NDArray[Any]]) -> list[bytes | memoryview]:
    names = [name for name in arrays if name != IDS] or [IDS]
    if len(names) != 1:
        raise RequestError(
            f"a .npy file holds one array, and this reply would have {', '.join(names)}: name one in `fields`, or ask "
            f"for {MEDIA_TYPES['safetensors']}"
        )
    array = np.ascontiguousarray(arrays[names[0]])
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return [header.getvalue(), as_buffer(array)]


def _arrow(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> memoryview:
    try:
        pa: Any = importlib.import_module("pyarrow")
    except ImportError as error:
        raise HTTPException(
            406,
            f"{MEDIA_TYPES['arrow']} needs pyarrow, which this server does not have: whoever runs it can "
            "`pip install 'softlabels[arrow]'`",
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
    return memoryview(sink.getvalue())


def _is_text(name: str, array: NDArray[Any]) -> bool:
    return name == IDS and array.ndim == 2


def _column(pa: Any, array: NDArray[Any]) -> Any:
    """An array of any shape as a column: each axis after the first is one nesting of fixed-size lists."""
    column = pa.array(np.ascontiguousarray(array).reshape(-1))
    for extent in reversed(array.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, extent)
    return column
