"""Streaming replies: a thread gathers chunks and writes them to the socket; a slow reader is waited for in the loop."""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.types import Scope, Send

SOCKET_EXTENSION = "softlabels.socket_access"
"""ASGI scope extension: the `SocketAccess` of this request."""

WRITABLE_TIMEOUT_MS = 20
"""How long a thread waits for room in the socket. Slower readers are waited for in the event loop, where a thousand of
them cost nothing."""

SMALL_CHUNK_BYTES, LARGE_CHUNK_BYTES = 64 << 10, 1 << 20
"""Chunk sizes: small bounds the memory held for a reader that stops; large is gathered at the lowest cost a byte while
still fitting a core's cache when the socket takes it."""

FAST_READER_BYTES = 8 << 20
"""A reader that took this much without a pause is reading: the kernel's socket buffers hold less."""

Chunk: TypeAlias = Sequence[bytes | NDArray[Any]]


class SocketAccess:
    """The application's access to the connection while its reply is being sent.

    Args:
        cycle: uvicorn's request-response cycle; the protocol itself may already read the next request.
        descriptor: file descriptor of the connection's socket.
    """

    def __init__(self, cycle: Any, descriptor: int) -> None:
        self.descriptor = descriptor
        self._cycle, self._transport = cycle, cycle.transport

    def account(self, size_bytes: int) -> None:
        """Subtract body bytes that bypassed uvicorn, which compares what it sent with the announced length."""
        self._cycle.expected_content_length -= size_bytes
        assert self._cycle.expected_content_length >= 0, "more bytes than the reply announced"

    async def write(self, buffers: Sequence[memoryview]) -> None:
        """Send body bytes through the transport and wait until they are sent. Raises as `drain`."""
        if self.is_closed():
            raise ClientDisconnect
        self.account(sum(map(len, buffers)))
        for buffer in buffers:
            self._transport.write(buffer)
        await self.drain()

    async def drain(self) -> None:
        """Wait until the transport has sent everything. Raises ClientDisconnect if the client is gone."""
        if self._transport.get_write_buffer_size():
            # With a limit of 0 the transport calls `pause_writing` now, and `resume_writing` only when it is empty.
            self._transport.set_write_buffer_limits(high=0)
            await self._cycle.flow.drain()
            if not self.is_closed():
                self._transport.set_write_buffer_limits()
        if self.is_closed():
            raise ClientDisconnect

    def is_closed(self) -> bool:
        """Return whether the client is gone."""
        return bool(self._cycle.disconnected or self._transport.is_closing())

    def abort(self) -> None:
        """Close the connection in the middle of the reply, so that the client notices."""
        self._transport.abort()
        # uvicorn learns of it only in the next loop iteration; until then it would log an error of the application.
        self._cycle.disconnected = True


class AdaptiveChunkSize:
    """Size of the next chunk, by how many bytes the reader took without a pause."""

    taken_bytes = 0

    @property
    def chunk_bytes(self) -> int:
        """Target size of the next chunk."""
        return LARGE_CHUNK_BYTES if self.taken_bytes >= FAST_READER_BYTES else SMALL_CHUNK_BYTES


async def send_chunks(
    scope: Scope, send: Send, chunks: Iterator[Chunk], size: AdaptiveChunkSize, *, stall_timeout_s: float
) -> bool:
    """Send the body of a reply; close the connection and return False if the client is gone or stalls.

    Without `SocketAccess` (TLS, h11, test clients), as ASGI messages, which do not say whether the client is there.

    Args:
        chunks: buffers to send; each chunk is gathered by `next`, whose errors are raised.
        size: updated with the bytes that the reader took.
        stall_timeout_s: how long the reader may take for the rest of a chunk.
    """
    access: SocketAccess | None = scope.get("extensions", {}).get(SOCKET_EXTENSION)
    if access is not None:
        try:
            await _send_from_thread(access, chunks, size, stall_timeout_s)
        except (ClientDisconnect, TimeoutError):  # a reader that stopped can resume at its cursor
            access.abort()
            return False
        return True
    # With a default, because a StopIteration that is raised in a coroutine becomes a RuntimeError.
    while (chunk := await run_in_threadpool(next, chunks, None)) is not None:
        async with asyncio.timeout(stall_timeout_s):
            for buffer in chunk:
                await send({"type": "http.response.body", "body": as_view(buffer), "more_body": True})
    return True


async def _send_from_thread(
    access: SocketAccess, chunks: Iterator[Chunk], size: AdaptiveChunkSize, stall_timeout_s: float
) -> None:
    """Write from a thread while the socket takes the chunks, and through the event loop while the reader is slow."""
    await access.drain()  # the reply's head is still in the transport
    # A copy, because the number may name another file as soon as the transport closes its own descriptor.
    descriptor = os.dup(access.descriptor)
    try:
        left: list[memoryview] | None = []
        while left is not None:
            written, left = await run_in_threadpool(_write_chunks, access, descriptor, chunks, size)
            access.account(written)  # in the event loop, since uvicorn's cycle is not thread-safe
            if left is not None:
                async with asyncio.timeout(stall_timeout_s):
                    await access.write(left)
    finally:
        os.close(descriptor)


def _write_chunks(
    access: SocketAccess, descriptor: int, chunks: Iterator[Chunk], size: AdaptiveChunkSize
) -> tuple[int, list[memoryview] | None]:
    """Write chunks; return the bytes written and None at the end, or the rest of a chunk that found no room."""
    # `select` cannot wait for descriptors above 1,023, and a server may have thousands of streams open.
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    written = 0
    for chunk in chunks:
        left = [as_view(buffer) for buffer in chunk]
        while left:
            try:
                count = os.writev(descriptor, left)
            except BlockingIOError:
                if access.is_closed() or not poll.poll(WRITABLE_TIMEOUT_MS):
                    size.taken_bytes = 0
                    # Copied, so that a waiting reader holds only what it has not read, not whole arrays.
                    return written, [memoryview(bytes(buffer)) for buffer in left]
                continue
            except OSError:
                return written, left  # the client is gone, as the event loop will find
            written += count
            size.taken_bytes += count
            left = _skip(left, count)
    return written, None


def as_buffer(array: NDArray[Any]) -> memoryview:
    """Return an array's bytes, little-endian and in C order, without a copy if they are so already."""
    packed = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return packed.reshape(-1).view(np.uint8).data


def as_view(buffer: bytes | NDArray[Any]) -> memoryview:
    """Return the bytes of either, without a copy."""
    return memoryview(buffer) if isinstance(buffer, bytes) else as_buffer(buffer)


def _skip(buffers: list[memoryview], count: int) -> list[memoryview]:
    """Return what is left of buffers after `count` written bytes."""
    for number, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[number + 1 :]]
        count -= len(buffer)
    return []
