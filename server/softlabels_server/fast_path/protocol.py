"""HTTP protocol: uvicorn's, with limits on request headers and a fast path for repeated batch requests.

A request whose head equals, byte for byte, one with a response plan is answered here, straight to the socket, without
a task or the ASGI application. Every other request, and any that a plan cannot answer, goes to the application; so does
the first request with a given head, in which everything is checked. Token and version of the store are checked each
time.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from numpy.typing import NDArray
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from softlabels_server.fast_path.request_head import credentials_in, has_token, is_unambiguous
from softlabels_server.fast_path.response_plan import MAX_HEAD_BYTES, MAX_RESPONSE_PLANS, PLANS_EXTENSION, ResponsePlan
from softlabels_server.fast_path.socket_writer import SOCKET_EXTENSION, SocketAccess, as_view

MAX_HEADER_BYTES = 64 << 10
"""The limit of h11, uvicorn's other parser; real request headers are far smaller."""


_NO_PLAN = (None, slice(0, 0))


class FastPathProtocol(asyncio.Protocol):
    """Mixin for uvicorn's HTTP protocol: header limits, and replies to requests that have a response plan.

    uvicorn 0.54 limits neither time nor size of a request's header: a connection that sends half a header, or nothing,
    stays open for ever. Bodies are limited in `api.requests.read_body`, idle connections by the keep-alive timeout.
    tests/server/fast_path/test_uvicorn_internals.py checks what is used of uvicorn beyond its documentation.
    """

    header_timeout_s: float
    token: bytes | None
    # By the head of a request, from its first byte to the empty line; with where in it the credentials are.
    response_plans: dict[bytes, tuple[ResponsePlan, slice]]
    # Attributes of uvicorn's protocol. `cycle` is the request under way or just answered, None before the first.
    transport: asyncio.Transport
    cycle: Any
    scope: Any
    server_state: Any
    parser: Any
    headers: list[tuple[bytes, bytes]]
    loop: asyncio.AbstractEventLoop
    timeout_keep_alive: float
    timeout_keep_alive_task: asyncio.TimerHandle | None
    _header_deadline: asyncio.TimerHandle | None = None
    _header_bytes = 0
    _head: bytes | None = None
    _in_message = False
    _is_upgrading = False
    _answered_s = 0.0
    _descriptor = -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the header timeout, and learn the socket's descriptor unless TLS rules out writing to it directly."""
        super().connection_made(transport)
        self._await_header()
        sock = transport.get_extra_info("socket")
        if sock is not None and transport.get_extra_info("ssl_object") is None and not isinstance(sock, ssl.SSLSocket):
            self._descriptor = sock.fileno()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timeout, and discard the descriptor, whose number may name another file from now on."""
        self._descriptor = -1
        self._stop_waiting_for_header()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Answer a request that has a response plan, or pass the bytes to uvicorn and check the header limits."""
        if self._descriptor >= 0 and self._is_between_requests():
            end = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES) + 4
            if end > 4:
                head = data[:end]
                # Only for a complete request alone: a partial body, or another request behind it, goes to uvicorn.
                plan, credentials = self.response_plans.get(head, _NO_PLAN)
                if (
                    plan is not None
                    and len(data) == end + plan.body_bytes
                    and (self.token is None or has_token(data[credentials], self.token))
                    and self._answer(plan, data, end)
                ):
                    return
                # For `on_message_begin`, which uvicorn's parser calls from within `data_received`.
                self._head = head
        super().data_received(data)
        self._head = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting_for_header()
            return
        self._await_header()
        self._header_bytes += len(data)
        if self._header_bytes > MAX_HEADER_BYTES:
            self.transport.close()

    def on_message_begin(self) -> None:
        """Let the application store a plan for the request that begins, if its head came in one piece."""
        super().on_message_begin()  # type: ignore[misc]
        self._in_message = True
        head, self._head = self._head, None
        self.scope["extensions"] = {} if head is None else {PLANS_EXTENSION: partial(self._keep, head, self.scope)}

    def on_headers_complete(self) -> None:
        """Keep trailers of a chunked body out of the headers, and the fast path away from a connection that changes."""
        self._is_upgrading |= self.parser.should_upgrade()
        super().on_headers_complete()  # type: ignore[misc]
        # uvicorn's parser reports trailers as it does headers, and uvicorn would append them to those of the scope.
        self.headers = []

    def on_message_complete(self) -> None:
        """Note that the next bytes belong to another request."""
        super().on_message_complete()  # type: ignore[misc]
        self._in_message = False

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, counting requests answered here, which do not move uvicorn's timer."""
        left_s = self._answered_s + self.timeout_keep_alive - self.loop.time()
        if left_s > 0:
            self.timeout_keep_alive_task = self.loop.call_later(left_s, self.timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()  # type: ignore[misc]

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """Give the application access to the socket; the request may be one of several that came together."""
        if self._descriptor >= 0:
            cycle.scope["extensions"][SOCKET_EXTENSION] = SocketAccess(cycle, self._descriptor)
        super()._start_asgi_task(cycle, app)  # type: ignore[misc]

    def _is_between_requests(self) -> bool:
        # While the transport has bytes to send, a reply written to the socket would overtake them, and a client that
        # sends requests without reading replies must be paused, which uvicorn does.
        cycle, transport = self.cycle, self.transport
        return (
            not (self._in_message or self._is_upgrading)
            and (cycle is None or cycle.response_complete)
            and not transport.get_write_buffer_size()
            and not transport.is_closing()
        )

    def _await_header(self) -> None:
        # A running timeout is not restarted, or each byte of a slow header would extend it.
        if self._header_deadline is None:
            loop = asyncio.get_running_loop()
            self._header_deadline = loop.call_later(self.header_timeout_s, self.transport.close)

    def _stop_waiting_for_header(self) -> None:
        self._header_bytes = 0
        if self._header_deadline is not None:
            self._header_deadline.cancel()
            self._header_deadline = None

    def _keep(self, head: bytes, scope: Any, make: Callable[[], ResponsePlan]) -> None:
        cycle = self.cycle
        # Only for the request that the head belongs to, and if a repeat leaves the connection as it is now.
        if cycle.scope is not scope or not cycle.keep_alive or self._is_upgrading:
            return
        plan = make()
        if not is_unambiguous(head, scope, body_bytes=plan.body_bytes):
            return
        if len(self.response_plans) >= MAX_RESPONSE_PLANS:
            self.response_plans.clear()
        self.response_plans[head] = plan, credentials_in(head)

    def _answer(self, plan: ResponsePlan, data: bytes, body_begin: int) -> bool:
        body = plan.answer(memoryview(data)[body_begin:])
        if body is None:
            return False
        self._stop_waiting_for_header()
        # Not part of the plan, since uvicorn renews the date in these headers every second.
        date = b"".join(b"%b: %b\r\n" % header for header in self.server_state.default_headers)
        self._send([b"HTTP/1.1 200 OK\r\n" + date + plan.head, *body])
        self.server_state.total_requests += 1
        self._answered_s = self.loop.time()
        # uvicorn starts this timer after its own replies, and cancels it when it receives data: it may not be running.
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        return True

    def _send(self, buffers: Sequence[bytes | NDArray[Any]]) -> None:
        """Write to the socket what it takes at once, without copying, and the rest through the transport."""
        try:
            sent = os.writev(self._descriptor, buffers)  # type: ignore[arg-type]
        except BlockingIOError:
            sent = 0
        except OSError:
            self.transport.abort()  # the client is gone; `connection_lost` follows
            return
        for buffer in buffers:
            size = len(buffer) if isinstance(buffer, bytes) else buffer.nbytes
            if sent < size:
                self.transport.write(as_view(buffer)[sent:])
            sent = max(0, sent - size)


def make_protocol(*, header_timeout_s: float, token: str | None) -> type[asyncio.Protocol]:
    """Return uvicorn's HTTP protocol with header limits and, where httptools is installed, the fast path.

    With h11, the parser that uvicorn falls back to, `on_message_begin` is never called, so that no plan is kept.
    """
    # Plans are an attribute of the class, so that all connections of this process share them.
    secret = None if token is None else token.encode("ascii")
    attributes: dict[str, Any] = {"header_timeout_s": header_timeout_s, "token": secret, "response_plans": {}}
    return type("SoftLabelsProtocol", (FastPathProtocol, AutoHTTPProtocol), attributes)
