"""What can be set about the server: one frozen object, handed in."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from softlabels.errors import RequestError

MOST_WORKERS = 256
"""More than the cores of any machine that this was tried on: a larger number is a slip of the pen."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything about a server that is a choice; docs/http.md says of each what it is for.

    Attributes:
        host: address to listen on; loopback unless told otherwise.
        port: to listen on; 0 takes a free one.
        token: bearer token that requests must carry; None asks for none.
        max_batch_ids: most ids in one batch.
        max_reply_bytes: most bytes of arrays in one reply; they are held in memory until they are sent.
        max_body_bytes: most bytes of a request's body.
        header_timeout_s: how long a client may take to send a request's header.
        body_timeout_s: how long a client may take to send a request's body.
        keep_alive_timeout_s: how long a connection may be idle between requests.
        stall_timeout_s: how long the reader of a stream may take for its next piece; it can go on at its cursor.
        shutdown_timeout_s: how long replies under way may take once the server is told to stop.
        workers: processes that answer; each opens the stores itself.
        access_log: log a line a request.
    Raises:
        RequestError: a value that makes no sense.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = field(default=None, repr=False)
    # A sampler's batch is hundreds of ids, a whole validation set tens of thousands.
    max_batch_ids: int = 65_536
    max_reply_bytes: int = 256 << 20
    # 65,536 string ids of 250 bytes as JSON.
    max_body_bytes: int = 16 << 20
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    # Longer than a training step with its validation, or every batch would pay for a new connection.
    keep_alive_timeout_s: int = 75
    # A trainer may validate for minutes; one that comes back later connects again without losing a row.
    stall_timeout_s: float = 600.0
    shutdown_timeout_s: int = 5
    # On 2 cores a second one adds little, for the clients need theirs too: docs/operations.md has the figures.
    workers: int = 1
    access_log: bool = False

    def __post_init__(self) -> None:
        if not self.host:
            raise RequestError(
                "the host is empty: 127.0.0.1 serves this machine alone, 0.0.0.0 everyone who reaches it"
            )
        if not 0 <= self.port <= 65_535:
            raise RequestError(f"port {self.port} is none: ports run from 1 to 65535, and 0 takes a free one")
        for name in (
            "max_batch_ids",
            "max_reply_bytes",
            "max_body_bytes",
            "header_timeout_s",
            "body_timeout_s",
            "keep_alive_timeout_s",
            "stall_timeout_s",
            "shutdown_timeout_s",
        ):
            if not getattr(self, name) > 0:
                raise RequestError(f"{name} is {getattr(self, name)!r}: it must be above 0, or nothing could be served")
        if not isinstance(self.workers, int) or not 1 <= self.workers <= MOST_WORKERS:
            raise RequestError(
                f"workers is {self.workers!r}: it is a whole number from 1 to {MOST_WORKERS}; more than there are "
                "cores help nobody"
            )
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.token.strip()):
            raise RequestError("the token must be printable ASCII and not empty: it travels in a header")

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
