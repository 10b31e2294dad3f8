"""What the OpenAPI document says beyond what FastAPI finds out by itself: the batch route, problems, the token."""

from __future__ import annotations

from typing import Any

from softlabels.wire import MEDIA_TYPE
from softlabels_server.problems import MEDIA_TYPE as PROBLEM_TYPE

BATCH_PATH = "/v1/stores/{name}/batch"
EPOCH_PATH = "/v1/stores/{name}/epochs/{epoch}"
CONSTANTS_PATH = "/v1/stores/{name}/constants"

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

_DECODE = {
    "description": "Have the server decode the targets at that temperature, to float32: `logits` whose softmax is the "
    "target, or its probabilities `p`. Left out: rows as they are kept, for the student's device to decode.",
    "type": "string",
    "enum": ["logits", "p"],
}
_VIEWS = {
    "description": "Which view of each sample, one for each id, where the store keeps views.",
    "type": "array",
    "items": {"type": "integer", "format": "int64"},
}
_SPANS = {
    "description": "First row and the one after the last of each sample, for sequences; left out for whole ones.",
    "type": "array",
    "items": {"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "integer", "format": "int64"}},
}
_COLUMNS = {
    "description": "What the body holds, int64 columns one after the other: `ids`, then `views` or `spans`, two "
    "numbers a sample. Left out: ids alone.",
    "type": "array",
    "items": {"type": "string", "enum": ["ids", "views", "spans"]},
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
        "views": {"anyOf": [_VIEWS, {"type": "null"}]},
        "spans": {"anyOf": [_SPANS, {"type": "null"}]},
        "fields": {"anyOf": [_FIELDS, {"type": "null"}]},
        "temperature": {"anyOf": [_TEMPERATURE, {"type": "null"}]},
        "transfer_set": {"anyOf": [_TRANSFER_SET, {"type": "null"}]},
        "digest": {"anyOf": [_DIGEST, {"type": "null"}]},
        "decode": {"anyOf": [_DECODE, {"type": "null"}]},
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


def _query(name: str, schema: dict[str, Any], *, required: bool = False, **more: Any) -> dict[str, Any]:
    plain = {key: value for key, value in schema.items() if key != "description"}
    return {
        "name": name,
        "in": "query",
        "required": required,
        "description": schema["description"],
        "schema": plain,
        **more,
    }


def _with_binary_ids(name: str, schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return _query(name, {**schema, "description": f"With binary ids only. {schema['description']}"}, **more)


_NAME = {"name": "name", "in": "path", "required": True, "description": "of the store", "schema": {"type": "string"}}
_IF_MATCH = {
    "name": "If-Match",
    "in": "header",
    "required": False,
    "description": "ETag of the version that the client holds, as `digest`.",
    "schema": {"type": "string"},
}
_FILE = {"schema": {"type": "string", "format": "binary"}}

_BATCH_OPERATION: dict[str, Any] = {
    "tags": ["stores"],
    "summary": "Rows by sample id, as one safetensors file",
    "description": "Rows come in the order asked. The ids of the rows, as the store keeps them, come with every reply.",
    "operationId": "batch",
    "parameters": [
        _NAME,
        _IF_MATCH,
        _with_binary_ids("columns", _COLUMNS, style="form", explode=False),
        _with_binary_ids("fields", _FIELDS, style="form", explode=False),
        _with_binary_ids("temperature", _TEMPERATURE),
        _with_binary_ids("transfer_set", _TRANSFER_SET),
        _with_binary_ids("digest", _DIGEST),
        _with_binary_ids("decode", _DECODE),
    ],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/BatchRequest"}, "examples": _EXAMPLES},
            "application/octet-stream": {
                "schema": {
                    "type": "string",
                    "format": "binary",
                    "description": "int64 ids, little-endian, 8 bytes each, and the other `columns`",
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
            "content": {
                MEDIA_TYPE: _FILE,
                "application/vnd.apache.arrow.stream": _FILE,
                "application/x-npy": _FILE,
                "application/json": {"schema": {"type": "object"}},
            },
        },
        "404": {"description": "`unknown-store` or `unknown-id`", "content": _PROBLEM_CONTENT},
        "406": {"description": "None of the forms that there are is acceptable", "content": _PROBLEM_CONTENT},
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


def _number(description: str, **more: Any) -> dict[str, Any]:
    return {"description": description, "type": "integer", "minimum": 0, **more}


_EPOCH_OPERATION: dict[str, Any] = {
    "tags": ["stores"],
    "summary": "One rank's batches of an epoch, as one stream",
    "description": "Safetensors files end to end, one a batch, and at the end one without arrays that says how many "
    "there were. The order follows from the store's digest, the seed and the epoch's number.",
    "operationId": "epoch",
    "parameters": [
        _NAME,
        {"name": "epoch", "in": "path", "required": True, "description": "its number", "schema": {"type": "integer"}},
        _IF_MATCH,
        _query("seed", _number("Of the training run."), required=True),
        _query("batch_size", _number("Samples in a batch.", minimum=1), required=True),
        _query("rank", _number("Which of the ranks asks; 0 when left out.")),
        _query("world_size", _number("How many ranks share the epoch; 1 when left out.", minimum=1)),
        _query("cursor", _number("How many samples all ranks together have taken; the stream goes on there.")),
        _query("shuffle", {"description": "`false` for the store's own order.", "type": "boolean"}),
        _query("block", _number("Shuffle blocks of so many consecutive samples.", minimum=1)),
        _query(
            "remainder",
            {
                "description": "What becomes of the samples that fill no last step; `split` when left out.",
                "type": "string",
                "enum": ["split", "drop", "pad"],
            },
        ),
        _query("view", _number("Of every sample, where the store keeps views; the epoch's number modulo theirs.")),
        _query("fields", _FIELDS, style="form", explode=False),
        _query("temperature", _TEMPERATURE),
        _query("transfer_set", _TRANSFER_SET),
        _query("digest", _DIGEST),
    ],
    "responses": {
        "200": {
            "description": "The stream. Metadata of a frame: those of a batch reply, `cursor` and `repeated`.",
            "headers": _BATCH_OPERATION["responses"]["200"]["headers"],
            "content": {MEDIA_TYPE: _FILE},
        },
        **{status: _BATCH_OPERATION["responses"][status] for status in ("404", "406", "409", "412", "413", "422")},
        **PROBLEMS,
    },
}

_CONSTANTS_OPERATION: dict[str, Any] = {
    "tags": ["stores"],
    "summary": "What the encoding learnt for this store",
    "description": "A safetensors file of the arrays that decoding takes; of most encodings one without arrays.",
    "operationId": "constants",
    "parameters": [
        _NAME,
        {
            "name": "If-None-Match",
            "in": "header",
            "required": False,
            "description": "ETag of the copy that the client holds",
            "schema": {"type": "string"},
        },
    ],
    "responses": {
        "200": {"description": "The arrays; `ETag` is the store's digest", "content": {MEDIA_TYPE: _FILE}},
        "304": {"description": "The client's copy is of this version"},
        "404": NOT_FOUND,
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
    document["paths"] |= {
        BATCH_PATH: {"post": _BATCH_OPERATION},
        EPOCH_PATH: {"get": _EPOCH_OPERATION},
        CONSTANTS_PATH: {"get": _CONSTANTS_OPERATION},
    }
    if with_token:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
        document["paths"]["/health"]["get"]["security"] = []
    return document
