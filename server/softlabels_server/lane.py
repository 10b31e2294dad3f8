"""How is a request answered that was asked before with other ids? In the protocol itself, without a task or an app.

Stands before uvicorn's httptools protocol. A request whose head is, byte for byte, one that a recipe was kept for is
answered here, straight onto the socket; any other, and any that a recipe cannot answer, goes the long way. The first
with a given head always goes the long way, so all checks are made there, the token's among them.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from numpy.typing import NDArray

from softlabels_server.forms import as_buffer
from softlabels_server.outlets import EXTENSION as POURING
from softlabels_server.recipes import EXTENSION, MOST_HEAD_BYTES, MOST_RECIPES, Recipe, Recipes


class FastLane(asyncio.Protocol):
    """Answers known requests; a base class that stands before `HttpToolsProtocol`."""

    recipes: Recipes
    transport: asyncio.Transport
    cycle: Any  # uvicorn's: the request under way or just answered, None before the first
    scope: Any
    server_state: Any
    loop: asyncio.AbstractEventLoop
    timeout_keep_alive: float
    timeout_keep_alive_task: asyncio.TimerHandle | None
    expect_100_continue: bool
    flow: Any
    stop_waiting_for_header: Callable[[], None]
    _head: bytes | None = None
    _in_message = False
    _answered_s = 0.0
    _descriptor = -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note whether bytes may be written past the transport."""
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and transport.get_extra_info("ssl_object") is None and not isinstance(sock, ssl.SSLSocket):
            self._descriptor = sock.fileno()

    def connection_lost(self, exc: Exception | None) -> None:
        """The descriptor's number may be another file's from now on."""
        self._descriptor = -1
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Answer a request that a recipe is there for, or pass the bytes on."""
        if self._descriptor >= 0 and self._is_between_requests():
            end = data.find(b"\r\n\r\n", 0, MOST_HEAD_BYTES) + 4
            if end > 4:
                head = data[:end]
                recipe = self.recipes.get(head)
                if recipe is not None and len(data) == end + recipe.body_bytes and self._answer(recipe, data, end):
                    return
                self._head = head
        super().data_received(data)

    def on_message_begin(self) -> None:
        """Let the app keep a recipe for the request that begins, if its head came whole."""
        super().on_message_begin()  # type: ignore[misc]
        self._in_message = True
        head, self._head = self._head, None
        self.scope["extensions"] = {} if head is None else {EXTENSION: partial(self._keep, head, self.scope)}

    def on_message_complete(self) -> None:
        """What comes next is another request."""
        super().on_message_complete()  # type: ignore[misc]
        self._in_message = False

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that was idle for long enough; requests answered here do not move uvicorn's timer."""
        left_s = self._answered_s + self.timeout_keep_alive - self.loop.time()
        if left_s > 0:
            self.timeout_keep_alive_task = self.loop.call_later(left_s, self.timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()  # type: ignore[misc]

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """Let the app write past the transport; the request may be one of several that came at once."""
        if self._descriptor >= 0:
            cycle.scope["extensions"][POURING] = _Pouring(cycle, self._descriptor)
        super()._start_asgi_task(cycle, app)  # type: ignore[misc]

    def _is_between_requests(self) -> bool:
        # With bytes still to be sent, a reply written past the transport would overtake them; and whoever asks again
        # without reading has to wait, as uvicorn makes him.
        cycle, transport = self.cycle, self.transport
        return (
            not self._in_message
            and (cycle is None or cycle.response_complete)
            and not transport.get_write_buffer_size()
            and not transport.is_closing()
        )

    def _keep(self, head: bytes, scope: Any, make: Callable[[], Recipe]) -> None:
        cycle = self.cycle
        if cycle.scope is not scope or not cycle.keep_alive or self.expect_100_continue:
            return
        if len(self.recipes) >= MOST_RECIPES:
            self.recipes.clear()
        self.recipes[head] = make()

    def _answer(self, recipe: Recipe, data: bytes, body_begin: int) -> bool:
        arrays = recipe.answer(memoryview(data)[body_begin:])
        if arrays is None:
            return False
        self.stop_waiting_for_header()
        date = b"".join(b"%b: %b\r\n" % header for header in self.server_state.default_headers)
        self._send([b"HTTP/1.1 200 OK\r\n" + date + recipe.head + recipe.form.header, *arrays])
        self.server_state.total_requests += 1
        self._answered_s = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        return True

    def _send(self, buffers: Sequence[bytes | NDArray[Any]]) -> None:
        """Send without copying: what the socket takes at once past the transport, the rest through it."""
        try:
            sent = os.writev(self._descriptor, buffers)  # type: ignore[arg-type]
        except BlockingIOError:
            sent = 0
        except OSError:
            self.transport.abort()  # the client is gone, which `connection_lost` will hear of
            return
        for buffer in buffers:
            size = _size(buffer)
            if sent < size:
                view = memoryview(buffer) if isinstance(buffer, bytes) else as_buffer(buffer)
                self.transport.write(view[sent:])
            sent = max(0, sent - size)


class _Pouring:
    """What an app may do with the connection while its reply is under way; see `outlets.Pourer`.

    Args:
        cycle: uvicorn's, of this request; the protocol itself may have begun to read the next one.
        descriptor: of the connection's socket.
    """

    def __init__(self, cycle: Any, descriptor: int) -> None:
        self._cycle, self._descriptor = cycle, descriptor
        self._transport: asyncio.Transport = cycle.transport

    def own_descriptor(self) -> int:
        """Another descriptor of the socket: once the transport closes its own, that number may name another file."""
        return os.dup(self._descriptor)

    def account(self, size_bytes: int) -> None:
        """Note that body bytes were written past the transport: uvicorn counts them against the announced length."""
        self._cycle.expected_content_length -= size_bytes
        assert self._cycle.expected_content_length >= 0, "more bytes than the reply announced"

    def pour(self, buffers: Sequence[memoryview]) -> None:
        """Send body bytes through the transport."""
        self.account(sum(map(len, buffers)))
        for buffer in buffers:
            self._transport.write(buffer)

    async def emptied(self) -> bool:
        """Wait until the transport has sent everything; False where the client is gone."""
        if self._transport.get_write_buffer_size():
            self._transport.set_write_buffer_limits(high=0)  # calls `pause_writing`, and `resume_writing` when empty
            await self._cycle.flow.drain()
            if not self.is_gone():
                self._transport.set_write_buffer_limits()
        return not self.is_gone()

    def is_gone(self) -> bool:
        """Whether nobody is there to read any more."""
        return bool(self._cycle.disconnected or self._transport.is_closing())

    def abandon(self) -> None:
        """Close the connection in the middle of the reply, so that the client notices."""
        self._transport.abort()
        # As uvicorn will hear in a moment; until then it would take this for a fault of the app, and log it.
        self._cycle.disconnected = True


def _size(buffer: bytes | NDArray[Any]) -> int:
    return len(buffer) if isinstance(buffer, bytes) else buffer.nbytes
