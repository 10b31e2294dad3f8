"""Failed requests: when and how soon they are retried, the deadline, and which error class they become."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softlabels.errors import (
    ChecksumError,
    RequestError,
    ServerUnreachableError,
    SoftLabelsError,
    TruncatedError,
    UnauthorizedError,
)
from softlabels.wire import from_problem

RETRIED_STATUSES = frozenset({429, 502, 503, 504})
"""Statuses of a server or proxy that is busy, starting or stopping: the same request may succeed in a moment."""

PROBLEM_TYPE = "application/problem+json"
"""Media type of problem details, RFC 9457."""


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often and how soon a failed request is sent again, within the request's deadline.

    Attributes:
        attempts: most attempts at a server that has answered before: it is probably restarting. The defaults allow it
            up to 11 s.
        attempts_at_first: most attempts at a server that never answered: its address is probably wrong, and the user
            is waiting.
        first_pause_s: pause before the second attempt, seconds; doubles each time, up to `longest_pause_s`.
    """

    attempts: int = 8
    attempts_at_first: int = 3
    first_pause_s: float = 0.1
    longest_pause_s: float = 5.0

    def pause_s(self, failures: int, *, asked_s: float | None = None) -> float:
        """Return the pause after the `failures`-th failure in a row, seconds; at least `asked_s`.

        Half of the pause is random, so that clients that failed together do not retry together.
        """
        longest = min(self.first_pause_s * 2.0 ** (failures - 1), self.longest_pause_s)
        return max(longest * random.uniform(0.5, 1.0), asked_s or 0.0)


class SumMismatchError(Exception):
    """A reply does not have the checksum of its bytes and of the question: it is asked for again, once."""


def changed_on_the_way(where: str) -> ChecksumError:
    """Return the error for rows that failed their checksum twice, although the server found nothing wrong."""
    return ChecksumError(
        f"rows from {where} were changed on the way, or answer another question: their checksum failed, and again on "
        "a new connection; check the network, and the proxy or cache before the server",
        url=where,
    )


class Deadline:
    """Point in time by which a request must be complete."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._end_s = time.monotonic() + timeout_s

    def left_s(self) -> float:
        """Return the seconds left, more than 0. Raises TimeoutError if none are."""
        left = self._end_s - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no complete reply within {self.timeout_s:g} s")
        return left

    def allows(self, pause_s: float) -> bool:
        """Return whether any time would be left after a pause."""
        return time.monotonic() + pause_s < self._end_s


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the pause that a server asks for (RFC 9110, section 10.2.3), seconds; None if it asks for none."""
    text = headers.get("retry-after", "").strip()
    if not text:
        return None
    # Imported only here: importing urllib3 takes 150 ms, and a server that sends this header makes us wait anyway.
    from urllib3.exceptions import InvalidHeader
    from urllib3.util import Retry

    try:
        return Retry().parse_retry_after(text)
    except (InvalidHeader, ValueError, OverflowError):
        return None


def connection_error(error: OSError | http.client.HTTPException, *, url: str, timeout_s: float) -> SoftLabelsError:
    """Return the error for a request that got no complete reply, from that of the socket, TLS or HTTP library."""
    if isinstance(error, SoftLabelsError):
        # Some of our errors are subclasses of OSError too; their messages already say what is wrong.
        return error
    if isinstance(error, http.client.IncompleteRead):
        return TruncatedError(f"the reply of {url} was cut", url=url)
    if isinstance(error, ssl.SSLCertVerificationError):
        return ServerUnreachableError(
            f"the certificate of {url} is not valid ({error.verify_message}): check the host name, or set "
            "SSL_CERT_FILE to the certificate of the authority that signed it",
            url=url,
        )
    if isinstance(error, TimeoutError):
        return ServerUnreachableError(
            f"{url} gave no complete reply within {timeout_s:g} s: check that the server is not overloaded, or pass a "
            "larger `timeout_s`",
            url=url,
        )
    return ServerUnreachableError(
        f"no complete reply from {url} ({type(error).__name__}: {error}): check that `softlabels serve` runs there, "
        "that host and port are right, and that no firewall blocks the connection",
        url=url,
    )


def status_error(status: int, headers: Mapping[str, str], body: memoryview, *, url: str) -> SoftLabelsError:
    """Return the error for a reply whose status is not 200: the server's own, if it sent problem details."""
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    problem: Any = None
    if media_type == PROBLEM_TYPE:
        with contextlib.suppress(ValueError, RecursionError):
            problem = json.loads(bytes(body))
    if isinstance(problem, dict):
        return from_problem({**problem, "status": status})
    if status in (401, 403):
        return UnauthorizedError(f"{url} refuses access (status {status}): pass a valid `token`", url=url)
    if 300 <= status < 400:
        target = headers.get("location", "elsewhere")
        return RequestError(f"{url} redirects to {target!r}, and redirects are not followed: open that store", url=url)
    return ServerUnreachableError(
        f"{url} replied with status {status} and no reason: check that `softlabels serve` runs there, that the path "
        "prefix of a proxy before it is right, and what the server's log says",
        url=url,
        status=status,
    )
