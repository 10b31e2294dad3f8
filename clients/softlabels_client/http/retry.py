"""When is a request sent again, and after how long? Exponential backoff with jitter, Retry-After, one deadline."""

from __future__ import annotations

import http.client
import json
import math
import random
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from softlabels.errors import (
    RequestError,
    ServerUnreachableError,
    SoftLabelsError,
    TruncatedError,
    UnauthorizedError,
)
from softlabels.problem_details import from_problem

RETRIED_STATUSES = frozenset({429, 502, 503, 504})
"""A server or proxy that is busy, starting or stopping: the same request may go through in a moment."""


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often and how soon a failed request is sent again; the request's deadline bounds it all.

    Attributes:
        attempts: sends at most, to a server that has answered before: it is probably restarting. The defaults wait up
            to 11 s in all.
        attempts_at_first: sends at most, to a server that never answered: its address is probably wrong, and whoever
            typed it is waiting.
        first_pause_s: before the second send; doubles from one to the next.
        longest_pause_s: bound on the doubling.
    """

    attempts: int = 8
    attempts_at_first: int = 3
    first_pause_s: float = 0.1
    longest_pause_s: float = 5.0

    def pause_s(self, failures: int, *, asked_s: float | None = None) -> float:
        """How long to wait after the `failures`-th failure in a row, `asked_s` at least.

        A random half of the pause keeps clients that failed together from coming back together.
        """
        longest = min(self.first_pause_s * 2.0 ** (failures - 1), self.longest_pause_s)
        return max(longest * random.uniform(0.5, 1.0), asked_s or 0.0)


class Deadline:
    """A point in time that a request must not outlast."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._end_s = time.monotonic() + timeout_s

    def left_s(self) -> float:
        """Seconds that are left, more than 0.

        Raises:
            TimeoutError: none are.
        """
        left = self._end_s - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no whole answer within {self.timeout_s:g} s")
        return left

    def allows(self, pause_s: float) -> bool:
        """Whether anything would be left after a pause."""
        return time.monotonic() + pause_s < self._end_s


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to be left alone for (RFC 9110, section 10.2.3); None if it asks for none."""
    text = headers.get("retry-after", "").strip()
    if not text:
        return None
    try:
        seconds = float(text) if text.isascii() and text.isdigit() else _seconds_until(text)
    except (ValueError, OverflowError):
        return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _seconds_until(date: str) -> float:
    moment = parsedate_to_datetime(date)
    aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return (aware - datetime.now(UTC)).total_seconds()


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
