"""Requests: typed bodies and query strings, sample ids as arrays, and version tags in headers."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, TypeVar
from urllib.parse import parse_qsl

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from softlabels import wire
from softlabels.documents import Document, parse_document
from softlabels.errors import BadIdsError, BatchTooLargeError, EmptyBatchError, RequestError, UnknownIdError
from softlabels.ids import IdArray, as_ids
from softlabels.manifest import Manifest
from softlabels_server.fast_path.response_plan import COLUMN_WIDTHS, split_columns
from softlabels_server.settings import Settings

TARGETS = "targets"
"""In `fields`: every array of the store's encoding."""

_LISTS = frozenset({"fields", "columns"})

Int64: TypeAlias = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Span: TypeAlias = Annotated[list[Int64], Meta(min_length=2, max_length=2)]

Q = TypeVar("Q", bound=Document)


_TEMPERATURE_SCHEMA = {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]}
_IDS_SCHEMA = {"minItems": 1, "items": {"anyOf": [{"type": "integer", "format": "int64"}, {"type": "string"}]}}


class RowOptions(Document, frozen=True, kw_only=True):
    """Options of a batch and of an epoch stream: keys of JSON bodies and query strings.

    The OpenAPI document takes the descriptions from here; docs/http.md has the details. `api.batch` checks what depends
    on the store.
    """

    fields: Annotated[
        list[str] | None, Meta(description="arrays to return beside the ids; `targets`: all arrays of the encoding")
    ] = None
    # `Any`, since a wrong temperature has a separate error code, `bad-temperature`.
    temperature: Annotated[
        Any,
        Meta(description="temperature of the targets; default: the store's", extra_json_schema=_TEMPERATURE_SCHEMA),
    ] = None
    transfer_set: Annotated[
        str | None, Meta(description="fingerprint of the client's transfer set; another is `fingerprint-mismatch`")
    ] = None
    digest: Annotated[
        str | None, Meta(description="version of the store that the client holds; another is `store-changed`")
    ] = None


class BatchOptions(RowOptions, frozen=True, kw_only=True):
    """Options of a batch."""

    decode: Annotated[
        Literal["logits", "p"] | None,
        Meta(description="have the server decode the targets to float32 logits or probabilities; default: encoded"),
    ] = None


class BatchRequest(BatchOptions, frozen=True, kw_only=True):
    """JSON body of a batch request."""

    # `Any`, since wrong ids have a separate error code, `bad-ids`.
    ids: Annotated[
        list[Any],
        Meta(description="sample ids, all integers or all strings; may repeat", extra_json_schema=_IDS_SCHEMA),
    ]
    views: Annotated[list[Int64] | None, Meta(description="view of each sample, if the store has views")] = None
    spans: Annotated[
        list[Span] | None, Meta(description="row range of each sample, for sequences; default: whole samples")
    ] = None


class BatchQuery(BatchOptions, frozen=True, kw_only=True):
    """Query string of a batch request with binary ids."""

    columns: Annotated[
        list[Literal["ids", "views", "spans"]], Meta(description="columns of the body, in order; default: `ids`")
    ] = msgspec.field(default_factory=lambda: ["ids"])

    def __post_init__(self) -> None:
        if self.columns[0] != "ids" or len(set(self.columns)) != len(self.columns):
            raise ValueError("columns must begin with ids and name each column once, as columns=ids,views")


@dataclass(frozen=True, kw_only=True)
class BatchSelection:
    """Samples of a batch, from a JSON or binary body.

    Attributes:
        ids: [B], B ≥ 1; may repeat.
        views: [B], view of each sample, for stores with views.
        spans: [B, 2], row ranges of sequences; None for whole ones.
        options: all other keys of the request.
        columns: names of the columns in the order of the request.
        column_bytes: their bytes, see `wire.column_bytes`.
    """

    ids: IdArray
    views: NDArray[np.int64] | None = None
    spans: NDArray[np.int64] | None = None
    options: BatchOptions
    columns: tuple[str, ...]
    column_bytes: bytes

    def question(self, digest: str) -> int:
        """Return the checksum of the request up to the columns, to a store of this digest."""
        options = self.options
        return wire.batch_question(
            digest,
            columns=self.columns,
            fields=options.fields,
            temperature=options.temperature,
            decode=options.decode,
        )


def from_json(body: bytes, manifest: Manifest, settings: Settings) -> BatchSelection:
    """Return the selection in a JSON body.

    Raises:
        RequestError: not a JSON object, or a key missing, unknown or of the wrong type.
        EmptyBatchError, BatchTooLargeError, BadIdsError, UnknownIdError.
    """
    try:
        # Not msgspec's decoder, which refuses NaN as invalid JSON: `bad-temperature` tells a client more.
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f'the body is not JSON ({error}); send an object such as {{"ids": [0, 1, 2]}}') from error
    request = parse_document(document, BatchRequest, what="request body", error=RequestError)
    count = len(request.ids)
    for name, values in (("views", request.views), ("spans", request.spans)):
        if values is not None and len(values) != count:
            raise RequestError(f"request body: `{name}` has {len(values)} entries for {count} ids: give one per id")
    ids = _checked_ids(request.ids, manifest, settings)
    views = None if request.views is None else np.array(request.views, dtype=np.int64)
    spans = None if request.spans is None else np.array(request.spans, dtype=np.int64).reshape(count, 2)
    named = {"ids": ids, "views": views, "spans": spans}
    return BatchSelection(
        ids=ids,
        views=views,
        spans=spans,
        options=request,
        columns=tuple(name for name, values in named.items() if values is not None),
        column_bytes=wire.column_bytes(ids, views, spans),
    )


def from_binary(body: bytes, query: str, settings: Settings) -> BatchSelection:
    """Return the selection in a body of little-endian int64 columns and a query string with the options.

    Raises:
        RequestError: a query parameter is unknown, repeated or of the wrong type.
        EmptyBatchError, BatchTooLargeError, BadIdsError.
    """
    options = parse_query(read_query(query), BatchQuery)
    columns = tuple(options.columns)
    sample_bytes = 8 * sum(COLUMN_WIDTHS[name] for name in columns)
    if len(body) % sample_bytes:
        raise BadIdsError(
            f"{len(body)} bytes are not a whole number of samples: columns {','.join(columns)} take {sample_bytes} "
            "bytes a sample, as little-endian int64"
        )
    count = len(body) // sample_bytes
    _check_count(count, settings)
    return BatchSelection(**split_columns(body, columns, count), options=options, columns=columns, column_bytes=body)


def read_query(query: str) -> dict[str, str]:
    """Return the parameters of a query string. Raises RequestError if one is repeated."""
    pairs = parse_qsl(query, keep_blank_values=True)
    parameters = dict(pairs)
    if len(parameters) != len(pairs):
        raise RequestError("a query parameter is repeated: give each once, fields as fields=targets,labels")
    return parameters


def parse_query(parameters: Mapping[str, str], kind: type[Q]) -> Q:
    """Return query parameters as a typed model, with lists separated by commas. Raises RequestError."""
    document: dict[str, Any] = dict(parameters)
    for name, text in parameters.items():
        if name in _LISTS:
            document[name] = text.split(",")
        elif name == "temperature":
            with contextlib.suppress(ValueError):  # text is refused later, as `bad-temperature`
                document[name] = float(text)
    return parse_document(document, kind, what="query", error=RequestError)


def too_large(count: int, most: int, what: str = "ids") -> BatchTooLargeError:
    """Return the error for more ids or rows than one reply may hold."""
    return BatchTooLargeError(
        f"{count} {what} are more than the {most} that this server answers at once: ask in smaller batches", most=most
    )


def short(value: object) -> str:
    """Return a caller's value, shortened to fit a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


async def read_body(receive: Receive, headers: Headers, *, max_bytes: int, timeout_s: float) -> bytes:
    """Return the request's body. uvicorn limits neither its size nor its time.

    Raises:
        BatchTooLargeError: larger than `max_bytes`, or its header says so.
        HTTPException: 408, incomplete after `timeout_s`.
        ClientDisconnect: the client is gone.
    """
    announced = headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _body_too_large(max_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            return await _receive_all(receive, max_bytes)
    except TimeoutError as error:
        # Closed, since the rest of this body could not be distinguished from the next request.
        closing = {"Connection": "close"}
        raise HTTPException(408, f"its body was incomplete after {timeout_s:g} s", closing) from error


def etag_of(digest: str) -> str:
    """Return the strong entity tag of a version (RFC 9110, section 8.8.3)."""
    return f'"{digest}"'


def names_digest(header: str | None, digest: str) -> bool:
    """Return whether an If-Match or If-None-Match header names this version; False without one (RFC 9110, 13.1).

    A weak tag counts too: a cache may have weakened ours, and versions with one digest have the same bytes.
    """
    if header is None:
        return False
    tags = {tag.strip().removeprefix("W/") for tag in header.split(",")}
    return "*" in tags or etag_of(digest) in tags


async def _receive_all(receive: Receive, max_bytes: int) -> bytes:
    pieces: list[bytes] = []
    left = max_bytes
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        pieces.append(message.get("body", b""))
        left -= len(pieces[-1])
        if left < 0:
            raise _body_too_large(max_bytes)
        if not message.get("more_body", False):
            return b"".join(pieces)  # a single piece is not copied


def _body_too_large(max_bytes: int) -> BatchTooLargeError:
    return BatchTooLargeError(
        f"the request's body is larger than {max_bytes} bytes: ask in smaller batches", most=max_bytes
    )


def _check_count(count: int, settings: Settings) -> None:
    if count == 0:
        raise EmptyBatchError("a batch needs at least one id: an empty one usually means a mistake in the sampler")
    if count > settings.max_batch_ids:
        raise too_large(count, settings.max_batch_ids)


def _checked_ids(values: list[Any], manifest: Manifest, settings: Settings) -> IdArray:
    _check_count(len(values), settings)
    kinds = set(map(type, values))
    # Python's bool is a kind of int: `true` would be taken for id 1.
    if bool in kinds:
        raise BadIdsError("true and false are not sample ids: ids are integers or strings")
    if kinds == {str}:
        _check_text_ids(values, manifest)
    return as_ids(values)


def _check_text_ids(values: list[str], manifest: Manifest) -> None:
    spec = manifest.ids
    if spec.kind != "str":
        raise BadIdsError(f"sample ids of {manifest.name!r} are integers, not strings")
    # Checked before they become an array, in which every entry takes as much memory as the longest.
    longest = max(values, key=len)
    if len(longest) > spec.width_bytes:
        raise UnknownIdError(f"{manifest.name!r} holds no sample {short(longest)}", ids=[longest[:128]], missing=1)
    text = "".join(values)
    if "\0" in text:
        raise BadIdsError("a sample id holds a NUL character, which no store accepts")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadIdsError(f"a sample id is not valid Unicode: {error.reason}") from error
