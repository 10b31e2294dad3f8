"""What a connection may do before its first request is whole: bounds that uvicorn does not set.

Checked on uvicorn 0.54: a connection that sends half a header, or nothing, is held for ever, and with httptools a
header may be of any size. Bodies are bounded in `bodies`, idle connections by uvicorn's own keep-alive timeout.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from softlabels_server.lane import FastLane

MAX_HEADER_BYTES = 64 << 10
"""What h11, uvicorn's other parser, allows: far above any real request's."""


class _BoundedHeader(asyncio.Protocol):
    """Closes a connection whose request header takes too long or too much room. Stands before a uvicorn protocol."""

    header_timeout_s: float
    cycle: Any  # uvicorn's: the request under way or just answered, None before the first
    transport: asyncio.Transport
    _deadline: asyncio.TimerHandle | None = None
    _header_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The client has until the deadline for its first request."""
        super().connection_made(transport)
        self._await_header()

    def data_received(self, data: bytes) -> None:
        """Pass bytes on, then see whether they made a header whole."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self.stop_waiting_for_header()
            return
        self._await_header()
        self._header_bytes += len(data)
        if self._header_bytes > MAX_HEADER_BYTES:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more."""
        self.stop_waiting_for_header()
        super().connection_lost(exc)

    def stop_waiting_for_header(self) -> None:
        """A request is here whole: nothing is overdue."""
        self._header_bytes = 0
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _await_header(self) -> None:
        if self._deadline is None:
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(self.header_timeout_s, self.transport.close)


def bounded_protocol(*, header_timeout_s: float) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, httptools' parser where it is installed, with bounds on a request's header.

    With httptools, requests that were answered before with other ids take the fast lane.
    """
    parses_in_c = hasattr(AutoHTTPProtocol, "on_message_begin")
    bases = (FastLane, _BoundedHeader, AutoHTTPProtocol) if parses_in_c else (_BoundedHeader, AutoHTTPProtocol)
    return type("BoundedProtocol", bases, {"header_timeout_s": header_timeout_s, "recipes": {}})
