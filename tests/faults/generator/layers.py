"""The table of faults: what may be damaged, what may be done to it, and which pairs make no sense, with the reason."""

from __future__ import annotations

import re

DISK_PATTERNS = {
    "manifest": r"manifest\.json",
    "plan": r"plan\.json",
    "job": r"job\.json",
    "file list": r"transfer_set\.tsv\.gz",
    "receipt": r"ledger/\d{8}\.json",
    "receipt digests": r"index/receipts\.npy",
    "row sums": r"sums/\d{8}\.u4",
    "id index": r"index/(sorted_ids|positions)\.npy",
    "sequence offsets": r"index/offsets\.npy",
    "sequence fingerprints": r"index/fingerprints\.npy",
    "encoding constants": r"encoding/\w+\.npy",
    "zarr metadata": r"(\w+/)?zarr\.json",
    "hdf5 virtual datasets": r"store\.h5",
    "hdf5 shard": r"shards/\d{8}\.h5",
    "zarr labels": r"labels/c/.*",
    "zarr ids": r"ids/c/.*",
    "zarr fingerprints": r"fingerprints/c/.*",
    "zarr inputs": r"inputs/c/.*",
    "zarr view parameters": r"view_parameters/c/.*",
    "zarr targets": r"\w+/c/.*",
}
"""Layers of a store on disk, by the paths of their files; the first pattern that fits counts."""

JOB_LAYERS = {
    "transfer set file": "inputs.npy",
    "teacher weights": "weights.safetensors",
    "teacher file": "net.bin",
}
"""Files beside a store that a continued job reads again."""

RESUMED_LAYERS = ("job", "file list", "plan", "receipt", "zarr targets", "zarr fingerprints", "hdf5 shard", "row sums")
"""Layers of the store that a real job is continued on."""

CACHE_PATTERNS = {
    "cached rows": r"rows-v\d+/[0-9a-f]{64}/rows",
    "cache index": r"rows-v\d+/[0-9a-f]{64}/index",
    "cached ids": r"rows-v\d+/[0-9a-f]{64}/ids",
    "cache description": r"rows-v\d+/[0-9a-f]{64}/table\.json",
}

CHECKPOINT = "checkpoint"

LOCKS = re.compile(r"rows-v\d+/(lock|[0-9a-f]{64}/(in-use|writing))")
"""Files of a cache that hold a lock and no bytes."""

REPLIES = (
    "reply: description",
    "reply: constants",
    "reply: batch",
    "reply: epoch",
)
REQUESTS = (
    "request: description",
    "request: constants",
    "request: batch",
    "request: epoch",
)
ROUTES_WITHOUT_ROWS = {
    "/health": "state of the server, for load balancers; no client of ours reads it",
    "/v1/stores": "a list for people and scripts; a store is opened by its own description, which is checked",
    "/openapi.json": "documentation",
}
"""Routes whose replies nothing rests on, with the reason; every other route is a layer."""

HTTP_LAYERS = (*REPLIES, *REQUESTS)

LAYERS = (*DISK_PATTERNS, *JOB_LAYERS, *CACHE_PATTERNS, CHECKPOINT, *HTTP_LAYERS)

BYTE_OPERATIONS = (
    "flip one bit",
    "flip several bits",
    "exchange words",
    "exchange blocks",
    "exchange rows",
    "zero",
    "truncate",
    "extend",
)
"""What may happen to the bytes of one file, request or reply."""

OPERATIONS = (
    *BYTE_OPERATIONS,
    "exchange files",
    "exchange replies",
    "replay an older version",
    "replace by another run's",
    "change after the first read",
    "change under an open handle",
)

LATE = ("change after the first read", "change under an open handle")


def not_applicable(layer: str, operation: str) -> str | None:
    """Return why a pair cannot occur; None where it can, and must be tried."""
    http = layer in HTTP_LAYERS
    if operation == "exchange replies" and not layer.startswith("reply"):
        return "only replies are exchanged between requests"
    if operation == "exchange files" and http:
        return "what travels is no file; `exchange replies` is its counterpart"
    if layer.startswith("request") and operation in ("replay an older version", "replace by another run's"):
        return "the reply to another question is covered under the layer of its reply"
    return None


def layer_of(path: str) -> str | None:
    """Return the layer of a file of a store or a cache; None for one that is in no layer."""
    for name, pattern in {**DISK_PATTERNS, **CACHE_PATTERNS}.items():
        if re.fullmatch(pattern, path):
            return name
    return None


def pairs() -> list[tuple[str, str]]:
    """Return every pair of layer and operation that must be tried."""
    return [(layer, op) for layer in LAYERS for op in OPERATIONS if not_applicable(layer, op) is None]


DAMAGE = frozenset({"checksum-mismatch", "truncated", "bad-manifest", "damage"})
CHANGED = frozenset({"store-changed"})
DOCUMENT = frozenset({"bad-manifest", "checksum-mismatch", "truncated"})

RIGHT_CODES: dict[str, frozenset[str]] = {
    # A store without a readable manifest is one that is not there, or, by its plan, one that is not finished.
    "manifest": DOCUMENT | {"unknown-store", "rows-not-committed", "format-version"},
    "plan": DOCUMENT | {"unknown-store", "format-version"},
    "job": DOCUMENT,
    "file list": DOCUMENT | {"transfer-set-changed"},
    "cached rows": frozenset(),
    "cache index": frozenset(),
    "cached ids": frozenset(),
    "cache description": frozenset(),
    CHECKPOINT: frozenset({"bad-manifest", "checksum-mismatch", "format-version", "checkpoint-mismatch"}),
}
"""Codes that a refusal may have, by layer; other layers of the disk: `DAMAGE`. A cache refuses nothing."""

WRITER_CODES = frozenset({"shard-conflict", "conflict", "store-exists", "rows-not-committed", "unknown-store"})
"""Codes with which commands that write refuse to mix what does not belong together."""

JOB_CODES = WRITER_CODES | {
    *("transfer-set-changed", "fingerprint-mismatch", "teacher-changed", "bad-job", "data-unavailable"),
    *("unreadable-sample", "non-finite-logits", "teacher-shape", "bad-teacher", "encoding-range", "shape-mismatch"),
    *("bad-ids", "bad-reference", "store-changed", "rows-not-committed"),
}
"""What a continued job says of data, teachers or a store that are not what it began with."""

WIRE_CODES = frozenset(
    {"bad-reply", "checksum-mismatch", "truncated", "bad-manifest", "store-changed", "unreachable", "format-version"}
)
ASKING_CODES = frozenset(
    {
        *("bad-request", "unknown-id", "unknown-store", "not-found", "unknown-field", "bad-ids", "empty-batch"),
        *("batch-too-large", "bad-temperature", "temperature-locked", "fingerprint-mismatch", "unauthorized"),
    }
)
"""What a server says to a request that was changed on the way."""


ROW_LAYERS = frozenset(layer for layer in DISK_PATTERNS if layer.startswith(("zarr ", "hdf5 shard"))) - {
    "zarr metadata"
}
OTHER_BYTES = ("flip one bit", "flip several bits", "exchange words", "exchange blocks", "exchange rows", "zero")
"""Operations that leave a file its length: only a checksum tells."""


def right_codes(layer: str, operation: str, observer: str) -> frozenset[str]:
    """Return the codes that a refusal may have: those that name the layer, and `store-changed` for late changes."""
    if layer in HTTP_LAYERS:
        return WIRE_CODES | ASKING_CODES | {"error"}
    if layer in JOB_LAYERS or observer == "resume job":
        return DAMAGE | JOB_CODES
    codes = RIGHT_CODES.get(layer, DAMAGE)
    if operation in OTHER_BYTES and layer in ROW_LAYERS and observer in ("reader", "server", "client", "cache"):
        return frozenset({"checksum-mismatch"})
    if operation in LATE:
        codes |= CHANGED | DAMAGE
    if operation in ("replay an older version", "replace by another run's") and layer not in CACHE_PATTERNS:
        codes |= DAMAGE | CHANGED
    if observer in ("merge", "convert", "resume", "repair"):
        codes |= WRITER_CODES | DAMAGE
    return codes
