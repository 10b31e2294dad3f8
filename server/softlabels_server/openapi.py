"""What the OpenAPI document says beyond what FastAPI finds out by itself: the batch route, problems, the token."""

from __future__ import annotations

from typing import Any

from softlabels.wire import MEDIA_TYPE
from softlabels_server.problems import MEDIA_TYPE as PROBLEM_TYPE

BATCH_PATH = "/v1/stores/{name}/batch"

_PROBLEM_CONTENT = {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}

PROBLEMS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request cannot be met; `code` says why", "content": _PROBLEM_CONTENT},
    "5XX": {"description": "The server or the store is damaged", "content": _PROBLEM_CONTENT},
}
"""Replies that any route may give."""

NOT_FOUND: dict[str, Any] = {"description": "No store of that name (`unknown-store`)", "content": _PROBLEM_CONTENT}

_PROBLEM_SCHEMA = {
    "title": "Problem",
    "description": "Problem details, RFC 9457. Match on `code`: codes are never changed, only added.",
    "type": "object",
    "required": ["type", "title", "status", "detail", "code", "context"],
    "properties": {
        "type": {"type": "string", "examples": ["urn:softlabels:error:unknown-id"]},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "what is wrong, why it matters, what to do"},
        "code": {"type": "string", "examples": ["unknown-id"]},
        "context": {"type": "object", "description": "facts for programs: ids, temperatures, digests"},
    },
}

_FIELDS = {
    "description": "What to return beside the ids: `targets` stands for every array of the store's encoding, the "
    "others for the array of that name. Left out: targets, and labels where the store keeps them.",
    "type": "array",
    "items": {"type": "string", "examples": ["targets", "labels", "fingerprints"]},
}
_TEMPERATURE = {
    "description": "What the reply is to be tempered for, above 0; the store's default when left out. Encoded rows "
    "travel unchanged: this is checked against the store and comes back in the metadata.",
    "type": "number",
    "exclusiveMinimum": 0,
}
_TRANSFER_SET = {
    "description": "Fingerprint of the client's own transfer set: the reply is 409 `fingerprint-mismatch` where the "
    "targets were computed for another.",
    "type": "string",
}
_DIGEST = {
    "description": "Version of the store that the client holds: the reply is 412 `store-changed` where it is another "
    "now.",
    "type": "string",
}

_BATCH_SCHEMA = {
    "title": "BatchRequest",
    "type": "object",
    "additionalProperties": False,
    "required": ["ids"],
    "properties": {
        "ids": {
            "description": "Sample ids, all integers or all strings as the store has them; they may repeat.",
            "type": "array",
            "minItems": 1,
            "items": {"anyOf": [{"type": "integer", "format": "int64"}, {"type": "string"}]},
        },
        "fields": {"anyOf": [_FIELDS, {"type": "null"}]},
        "temperature": {"anyOf": [_TEMPERATURE, {"type": "null"}]},
        "transfer_set": {"anyOf": [_TRANSFER_SET, {"type": "null"}]},
        "digest": {"anyOf": [_DIGEST, {"type": "null"}]},
    },
}

_EXAMPLES = {
    "rows": {"summary": "Three rows, one of them twice", "value": {"ids": [7, 0, 7]}},
    "everything": {
        "summary": "Chosen fields at a chosen temperature",
        "value": {"ids": [7, 0], "fields": ["targets", "labels", "fingerprints"], "temperature": 4.0},
    },
    "string ids": {"summary": "A store whose ids are strings", "value": {"ids": ["n01440764/10026.JPEG"]}},
}


def _query(name: str, schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    text = f"With binary ids only. {schema['description']}"
    plain = {key: value for key, value in schema.items() if key != "description"}
    return {"name": name, "in": "query", "required": False, "description": text, "schema": plain, **more}


_BATCH_OPERATION = {
    "tags": ["stores"],
    "summary": "Rows by sample id, as one safetensors file",
    "description": "Rows come in the order asked. The ids of the rows, as the store keeps them, come with every reply.",
    "operationId": "batch",
    "parameters": [
        {"name": "name", "in": "path", "required": True, "description": "of the store", "schema": {"type": "string"}},
        {
            "name": "If-Match",
            "in": "header",
            "required": False,
            "description": "ETag of the version that the client holds, as `digest`.",
            "schema": {"type": "string"},
        },
        _query("fields", _FIELDS, style="form", explode=False),
        _query("temperature", _TEMPERATURE),
        _query("transfer_set", _TRANSFER_SET),
        _query("digest", _DIGEST),
    ],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/BatchRequest"}, "examples": _EXAMPLES},
            "application/octet-stream": {
                "schema": {
                    "type": "string",
                    "format": "binary",
                    "description": "int64 ids, little-endian, 8 bytes each",
                }
            },
        },
    },
    "responses": {
        "200": {
            "description": "A safetensors file: the encoding's arrays, what else was asked for, and `ids`. Metadata, "
            "all strings: format, store, digest, encoding (JSON), classes, temperature, captured_temperature, locked, "
            "rows.",
            "headers": {
                "Softlabels-Digest": {"description": "version of the store", "schema": {"type": "string"}},
                "Content-Length": {"description": "exact", "schema": {"type": "integer"}},
            },
            "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        },
        "404": {"description": "`unknown-store` or `unknown-id`", "content": _PROBLEM_CONTENT},
        "408": {"description": "The body came too slowly", "content": _PROBLEM_CONTENT},
        "409": {
            "description": "`temperature-locked`, `fingerprint-mismatch` or `rows-not-committed`",
            "content": _PROBLEM_CONTENT,
        },
        "412": {"description": "`store-changed`", "content": _PROBLEM_CONTENT},
        "413": {"description": "`batch-too-large`", "content": _PROBLEM_CONTENT},
        "415": {"description": "The body is neither JSON nor binary ids", "content": _PROBLEM_CONTENT},
        "422": {
            "description": "`bad-request`, `empty-batch`, `bad-ids`, `bad-temperature` or `unknown-field`",
            "content": _PROBLEM_CONTENT,
        },
        **PROBLEMS,
    },
}


def complete(document: dict[str, Any], *, with_token: bool) -> dict[str, Any]:
    """The document with the batch route, the problem details and, where one is asked for, the token.

    Args:
        document: as FastAPI makes it of its own routes.
        with_token: whether the server asks for a bearer token.
    """
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas |= {"Problem": _PROBLEM_SCHEMA, "BatchRequest": _BATCH_SCHEMA}
    document["paths"][BATCH_PATH] = {"post": _BATCH_OPERATION}
    if with_token:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
        document["paths"]["/health"]["get"]["security"] = []
    return document
