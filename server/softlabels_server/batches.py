"""What a batch request asks for: read from JSON or from binary ids, checked against the store, gathered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from softlabels import wire
from softlabels.errors import (
    BadIdsError,
    BatchTooLargeError,
    EmptyBatchError,
    RequestError,
    StoreChangedError,
    TemperatureError,
    UnknownFieldError,
    UnknownIdError,
)
from softlabels.ids import IdArray, as_ids, kind_of, to_fixed_bytes
from softlabels.opening import IDS, LABELS, refuse_other_transfer_set
from softlabels.softmath import check_temperature
from softlabels.targets import refuse_if_locked
from softlabels_server.catalog import ServedStore
from softlabels_server.settings import Settings

TARGETS = "targets"
"""In a request: every array of the store's encoding, however many it has."""

JSON_KEYS = frozenset({"ids", "fields", "temperature", "transfer_set", "digest"})
QUERY_KEYS = JSON_KEYS - {"ids"}

REPLY_FORMAT = "softlabels-batch/1"
"""What the metadata of a reply call its form; docs/http.md describes it."""


@dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """What a client asks of one store.

    Attributes:
        ids: [B], at least one; they may repeat.
        fields: what to return beside the ids; None leaves the choice to the server.
        temperature: what the reply is to say it is tempered for, unchecked; None takes the store's default.
        transfer_set: fingerprint of the client's own data, refused where it differs.
        digest: version of the store that the client holds, refused where it differs.
    """

    ids: IdArray
    fields: tuple[str, ...] | None = None
    temperature: object = None
    transfer_set: str | None = None
    digest: str | None = None


def from_json(body: bytes, store: ServedStore, settings: Settings) -> BatchRequest:
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
    _refuse_unknown_keys(document, JSON_KEYS, "the body")
    ids = document.get("ids")
    if not isinstance(ids, list):
        raise RequestError('the body has no list of ids; send an object like {"ids": [0, 1, 2]}')
    fields = document.get("fields")
    if fields is not None and not (isinstance(fields, list) and all(isinstance(field, str) for field in fields)):
        raise RequestError(f"fields is {_short(fields)}, not a list of names such as {TARGETS!r} and {LABELS!r}")
    return BatchRequest(
        ids=_checked_ids(ids, store, settings),
        fields=None if fields is None else tuple(fields),
        temperature=document.get("temperature"),
        transfer_set=_text_or_none(document, "transfer_set"),
        digest=_text_or_none(document, "digest"),
    )


def from_binary(body: bytes, query: str, settings: Settings) -> BatchRequest:
    """Read a request whose body is little-endian int64 ids and whose query string says the rest.

    Raises:
        RequestError: a query parameter that is unknown or stands twice.
        EmptyBatchError, BatchTooLargeError, BadIdsError, TemperatureError.
    """
    pairs = parse_qsl(query, keep_blank_values=True)
    parameters = dict(pairs)
    _refuse_unknown_keys(parameters, QUERY_KEYS, "the query")
    if len(parameters) != len(pairs):
        raise RequestError("a query parameter stands twice: give each once, fields as fields=targets,labels")
    if len(body) % 8:
        raise BadIdsError(f"{len(body)} bytes are not a whole number of ids: send int64, little-endian, 8 bytes each")
    _refuse_bad_count(len(body) // 8, settings)
    fields = parameters.get("fields")
    return BatchRequest(
        ids=np.frombuffer(body, dtype="<i8").astype(np.int64, copy=False),
        fields=None if fields is None else tuple(fields.split(",")),
        temperature=_number(parameters["temperature"]) if "temperature" in parameters else None,
        transfer_set=parameters.get("transfer_set"),
        digest=parameters.get("digest"),
    )


@dataclass(frozen=True, kw_only=True)
class Gathering:
    """A batch that may be had: what is left to do is to copy its rows.

    Attributes:
        store: the version that it is a batch of.
        ids: [B].
        names: of the arrays to copy, `ids` among them.
        temperature: what the reply says it is tempered for.
        reply_bytes: how many bytes the arrays take.
    """

    store: ServedStore
    ids: IdArray
    names: tuple[str, ...]
    temperature: float
    reply_bytes: int

    def buffers(self) -> list[bytes | memoryview]:
        """A safetensors file of encoded rows in the order asked, as buffers to be sent one after the other.

        Raises:
            UnknownIdError, BadIdsError, RowsNotCommittedError, DamageError.
        """
        arrays = self.store.rows.fetch(self.ids, self.names)
        # Ids come from the store and not from the request: whether row i is the row asked for shows in the reply.
        ids: Any = arrays[IDS]
        if kind_of(ids) == "str":
            arrays[IDS] = to_fixed_bytes(ids, width_bytes=self.store.manifest.ids.width_bytes)
        return wire.to_buffers(arrays, _metadata(self.store, self.temperature, len(self.ids)))


def plan(store: ServedStore, request: BatchRequest, settings: Settings) -> Gathering:
    """What a request comes down to, if this store may answer it.

    Raises:
        StoreChangedError, FingerprintMismatchError, TemperatureError, TemperatureLockedError, UnknownFieldError,
        BatchTooLargeError.
    """
    refuse_other_version(store, request.digest)
    refuse_other_transfer_set(store.manifest, request.transfer_set)
    temperature = _temperature(store, request.temperature)
    names = _array_names(store, request.fields)
    row_bytes = sum(store.manifest.arrays[name].row_bytes for name in names)
    most = settings.max_reply_bytes // row_bytes
    if len(request.ids) > most:
        raise _too_large(len(request.ids), most)
    return Gathering(
        store=store,
        ids=request.ids,
        names=names,
        temperature=temperature,
        reply_bytes=row_bytes * len(request.ids),
    )


def refuse_other_version(store: ServedStore, digest: str | None) -> None:
    """Let a digest pass that is this version's, or None.

    Raises:
        StoreChangedError: the client holds another version of the store.
    """
    if digest is not None and digest != store.digest:
        raise StoreChangedError(
            f"store {store.name!r} is now at version {store.digest}, you hold {_short(digest)}: rows of two versions "
            "must not be mixed; open the store again",
            store=store.digest,
            yours=digest[:128],
        )


def _checked_ids(values: list[Any], store: ServedStore, settings: Settings) -> IdArray:
    _refuse_bad_count(len(values), settings)
    kinds = set(map(type, values))
    if bool in kinds:
        raise BadIdsError("true and false are no sample ids: ids are integers or strings")
    if kinds == {str}:
        _refuse_bad_strings(values, store)
    return as_ids(values)


def _refuse_bad_strings(values: list[str], store: ServedStore) -> None:
    spec = store.manifest.ids
    if spec.kind != "str":
        raise BadIdsError(f"sample ids of {store.name!r} are integers, not strings")
    # Before they become an array: each of its entries takes as much room as the longest.
    longest = max(values, key=len)
    if len(longest) > spec.width_bytes:
        raise UnknownIdError(f"{store.name!r} holds no sample {_short(longest)}", ids=[longest[:128]], missing=1)
    text = "".join(values)
    if "\0" in text:
        raise BadIdsError("a sample id holds a NUL character, which no store keeps")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadIdsError(
            f"a sample id is not valid Unicode ({error.reason}): half a surrogate pair has no UTF-8"
        ) from error


def _refuse_bad_count(count: int, settings: Settings) -> None:
    if count == 0:
        raise EmptyBatchError("a batch needs at least one id: an empty one usually means a mistake in the sampler")
    if count > settings.max_batch_ids:
        raise _too_large(count, settings.max_batch_ids)


def _too_large(count: int, most: int) -> BatchTooLargeError:
    return BatchTooLargeError(
        f"{count} ids are more than the {most} that this server answers at once: ask in smaller batches", most=most
    )


def _temperature(store: ServedStore, asked: object) -> float:
    spec = store.manifest.temperature
    temperature = spec.default if asked is None else check_temperature(asked)
    refuse_if_locked(temperature, captured=spec.captured, locked=spec.locked)
    return temperature


def _array_names(store: ServedStore, fields: tuple[str, ...] | None) -> tuple[str, ...]:
    """The arrays to gather: what the fields stand for, each once, and always the ids."""
    kept, encoded = store.manifest.arrays, tuple(store.encoding.fields)
    if fields is None:
        fields = (TARGETS, LABELS) if LABELS in kept else (TARGETS,)
    names: list[str] = []
    for field in fields:
        if field == TARGETS:
            names.extend(encoded)
        elif field in kept:
            names.append(field)
        else:
            known = ", ".join(sorted({TARGETS, *kept}))
            raise UnknownFieldError(
                f"store {store.name!r} keeps no {_short(field)}; it keeps {known}", field=field[:128]
            )
    return tuple(dict.fromkeys([*names, IDS]))


def _metadata(store: ServedStore, temperature: float, rows: int) -> dict[str, str]:
    manifest = store.manifest
    return {
        "format": REPLY_FORMAT,
        "store": store.name,
        "digest": store.digest,
        "encoding": json.dumps({"name": manifest.encoding.name, "params": dict(manifest.encoding.params)}),
        "classes": str(manifest.classes),
        "temperature": repr(temperature),
        "captured_temperature": repr(float(manifest.temperature.captured)),
        "locked": "true" if manifest.temperature.locked else "false",
        "rows": str(rows),
    }


def _refuse_unknown_keys(given: Mapping[str, object], known: frozenset[str], where: str) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        # A misspelt "temprature" that is skipped would be a silent answer to another question.
        raise RequestError(f"{where} has unknown keys {', '.join(map(_short, unknown[:5]))}; known are {sorted(known)}")


def _text_or_none(document: Mapping[str, Any], key: str) -> str | None:
    value = document.get(key)
    if value is not None and not isinstance(value, str):
        raise RequestError(f"{key} is {_short(value)}, not a string")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise TemperatureError(
            f"the temperature is {_short(text)}, not a finite number above 0 such as 4.0", temperature=text[:128]
        ) from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
