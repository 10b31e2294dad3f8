"""Heads of requests: which may be answered from a plan, which are refused as ambiguous, and whether one has the token.

A request that two programs can read in two ways lets one of them be led past the checks of the other. So the fast path
keeps plans only for heads that have a single reading, and the application refuses requests whose headers contradict
each other (RFC 9112, sections 2.2 and 6.3; RFC 9110, section 5.3).
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

from softlabels.errors import RequestError, SoftLabelsError, UnauthorizedError

Headers: TypeAlias = Sequence[tuple[bytes, bytes]]
"""Names in lower case, and values, as in an ASGI scope."""

_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_NOT_IN_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")

_ONCE = (b"host", b"content-type", b"content-length")
"""Headers that a head with a plan has exactly once."""

_NEVER = frozenset({b"transfer-encoding", b"content-encoding", b"expect", b"upgrade", b"trailer", b"te"})
"""Headers that such a head has not: they change how the body is read, or what becomes of the connection."""

_AT_MOST_ONCE = frozenset(
    {*_ONCE, b"authorization", b"transfer-encoding", b"content-encoding", b"expect", b"accept", b"if-match"}
)
"""Headers that a request may have one of: of two the server reads one, and another program perhaps the other."""


def is_unambiguous(head: bytes, scope: Any, *, body_bytes: int) -> bool:
    """Return whether a head has one reading: that in the scope, a POST whose body has exactly this length.

    Args:
        head: from the first byte of the request to the empty line.
        scope: ASGI scope that uvicorn's parser made of it.
        body_bytes: length that the plan for this head takes its body to have.
    """
    # Read a second time, and more strictly than uvicorn's parser does: a key that is equal to these bytes then has the
    # same meaning wherever it comes, and nothing before, between or after the lines that the parser passed over.
    request_line, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    query = scope["query_string"]
    target = scope["raw_path"] + (b"?" + query if query else b"")
    if request_line != b"POST %b HTTP/1.1" % target or not re.fullmatch(rb"/[\x21-\x7e]*", target):
        return False
    found = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not _NAME.fullmatch(name) or _NOT_IN_VALUE.search(value):
            return False
        found.append((name.lower(), value.strip(b" \t")))
    names = [name for name, _ in found]
    return (
        found == list(scope["headers"])
        and all(names.count(name) == 1 for name in _ONCE)
        and names.count(b"authorization") <= 1
        and not _NEVER & set(names)
        and dict(found)[b"content-length"] == b"%d" % body_bytes
        and dict(found).get(b"connection", b"keep-alive").lower() == b"keep-alive"
    )


def credentials_in(head: bytes) -> slice:
    """Return where in an unambiguous head the value of its Authorization header is; an empty slice without one."""
    found = re.search(rb"\r\n[Aa][Uu][Tt][Hh][Oo][Rr][Ii][Zz][Aa][Tt][Ii][Oo][Nn]:([^\r]*)", head)
    return slice(0, 0) if found is None else slice(*found.span(1))


def has_token(value: bytes, token: bytes) -> bool:
    """Return whether the value of an Authorization header is this bearer token (RFC 6750)."""
    scheme, _, found = value.strip(b" \t").partition(b" ")
    # In constant time, so that the duration of a refusal reveals nothing about the secret.
    return scheme.lower() == b"bearer" and hmac.compare_digest(found.strip(), token)


def refusal_of(headers: Headers, token: bytes | None) -> SoftLabelsError | None:
    """Return why a request is refused before anything else of it is read; None where it is not.

    Args:
        headers: of the request.
        token: the server's bearer token; None where this request needs none.
    """
    names = [name for name, _ in headers]
    for name in _AT_MOST_ONCE.intersection(names):
        if names.count(name) > 1:
            return RequestError(
                f"the request has {names.count(name)} {name.decode('latin-1')} headers, and a proxy may read another "
                "one than this server: send one"
            )
    found = dict(headers)
    if found.get(b"transfer-encoding", b"chunked").lower() != b"chunked":
        return RequestError("the request's Transfer-Encoding is not `chunked`, the only one that is understood")
    if found.get(b"content-encoding", b"identity").lower() != b"identity":
        return RequestError("the request's body has a Content-Encoding, and none is understood: send it as it is")
    if token is None or has_token(found.get(b"authorization", b""), token):
        return None
    return UnauthorizedError(
        "this server requires a bearer token, and the request has none or a wrong one: pass it to "
        "softlabels.open(..., token=...), or send the header `Authorization: Bearer TOKEN`"
    )
