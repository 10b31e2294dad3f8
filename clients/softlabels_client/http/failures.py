"""What does a failed exchange mean to whoever asked? From sockets and statuses to the product's own errors."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Mapping
from typing import Any

from softlabels.errors import (
    RequestError,
    ServerUnreachableError,
    SoftLabelsError,
    TruncatedError,
    UnauthorizedError,
)
from softlabels.problems import from_problem

PROBLEM_TYPE = "application/problem+json"
"""RFC 9457."""


def explain(error: OSError | http.client.HTTPException, *, where: str, timeout_s: float) -> SoftLabelsError:
    """The error for an exchange that broke before its answer was here whole.

    Args:
        error: what broke it.
        where: the URL that was asked.
        timeout_s: what the request was given.
    """
    if isinstance(error, SoftLabelsError):
        return error
    if isinstance(error, http.client.IncompleteRead):
        return TruncatedError(f"the answer of {where} was cut", url=where)
    if isinstance(error, ssl.SSLCertVerificationError):
        return ServerUnreachableError(
            f"the certificate of {where} does not hold ({error.verify_message}): check the host's name, or let "
            "SSL_CERT_FILE name the certificate of the authority that signed it",
            url=where,
        )
    if isinstance(error, TimeoutError):
        return ServerUnreachableError(
            f"{where} gave no whole answer within {timeout_s:g} s: check that the server is not overloaded, or pass a "
            "larger `timeout_s`",
            url=where,
        )
    return ServerUnreachableError(
        f"no whole answer from {where} ({type(error).__name__}: {error}): check that `softlabels serve` runs there, "
        "that host and port are right, and that no firewall stands between",
        url=where,
    )


def mends_itself(error: BaseException) -> bool:
    """Whether the same exchange may go through in a moment; a certificate will be the same then."""
    return not isinstance(error, ssl.SSLCertVerificationError)


def refusal(status: int, headers: Mapping[str, str], body: memoryview, *, where: str) -> SoftLabelsError:
    """The error for an answer whose status is not 200: the server's own, where it sent problem details.

    Args:
        status: of the answer.
        headers: of the answer, by lower-case name.
        body: of the answer.
        where: the URL that was asked.
    """
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    problem = _json_object(body) if media_type == PROBLEM_TYPE else None
    if problem is not None:
        return from_problem({**problem, "status": status})
    if status in (401, 403):
        return UnauthorizedError(f"{where} does not let us in (status {status}): pass a valid `token`", url=where)
    if 300 <= status < 400:
        target = headers.get("location", "elsewhere")
        return RequestError(f"{where} sends requests on to {target!r}: open the store there", url=where)
    return ServerUnreachableError(
        f"{where} answered with status {status} and no reason: check that this is the address of a `softlabels serve`, "
        "with the path of the proxy if one stands before it, and look into the server's log",
        url=where,
        status=status,
    )


def _json_object(body: memoryview) -> dict[str, Any] | None:
    try:
        document = json.loads(bytes(body))
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None
