"""Typed JSON documents: strict parsing with msgspec, canonical bytes, and files that carry their own SHA-256.

Every document that crosses a boundary (manifest, receipt, job file, request, checkpoint, cache index) is a `Document`:
declared once, parsed by `parse_document`, never validated by hand. docs/adr/0015-msgspec.md says why msgspec.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Annotated, Any, TypeAlias, TypeVar

import msgspec

from softlabels.errors import ManifestError, SoftLabelsError

MAX_DOCUMENT_BYTES = 16 << 20
"""Far more than any real manifest or receipt has: a hostile one must not fill the memory."""

MAX_MESSAGE = 1_000
"""Characters of a library's message that are passed on."""

Number: TypeAlias = int | float
"""A JSON number as it was written: `float` would turn 4 into 4.0, whose canonical bytes and digest are others."""

Sha256: TypeAlias = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$", max_length=64)]
"""64 hex digits; the length is bounded as well because `$` also matches before a line feed at the end."""

D = TypeVar("D")


class Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every typed document. Unknown keys are refused; a key that is None is the same as a missing one."""


def parse_document(value: Any, kind: type[D], *, what: str, error: type[SoftLabelsError] = ManifestError) -> D:
    """Return `value`, JSON-like tables and lists, as an instance of `kind`.

    Args:
        value: what `json.loads`, `tomllib.loads` or `open_sealed` returned.
        kind: a `Document`, or any type that msgspec knows.
        what: name of the document for messages, for example "manifest" or "job.toml".
        error: class to raise.
    Raises:
        error: a key is unknown, missing, of the wrong type or out of bounds; the message names its path. A ValueError
            or TypeError raised by a document's `__post_init__` is reported the same way.
    """
    try:
        return msgspec.convert(value, kind, strict=True)
    except (msgspec.ValidationError, OverflowError, RecursionError, UnicodeEncodeError) as problem:
        # Cut: msgspec quotes an unknown key whole, and a hostile one may have megabytes.
        raise error(f"{what}: {_explain(str(problem)[:MAX_MESSAGE], kind)}") from problem


def as_json(value: Any) -> Any:
    """Return a document as JSON-like tables, without its fields that are None.

    So a later version can add a field, with None for the old behaviour, and older documents keep their digests.
    """
    if isinstance(value, msgspec.Struct) or (is_dataclass(value) and not isinstance(value, type)):
        names = (
            value.__struct_fields__ if isinstance(value, msgspec.Struct) else [entry.name for entry in fields(value)]
        )
        found = {name: getattr(value, name) for name in names}
        return {name: as_json(part) for name, part in found.items() if part is not None}
    if isinstance(value, Mapping):
        return {key: as_json(part) for key, part in value.items()}
    return [as_json(part) for part in value] if isinstance(value, list | tuple) else value


def canonical_json(document: Any) -> bytes:
    """Return the one byte string for a JSON document: sorted keys, no spaces, ASCII, NaN refused."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def seal(document: Mapping[str, Any]) -> bytes:
    """Return the bytes of a file that holds a document beside its own SHA-256, so that any flipped bit shows."""
    digest = hashlib.sha256(canonical_json(document)).hexdigest()
    return json.dumps({"sha256": digest, "body": document}, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def open_sealed(raw: bytes, *, what: str) -> dict[str, Any]:
    """Return the document that `seal` wrote.

    Raises:
        ManifestError: not JSON, too large, nested too deeply, a repeated key, or the digest differs.
    """
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise ManifestError(f"{what} has {len(raw)} bytes, more than the {MAX_DOCUMENT_BYTES} that any real one needs")
    try:
        document = json.loads(raw, object_pairs_hook=_without_repeated_keys)
        body = document["body"]
        digest = hashlib.sha256(canonical_json(body)).hexdigest()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ManifestError(f"{what} cannot be read ({error}): restore it or run `softlabels repair`") from error
    if set(document) != {"sha256", "body"} or digest != document["sha256"] or not isinstance(body, dict):
        raise ManifestError(f"{what} fails its own checksum: a byte of it changed after it was written")
    return body


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Parsers disagree on which of two equal keys wins, so such a document is ambiguous.
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key is repeated")
    return table


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Return the end of an error message that names the nearest known word, or an empty string if none is near."""
    near = get_close_matches(str(word).lower(), list(known), n=1)
    return f"; did you mean `{near[0]}`?" if near else ""


def _explain(message: str, kind: Any) -> str:
    """Return msgspec's message with the path in words, and what it lacks: the nearest known key, or the choices."""
    info, path = msgspec.inspect.type_info(kind), re.search(r" - at `\$(.*?)`$", message)
    message = re.sub(r" - at `\$\.?(.*?)`$", r" (at `\1`)", message).removesuffix(" (at ``)")
    unknown = re.match(r"Object contains unknown field `(.*?)`", message)
    if unknown:
        message += did_you_mean(unknown[1], set(_keys_of(info, set())))
    if message.startswith("Invalid enum value"):
        choices = _choices_at(info, path[1] if path else "")
        message += f"; it must be one of {', '.join(map(repr, choices))}" if choices else ""
    return message[0].lower() + message[1:]


def _choices_at(info: Any, path: str) -> list[Any]:
    """Return the values that a field accepts by name; `path` is msgspec's, such as `.teachers[0].mean`."""
    found = [info]
    for name in re.findall(r"\.(\w+)|\[", path):
        outer = [part for info in found for part in _parts_of(info)]
        if name:
            found = [entry.type for part in outer for entry in getattr(part, "fields", ()) if entry.encode_name == name]
        else:
            found = [getattr(part, "item_type", getattr(part, "value_type", None)) for part in outer]
    return [value for outer in found for part in _parts_of(outer) for value in getattr(part, "values", ())]


def _parts_of(info: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    return getattr(info, "types", (info,))


def _keys_of(info: Any, seen: set[int]) -> Iterator[str]:
    """Yield the keys of every table below a type."""
    if id(info) in seen:
        return
    seen.add(id(info))
    for entry in getattr(info, "fields", ()):
        yield entry.encode_name
        yield from _keys_of(entry.type, seen)
    for name in ("item_type", "value_type", "types"):
        inner = getattr(info, name, ())
        for part in inner if isinstance(inner, tuple) else (inner,):
            yield from _keys_of(part, seen)
