"""What does a client ask for? A batch request, read from JSON or from binary ids, and nothing of it believed yet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import (
    BadIdsError,
    BatchTooLargeError,
    EmptyBatchError,
    RequestError,
    TemperatureError,
    UnknownIdError,
)
from softlabels.ids import IdArray, as_ids
from softlabels.manifest import Manifest
from softlabels_server.settings import Settings

TARGETS = "targets"
"""In a request: every array of the store's encoding, however many it has."""

COMMON_KEYS = frozenset({"fields", "temperature", "transfer_set", "digest", "decode"})
JSON_KEYS = COMMON_KEYS | {"ids", "views", "spans"}
QUERY_KEYS = COMMON_KEYS | {"columns"}

COLUMNS: Mapping[str, int] = {"ids": 1, "views": 1, "spans": 2}
"""What a binary body may hold, one column after the other, and how many int64 each sample takes in it."""

DECODINGS = ("logits", "p")


@dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """What a client asks of one store.

    Attributes:
        ids: [B], at least one; they may repeat.
        views: [B] which view of each sample, for stores that keep views.
        spans: [B, 2] ranges of sequences; None asks for whole ones.
        fields: what to return beside the ids; None leaves the choice to the server.
        temperature: what the reply is to be tempered for, unchecked; None takes the store's default.
        transfer_set: fingerprint of the client's own data, refused where it differs.
        digest: version of the store that the client holds, refused where it differs.
        decode: "logits" or "p" has the server decode the targets at that temperature; None sends them as they are kept.
    """

    ids: IdArray
    views: NDArray[np.int64] | None = None
    spans: NDArray[np.int64] | None = None
    fields: tuple[str, ...] | None = None
    temperature: object = None
    transfer_set: str | None = None
    digest: str | None = None
    decode: str | None = None


def from_json(body: bytes, manifest: Manifest, settings: Settings) -> BatchRequest:
    """Read a request's JSON body.

    Raises:
        RequestError: not a JSON object, or a key missing, unknown or of the wrong type.
        EmptyBatchError, BatchTooLargeError, BadIdsError, UnknownIdError.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f'the body is not JSON ({error}); send an object like {{"ids": [0, 1, 2]}}') from error
    if not isinstance(document, dict):
        raise RequestError('the body is JSON but no object; send one like {"ids": [0, 1, 2]}')
    refuse_unknown_keys(document, JSON_KEYS, "the body")
    ids = document.get("ids")
    if not isinstance(ids, list):
        raise RequestError('the body has no list of ids; send an object like {"ids": [0, 1, 2]}')
    fields = document.get("fields")
    if fields is not None and not (isinstance(fields, list) and all(isinstance(field, str) for field in fields)):
        raise RequestError(f"fields is {short(fields)}, not a list of names such as {TARGETS!r} and 'labels'")
    return BatchRequest(
        ids=_checked_ids(ids, manifest, settings),
        views=_whole_numbers(document.get("views"), "views", (len(ids),)),
        spans=_whole_numbers(document.get("spans"), "spans", (len(ids), 2)),
        fields=None if fields is None else tuple(fields),
        temperature=document.get("temperature"),
        transfer_set=_text_or_none(document, "transfer_set"),
        digest=_text_or_none(document, "digest"),
        decode=checked_decoding(document.get("decode")),
    )


def from_binary(body: bytes, query: str, settings: Settings) -> BatchRequest:
    """Read a request whose body is little-endian int64 columns and whose query string says the rest.

    Raises:
        RequestError: a query parameter that is unknown or stands twice.
        EmptyBatchError, BatchTooLargeError, BadIdsError, TemperatureError.
    """
    parameters = read_query(query, QUERY_KEYS)
    columns = _columns(parameters.get("columns"))
    width = sum(COLUMNS[name] for name in columns)
    if len(body) % (8 * width):
        raise BadIdsError(
            f"{len(body)} bytes are not a whole number of samples: send int64, little-endian, {8 * width} bytes a "
            f"sample for the columns {','.join(columns)}"
        )
    count = len(body) // (8 * width)
    refuse_bad_count(count, settings)
    return BatchRequest(
        **split_columns(body, columns, count),
        fields=fields_of(parameters),
        temperature=temperature_of(parameters),
        transfer_set=parameters.get("transfer_set"),
        digest=parameters.get("digest"),
        decode=checked_decoding(parameters.get("decode")),
    )


def split_columns(body: bytes | memoryview, columns: tuple[str, ...], count: int) -> dict[str, NDArray[np.int64]]:
    """The columns of a binary body by name, [count] or [count, 2] each, views of the body."""
    found, begin = {}, 0
    for name in columns:
        values = np.frombuffer(body, dtype="<i8", count=count * COLUMNS[name], offset=begin).astype(
            np.int64, copy=False
        )
        found[name] = values if COLUMNS[name] == 1 else values.reshape(count, COLUMNS[name])
        begin += values.nbytes
    return found


def read_query(query: str, known: frozenset[str]) -> dict[str, str]:
    """The parameters of a query string.

    Raises:
        RequestError: one that is not known, or stands twice.
    """
    pairs = parse_qsl(query, keep_blank_values=True)
    parameters = dict(pairs)
    refuse_unknown_keys(parameters, known, "the query")
    if len(parameters) != len(pairs):
        raise RequestError("a query parameter stands twice: give each once, fields as fields=targets,labels")
    return parameters


def fields_of(parameters: Mapping[str, str]) -> tuple[str, ...] | None:
    """The fields that a query names, None where it leaves them open."""
    fields = parameters.get("fields")
    return None if fields is None else tuple(fields.split(","))


def temperature_of(parameters: Mapping[str, str]) -> float | None:
    """The temperature that a query names. Raises TemperatureError: it is no number."""
    text = parameters.get("temperature")
    try:
        return None if text is None else float(text)
    except ValueError as error:
        raise TemperatureError(
            f"the temperature is {short(text)}, not a finite number above 0 such as 4.0", temperature=str(text)[:128]
        ) from error


def checked_decoding(decode: object) -> str | None:
    """How the server is to decode, or None. Raises RequestError: a way that there is not."""
    if decode is None or (isinstance(decode, str) and decode in DECODINGS):
        return decode
    raise RequestError(f"decode is {short(decode)}: choose {' or '.join(DECODINGS)}, or leave it out for encoded rows")


def refuse_unknown_keys(given: Mapping[str, object], known: frozenset[str], where: str) -> None:
    """Refuse a key that is not known: a misspelt "temprature", skipped, would silently answer another question."""
    unknown = sorted(set(given) - known)
    if unknown:
        raise RequestError(f"{where} has unknown keys {', '.join(map(short, unknown[:5]))}; known are {sorted(known)}")


def refuse_bad_count(count: int, settings: Settings) -> None:
    """Refuse a batch of none, or of more than the server answers at once."""
    if count == 0:
        raise EmptyBatchError("a batch needs at least one id: an empty one usually means a mistake in the sampler")
    if count > settings.max_batch_ids:
        raise too_large(count, settings.max_batch_ids)


def too_large(count: int, most: int, what: str = "ids") -> BatchTooLargeError:
    """The error for more ids or rows than one reply may hold."""
    return BatchTooLargeError(
        f"{count} {what} are more than the {most} that this server answers at once: ask in smaller batches", most=most
    )


def short(value: object) -> str:
    """A caller's value as a message can quote it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _columns(text: str | None) -> tuple[str, ...]:
    names = ("ids",) if text is None else tuple(text.split(","))
    if names[0] != "ids" or len(set(names)) != len(names) or not set(names) <= set(COLUMNS):
        raise RequestError(
            f"columns is {short(text)}: the body begins with ids, then may come {' or '.join(list(COLUMNS)[1:])}, "
            "as columns=ids,views"
        )
    return names


def _whole_numbers(values: object, what: str, shape: tuple[int, ...]) -> NDArray[np.int64] | None:
    """A list of whole numbers, or of pairs of them, as an array."""
    if values is None:
        return None
    rows = values if isinstance(values, list) and len(values) == shape[0] else None
    if rows is not None and len(shape) == 2:
        pairs = all(isinstance(row, list) and len(row) == shape[1] for row in rows)
        rows = [number for row in rows for number in row] if pairs else None
    if rows is None or not set(map(type, rows)) <= {int}:
        form = "[first row, row after the last] for each id" if len(shape) == 2 else "one whole number for each id"
        raise RequestError(f"{what} is {short(values)}: give {form}")
    try:
        return np.array(rows, dtype=np.int64).reshape(shape)
    except OverflowError as error:
        raise RequestError(f"{what} holds a number beyond 64 bits") from error


def _checked_ids(values: list[Any], manifest: Manifest, settings: Settings) -> IdArray:
    refuse_bad_count(len(values), settings)
    kinds = set(map(type, values))
    if bool in kinds:
        raise BadIdsError("true and false are no sample ids: ids are integers or strings")
    if kinds == {str}:
        _refuse_bad_strings(values, manifest)
    return as_ids(values)


def _refuse_bad_strings(values: list[str], manifest: Manifest) -> None:
    spec = manifest.ids
    if spec.kind != "str":
        raise BadIdsError(f"sample ids of {manifest.name!r} are integers, not strings")
    # Before they become an array: each of its entries takes as much room as the longest.
    longest = max(values, key=len)
    if len(longest) > spec.width_bytes:
        raise UnknownIdError(f"{manifest.name!r} holds no sample {short(longest)}", ids=[longest[:128]], missing=1)
    text = "".join(values)
    if "\0" in text:
        raise BadIdsError("a sample id holds a NUL character, which no store keeps")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadIdsError(
            f"a sample id is not valid Unicode ({error.reason}): half a surrogate pair has no UTF-8"
        ) from error


def _text_or_none(document: Mapping[str, Any], key: str) -> str | None:
    value = document.get(key)
    if value is not None and not isinstance(value, str):
        raise RequestError(f"{key} is {short(value)}, not a string")
    return value
