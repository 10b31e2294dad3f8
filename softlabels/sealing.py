"""How is a document kept so that a changed byte shows? As JSON beside its own digest, read back with suspicion."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from softlabels.errors import ManifestError

MAX_MANIFEST_BYTES = 16 << 20
"""No real manifest or receipt comes near; a hostile one must not fill the memory."""


def document_of(value: Any) -> Any:
    """A dataclass as JSON-able tables, without its fields that are None.

    A field that a later version adds, with None for "as before", leaves the digests of older documents as they are.
    """
    if is_dataclass(value) and not isinstance(value, type):
        found = {entry.name: getattr(value, entry.name) for entry in fields(value)}
        return {name: document_of(part) for name, part in found.items() if part is not None}
    if isinstance(value, Mapping):
        return {key: document_of(part) for key, part in value.items()}
    return [document_of(part) for part in value] if isinstance(value, list | tuple) else value


def canonical_json(document: Any) -> bytes:
    """The one byte string for a JSON document: sorted keys, no spaces, ASCII, NaN refused."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def seal(document: Mapping[str, Any]) -> bytes:
    """A document with its own digest, as it is written to disk: a flipped bit anywhere shows when it is read."""
    digest = hashlib.sha256(canonical_json(document)).hexdigest()
    return json.dumps({"sha256": digest, "body": document}, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def unseal(raw: bytes, *, what: str) -> dict[str, Any]:
    """Read what `seal` wrote.

    Raises:
        ManifestError: not JSON, too large, nested too deeply, a key that stands twice, or its digest fails.
    """
    if len(raw) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"{what} has {len(raw)} bytes, more than the {MAX_MANIFEST_BYTES} that any real one needs")
    try:
        document = json.loads(raw, object_pairs_hook=_each_key_once)
        body = document["body"]
        digest = hashlib.sha256(canonical_json(body)).hexdigest()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ManifestError(f"{what} cannot be read ({error}): restore it or run `softlabels repair`") from error
    if set(document) != {"sha256", "body"} or digest != document["sha256"] or not isinstance(body, dict):
        raise ManifestError(f"{what} fails its own checksum: a byte of it changed after it was written")
    return body


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Readers disagree on which of two values counts: a document that means two things means nothing.
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands twice")
    return table
