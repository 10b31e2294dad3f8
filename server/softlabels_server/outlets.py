"""How does a long reply leave? From a thread for as long as the reader keeps up; else no faster than it reads."""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool
from starlette.types import Scope, Send

from softlabels_server.forms import as_buffer

EXTENSION = "softlabels.pour"
"""Where the HTTP protocol leaves, in a request's scope, a `Pourer`."""

PATIENCE_MS = 20
"""How long a thread waits for a reader that has no room. Whoever takes longer is waited for in the event loop, where a
thousand of them cost nothing."""

SMALL_BYTES, LARGE_BYTES = 64 << 10, 1 << 20
"""Sizes of pieces: what a reader costs who stops reading, and what is gathered at the least cost a byte while it is
still in a core's cache when the socket takes it."""

PROOF_BYTES = 8 << 20
"""Whoever took so much without a pause reads: the kernel's buffers alone hold less."""

Piece: TypeAlias = Sequence[bytes | NDArray[Any]]


class Pourer(Protocol):
    """What the HTTP protocol can do for a reply under way."""

    def own_descriptor(self) -> int:
        """A descriptor of the connection's socket, to be closed by the caller; bytes may be written to it now."""
        ...

    def account(self, size_bytes: int) -> None:
        """Note that so many body bytes were written past the transport."""
        ...

    def pour(self, buffers: Sequence[memoryview]) -> None:
        """Send body bytes through the transport."""
        ...

    async def emptied(self) -> bool:
        """Wait until the transport has sent everything; False where the client is gone."""
        ...

    def is_gone(self) -> bool:
        """Whether nobody is there to read any more."""
        ...

    def abandon(self) -> None:
        """Close the connection in the middle of the reply, so that the client notices."""
        ...


class PouringOutlet:
    """Onto the socket, past the event loop while that pays."""

    def __init__(self, pourer: Pourer) -> None:
        self._pourer = pourer

    async def send_all(self, pieces: Iterator[Piece], appetite: Appetite, *, stall_timeout_s: float) -> bool:
        """Send all pieces; False where the client is gone, or took longer than that for one.

        Raises: what gathering a piece raises; the connection is closed then.
        """
        pourer = self._pourer
        if not await pourer.emptied():
            return False
        descriptor = pourer.own_descriptor()
        pump = Pump(descriptor, pieces, appetite, pourer.is_gone)
        try:
            while (left := await run_in_threadpool(pump.run)) is not None:
                pourer.account(pump.take_count())
                if pourer.is_gone():
                    return False
                pourer.pour(left)
                async with asyncio.timeout(stall_timeout_s):
                    if not await pourer.emptied():
                        return False
            pourer.account(pump.take_count())
            return True
        except TimeoutError:
            return False  # a reader that stopped; whoever it is can go on at its cursor
        finally:
            os.close(descriptor)

    def abandon(self) -> None:
        """Close the connection in the middle of the reply."""
        self._pourer.abandon()


class Appetite:
    """How much a reader takes at once, as far as seen; a piece is made no larger."""

    def __init__(self) -> None:
        self._taken = 0

    @property
    def piece_bytes(self) -> int:
        """How large the next piece should be."""
        return LARGE_BYTES if self._taken >= PROOF_BYTES else SMALL_BYTES

    def took(self, size_bytes: int) -> None:
        """The reader took so much."""
        self._taken += size_bytes

    def paused(self) -> None:
        """The reader took no more for a while."""
        self._taken = 0


class Pump:
    """Gathers pieces and writes them to a socket, in a thread.

    Args:
        descriptor: of a socket that does not block.
        pieces: what to write; each is gathered when it is asked for.
        appetite: says how large the next piece should be, and is told what the reader took.
        is_gone: whether to stop.
    """

    def __init__(
        self, descriptor: int, pieces: Iterator[Piece], appetite: Appetite, is_gone: Callable[[], bool]
    ) -> None:
        self._descriptor, self._pieces, self._appetite, self._is_gone = descriptor, pieces, appetite, is_gone
        self._written = 0
        self._room = select.poll()
        self._room.register(descriptor, select.POLLOUT)

    def run(self) -> list[memoryview] | None:
        """Write until all is written (None), or the reader has no room for a while: what it had none for."""
        for piece in self._pieces:
            left = [as_view(buffer) for buffer in piece]
            while left:
                try:
                    count = os.writev(self._descriptor, left)
                except BlockingIOError:
                    if self._is_gone() or not self._room.poll(PATIENCE_MS):
                        self._appetite.paused()
                        # Copied, so that what waits for a slow reader is no more than it has still to read.
                        return [memoryview(bytes(buffer)) for buffer in left]
                    continue
                except OSError:
                    return left  # the client is gone, as the event loop will find
                self._written += count
                self._appetite.took(count)
                left = _after(left, count)
        return None

    def take_count(self) -> int:
        """Bytes written since it was last asked for."""
        count, self._written = self._written, 0
        return count


class PlainOutlet:
    """As ASGI has it, for servers that know nothing of pouring."""

    def __init__(self, send: Send) -> None:
        self._send = send

    async def send_all(self, pieces: Iterator[Piece], appetite: Appetite, *, stall_timeout_s: float) -> bool:
        """Send all pieces; an ASGI server does not say whether anybody is there. Raises as gathering does."""
        while (piece := await run_in_threadpool(next, pieces, None)) is not None:
            async with asyncio.timeout(stall_timeout_s):
                for buffer in piece:
                    await self._send({"type": "http.response.body", "body": as_view(buffer), "more_body": True})
        return True

    def abandon(self) -> None:
        """A reply that is not whole when the app returns is cut by the server, which is all that is wanted."""


def outlet_of(scope: Scope, send: Send) -> PouringOutlet | PlainOutlet:
    """The best way out for a reply to this request."""
    pourer: Pourer | None = scope.get("extensions", {}).get(EXTENSION)
    return PlainOutlet(send) if pourer is None else PouringOutlet(pourer)


def as_view(buffer: bytes | NDArray[Any]) -> memoryview:
    """The bytes of either."""
    return memoryview(buffer) if isinstance(buffer, bytes) else as_buffer(buffer)


def _after(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left of buffers of which so many bytes are written."""
    for number, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[number + 1 :]]
        count -= len(buffer)
    return []
