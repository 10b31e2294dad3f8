"""OpenAPI document: FastAPI's own, completed with the plain ASGI routes, problem details and the bearer token.

Parameters and bodies follow from the models in `api.requests`, replies to errors from the error classes.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import msgspec

from softlabels import errors, wire
from softlabels.order import EpochConfig
from softlabels_server.api.problems import MEDIA_TYPE as PROBLEM_TYPE
from softlabels_server.api.problems import Problem
from softlabels_server.api.replies import MEDIA_TYPES
from softlabels_server.api.requests import BatchQuery, BatchRequest, RowOptions

BATCH_PATH = "/v1/stores/{name}/batch"
EPOCH_PATH = "/v1/stores/{name}/epochs/{epoch}"

_REFERENCE = "#/components/schemas/{name}"
_PROBLEM_CONTENT = {PROBLEM_TYPE: {"schema": {"$ref": _REFERENCE.format(name="Problem")}}}
_FILE = {"schema": {"type": "string", "format": "binary"}}


def _problem(description: str) -> dict[str, Any]:
    return {"description": description, "content": _PROBLEM_CONTENT}


def _problems(*classes: type[errors.SoftLabelsError]) -> dict[str, dict[str, Any]]:
    """Return the replies to these errors, by status."""
    by_status = groupby(sorted(classes, key=lambda kind: kind.status), key=lambda kind: kind.status)
    return {str(status): _problem(", ".join(f"`{kind.code}`" for kind in kinds)) for status, kinds in by_status}


PROBLEMS: dict[int | str, dict[str, Any]] = {
    "4XX": _problem("The request cannot be met; `code` says why"),
    "5XX": _problem("The server or the store is damaged"),
}
"""Replies that any route may give."""

NOT_FOUND = _problem("No store of that name (`unknown-store`)")

_ROW_PROBLEMS = _problems(
    errors.UnknownStoreError,
    errors.UnknownIdError,
    errors.TemperatureLockedError,
    errors.FingerprintMismatchError,
    errors.RowsNotCommittedError,
    errors.StoreChangedError,
    errors.BatchTooLargeError,
    errors.RequestError,
    errors.EmptyBatchError,
    errors.BadIdsError,
    errors.TemperatureError,
    errors.UnknownFieldError,
)

_EXAMPLES = {
    "rows": {"summary": "Three rows, one of them twice", "value": {"ids": [7, 0, 7]}},
    "options": {
        "summary": "Chosen fields at a chosen temperature",
        "value": {"ids": [7, 0], "fields": ["targets", "labels", "fingerprints"], "temperature": 4.0},
    },
    "string ids": {"summary": "A store whose ids are strings", "value": {"ids": ["n01440764/10026.JPEG"]}},
}

_EPOCH_FIELDS = {
    "seed": "training seed, 0 … 2⁶⁴ − 1",
    "batch_size": "samples in a batch, at least 1",
    "rank": "rank of the client",
    "world_size": "number of ranks that share the epoch",
    "cursor": "samples that all ranks together have taken; the stream starts there",
    "shuffle": "`false` for the store's own order",
    "block": "shuffle blocks of this many consecutive samples",
    "remainder": "what becomes of the samples that do not fill a last step",
    "view": "view of every sample; default: the epoch number modulo the number of views",
}


def _parameter(name: str, where: str, description: str, kind: str = "string") -> dict[str, Any]:
    required = where == "path"
    return {"name": name, "in": where, "required": required, "description": description, "schema": {"type": kind}}


_NAME = _parameter("name", "path", "name of the store")
_EPOCH = _parameter("epoch", "path", "epoch number", "integer")
_IF_MATCH = _parameter("If-Match", "header", "ETag of the version that the client holds, as `digest`")


def _schema_of(model: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the JSON schema of a model."""
    _, components = msgspec.json.schema_components([model], ref_template=_REFERENCE)
    schema: dict[str, Any] = components[model.__name__]
    return schema


def _query_parameters(model: type[msgspec.Struct]) -> list[dict[str, Any]]:
    """Return the query parameters that a model stands for; lists are written with commas."""
    schema = _schema_of(model)
    return [
        {
            "name": name,
            "in": "query",
            "required": name in schema.get("required", ()),
            "description": part.get("description", ""),
            "schema": {key: value for key, value in part.items() if key != "description"},
            "style": "form",
            "explode": False,
        }
        for name, part in schema["properties"].items()
    ]


def _epoch_parameters() -> list[dict[str, Any]]:
    found = [entry for entry in _query_parameters(EpochConfig) if entry["name"] in _EPOCH_FIELDS]
    return [{**entry, "description": _EPOCH_FIELDS[entry["name"]]} for entry in found]


_ROWS_HEADERS = {
    "Softlabels-Digest": {"description": "version of the store", "schema": {"type": "string"}},
    "Content-Length": {"description": "exact", "schema": {"type": "integer"}},
}


def _operation(summary: str, description: str, name: str, **parts: Any) -> dict[str, Any]:
    return {"tags": ["stores"], "summary": summary, "description": description, "operationId": name, **parts}


def _batch_operation() -> dict[str, Any]:
    binary = "int64 ids, little-endian, 8 bytes each, and the other `columns`; options go into the query"
    return _operation(
        "Rows by sample id, as one safetensors file",
        "Rows come in the order asked. Query parameters go with binary ids only; JSON bodies carry all options. The "
        "ids of the rows, as the store keeps them, come with every reply.",
        "batch",
        parameters=[_NAME, _IF_MATCH, *_query_parameters(BatchQuery)],
        requestBody={
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"$ref": _REFERENCE.format(name="BatchRequest")},
                    "examples": _EXAMPLES,
                },
                "application/octet-stream": {"schema": {"type": "string", "format": "binary", "description": binary}},
            },
        },
        responses={
            "200": {
                "description": "A safetensors file: the encoding's arrays, what else was asked for, and `ids`. "
                "Metadata, all strings: format, store, digest, encoding (JSON), classes, temperature, "
                "captured_temperature, locked, rows.",
                "headers": _ROWS_HEADERS,
                "content": {
                    **dict.fromkeys(MEDIA_TYPES.values(), _FILE),
                    "application/json": {"schema": {"type": "object"}},
                },
            },
            "406": _problem("No available format is acceptable"),
            "408": _problem("The body did not arrive in time"),
            "415": _problem("The body is neither JSON nor binary ids"),
            **_ROW_PROBLEMS,
            **PROBLEMS,
        },
    )


def _epoch_operation() -> dict[str, Any]:
    return _operation(
        "One rank's batches of an epoch, as one stream",
        "Safetensors files end to end, one for each batch, and at the end one without arrays that says how many there "
        "were. The order follows from the store's digest, the seed and the epoch number.",
        "epoch",
        parameters=[_NAME, _EPOCH, _IF_MATCH, *_epoch_parameters(), *_query_parameters(RowOptions)],
        responses={
            "200": {
                "description": "The stream. Metadata of a frame: those of a batch reply, `cursor` and `repeated`.",
                "headers": _ROWS_HEADERS,
                "content": {wire.MEDIA_TYPE: _FILE},
            },
            "406": _problem("No available format is acceptable"),
            **_ROW_PROBLEMS,
            **PROBLEMS,
        },
    )


def complete(document: dict[str, Any], *, with_token: bool) -> dict[str, Any]:
    """Return the document with the plain ASGI routes, problem details and, where required, the token.

    Args:
        document: as FastAPI makes it of its own routes.
        with_token: whether requests must carry a bearer token.
    """
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas |= {model.__name__: _schema_of(model) for model in (Problem, BatchRequest)}
    document["paths"] |= {
        BATCH_PATH: {"post": _batch_operation()},
        EPOCH_PATH: {"get": _epoch_operation()},
    }
    if with_token:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
        document["paths"]["/health"]["get"]["security"] = []
    return document
