"""OpenAPI document: FastAPI's, completed with the plain ASGI routes, problem details and the bearer token.

Parameters and bodies follow from the typed requests, error replies from the error classes; docs/http.md says more.
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
FILE = {"schema": {"type": "string", "format": "binary"}}


def problem(description: str) -> dict[str, Any]:
    """Return the description of an error reply."""
    content = {PROBLEM_TYPE: {"schema": {"$ref": _REFERENCE.format(name="Problem")}}}
    return {"description": description, "content": content}


PROBLEMS: dict[int | str, dict[str, Any]] = {
    "4XX": problem("The request cannot be met; `code` says why"),
    "5XX": problem("The server or the store is damaged"),
}
"""Error replies of every route."""

_ROW_ERRORS: tuple[type[errors.SoftLabelsError], ...] = (
    *(errors.UnknownStoreError, errors.UnknownIdError, errors.TemperatureLockedError, errors.FingerprintMismatchError),
    *(errors.RowsNotCommittedError, errors.StoreChangedError, errors.BatchTooLargeError, errors.RequestError),
    *(errors.EmptyBatchError, errors.BadIdsError, errors.TemperatureError, errors.UnknownFieldError),
)

_EXAMPLES = {
    "rows": {"summary": "Three rows, one of them twice", "value": {"ids": [7, 0, 7]}},
    "options": {
        "summary": "Chosen fields at a chosen temperature",
        "value": {"ids": [7, 0], "fields": ["targets", "labels", "fingerprints"], "temperature": 4.0},
    },
    "string ids": {"summary": "A store whose ids are strings", "value": {"ids": ["n01440764/10026.JPEG"]}},
}

_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
_EPOCH = {"name": "epoch", "in": "path", "required": True, "schema": {"type": "integer"}}
_IF_MATCH = {"name": "If-Match", "in": "header", "description": "as `digest`", "schema": {"type": "string"}}
_VERIFY = {
    "name": "Softlabels-Verify",
    "in": "header",
    "description": "`1`: compare the rows with what was written, after a reply whose checksum failed",
    "schema": {"type": "string"},
}
_REPLY_HEADERS = {
    "Softlabels-Digest": {"description": "version of the store", "schema": {"type": "string"}},
    "Softlabels-CRC32C": {
        "description": "CRC-32C of question and body in hex, for formats that do not end with it; docs/http.md",
        "schema": {"type": "string"},
    },
}


def _schema_of(model: type[msgspec.Struct]) -> dict[str, Any]:
    _, components = msgspec.json.schema_components([model], ref_template=_REFERENCE)
    schema: dict[str, Any] = components[model.__name__]
    return schema


def _query_parameters(model: type[msgspec.Struct]) -> list[dict[str, Any]]:
    """Return the fields of a model as query parameters; lists are written with commas."""
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
        if name != "epoch"  # in the path
    ]


def _row_replies(description: str, media_types: list[str]) -> dict[int | str, dict[str, Any]]:
    by_status = groupby(sorted(_ROW_ERRORS, key=lambda kind: kind.status), key=lambda kind: kind.status)
    return {
        "200": {
            "description": description,
            "headers": _REPLY_HEADERS,
            "content": dict.fromkeys(media_types, FILE),
        },
        "406": problem("No available format is acceptable"),
        **{str(status): problem(", ".join(f"`{kind.code}`" for kind in kinds)) for status, kinds in by_status},
        **PROBLEMS,
    }


def _batch_operation() -> dict[str, Any]:
    json_body = {"schema": {"$ref": _REFERENCE.format(name="BatchRequest")}, "examples": _EXAMPLES}
    binary_body = {"schema": {**FILE["schema"], "description": "`columns`, int64, little-endian"}}
    return {
        "tags": ["stores"],
        "summary": "Rows by sample id, in the order asked",
        "description": "Query parameters go with binary ids only; a JSON body has all options.",
        "operationId": "batch",
        "parameters": [_NAME, _IF_MATCH, _VERIFY, *_query_parameters(BatchQuery)],
        "requestBody": {
            "required": True,
            "content": {"application/json": json_body, "application/octet-stream": binary_body},
        },
        "responses": {
            **_row_replies("The encoding's arrays, `fields` and `ids`", list(MEDIA_TYPES.values())),
            "408": problem("The body did not arrive in time"),
            "415": problem("The body is neither JSON nor binary ids"),
        },
    }


def _epoch_operation() -> dict[str, Any]:
    description = (
        "A safetensors file for each batch, end to end, then one without arrays that says how many there were."
    )
    return {
        "tags": ["stores"],
        "summary": "One rank's batches of an epoch, as one stream",
        "description": "The order follows from the store's digest, the seed and the epoch number.",
        "operationId": "epoch",
        "parameters": [
            _NAME,
            _EPOCH,
            _IF_MATCH,
            _VERIFY,
            *_query_parameters(EpochConfig),
            *_query_parameters(RowOptions),
        ],
        "responses": _row_replies(description, [wire.MEDIA_TYPE]),
    }


def complete(document: dict[str, Any], *, with_token: bool) -> dict[str, Any]:
    """Add the plain ASGI routes, problem details and, if required, the bearer token to FastAPI's document."""
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
        # An empty list lifts the requirement for one route: `app.OPEN_PATHS` needs no token.
        document["paths"]["/health"]["get"]["security"] = []
    return document
