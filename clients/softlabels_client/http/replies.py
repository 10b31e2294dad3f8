"""Replies of a server: read whole within a deadline, or as a stream while they are still arriving."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from softlabels.errors import ServerUnreachableError, TruncatedError, WireError
from softlabels_client.http.raw_connection import Buffers, RawConnection
from softlabels_client.http.retry import Deadline

_PIECE_BYTES = 1 << 16
_UNKNOWN_LENGTH = 1 << 62
"""Stands for the bytes left of a reply in chunks, whose frames say how many there are."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A whole reply.

    Attributes:
        status: HTTP status.
        headers: by lower-case name.
        body: read-only.
        content: what the request's `read` made of it.
    """

    status: int
    headers: Mapping[str, str]
    body: memoryview
    content: Any = None


@dataclass(kw_only=True, eq=False)
class ReplyStream:
    """A reply whose head has arrived, and whose body is read piece by piece.

    Attributes:
        status: HTTP status.
        headers: by lower-case name.
        length: bytes of the body; None if unknown.
        timeout_s: limit of each read, seconds.
        buffers: memory for frames.
        close: closes the connection.
        left_bytes: bytes of the body not yet read; a huge number if the length is unknown.
    """

    status: int
    headers: Mapping[str, str]
    length: int | None
    timeout_s: float
    buffers: Buffers
    close: Callable[[], None]
    left_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.left_bytes = _UNKNOWN_LENGTH if self.length is None else self.length

    def read(self, size_bytes: int) -> memoryview:
        """Return the next bytes. Raises as `read_into`."""
        view = memoryview(bytearray(size_bytes))
        self.read_into(view)
        return view

    def read_into(self, view: memoryview) -> None:
        """Fill a buffer with the next bytes.

        Raises:
            TruncatedError: the reply ends before. ServerUnreachableError: timeout or broken connection.
        """
        if len(view) > self.left_bytes:
            raise TruncatedError(f"the reply has {self.left_bytes} bytes left, and {len(view)} are due")
        try:
            count = self._fill(view)
        except (OSError, http.client.HTTPException) as error:
            raise ServerUnreachableError(f"the stream broke: {type(error).__name__}: {error}") from error
        if count < len(view):
            raise TruncatedError(f"the stream was cut {len(view) - count} bytes before the end of a frame")
        self.left_bytes -= count

    def finish(self) -> None:
        """Raise WireError if the reply has more bytes than it should."""
        if self.length is not None and self.left_bytes:
            raise WireError(f"{self.left_bytes} bytes follow the end of the stream")

    def _fill(self, view: memoryview) -> int:
        """Fill a buffer, or as much of it as arrives before the reply ends; return the number of bytes."""
        raise NotImplementedError


@dataclass(kw_only=True, eq=False)
class RawStream(ReplyStream):
    """A streaming reply of known length on a raw socket: the fast path.

    Attributes:
        connection: used by this reply alone.
        received: the part of the body that came with the head and is not yet read.
    """

    connection: RawConnection
    received: memoryview

    def _fill(self, view: memoryview) -> int:
        count = min(len(view), len(self.received))
        if count:
            view[:count] = self.received[:count]
            self.received = self.received[count:]
        if count < len(view):
            # A deadline for each read, not for the reply: a stream may last as long as its epoch; only a stall fails.
            count += self.connection.read_into(view[count:], Deadline(self.timeout_s))
        return count


@dataclass(kw_only=True, eq=False)
class ParsedReply(ReplyStream):
    """A reply whose head a library has parsed: any status, over TLS or a proxy, of a known length or in chunks.

    Attributes:
        chunked: whether the body has chunked transfer encoding.
        read_once: returns up to this many bytes after one system call; raises OSError or http.client.HTTPException.
        set_timeout: sets the socket's timeout, seconds.
    """

    chunked: bool
    read_once: Callable[[int], bytes]
    set_timeout: Callable[[float], None]

    def check_identity_encoding(self) -> None:
        """Raise WireError if the body is compressed: its bytes would be no arrays."""
        if self.headers.get("content-encoding", "identity") != "identity":
            raise WireError("the reply is compressed, which was not asked for: turn that off in the proxy between")

    def read_whole(self, limit: int, deadline: Deadline) -> memoryview:
        """Return the body, read-only.

        Raises:
            WireError: compressed, longer than `limit`, or of unknown length. TruncatedError, OSError, HTTPException.
        """
        self.check_identity_encoding()
        if self.length is None:
            return self._read_chunks(limit, deadline)
        check_length(self.length, limit)
        # Unlike a bytearray not zeroed first: every byte is written below, or the buffer is dropped.
        body, received = np.empty(self.length, dtype=np.uint8).data, 0
        while received < self.length:
            # Set before every read: a peer that sends a byte now and then must not outlast the deadline.
            self.set_timeout(deadline.left_s())
            piece = self.read_once(min(self.length - received, _PIECE_BYTES))
            if not piece:
                raise TruncatedError(f"the reply was cut after {received} of {self.length} bytes", received=received)
            body[received : received + len(piece)] = piece
            received += len(piece)
        return body.toreadonly()

    def _read_chunks(self, limit: int, deadline: Deadline) -> memoryview:
        if not self.chunked:
            raise WireError("the reply has neither a length nor chunks, so a cut one cannot be told from a whole one")
        body = bytearray()
        while len(body) <= limit:
            self.set_timeout(deadline.left_s())
            piece = self.read_once(_PIECE_BYTES)
            if not piece:
                # The last chunk has arrived: if the connection ends before it, `read_once` raises.
                return memoryview(body).toreadonly()
            body += piece
        raise WireError(f"the reply has more than the {limit} bytes that are possible: the rest was not read")

    def _fill(self, view: memoryview) -> int:
        filled = 0
        while filled < len(view):
            self.set_timeout(self.timeout_s)
            piece = self.read_once(min(len(view) - filled, _PIECE_BYTES))
            if not piece:
                break
            view[filled : filled + len(piece)] = piece
            filled += len(piece)
        return filled


def check_length(announced: int, limit: int) -> None:
    """Raise WireError if a reply announces more bytes than are possible."""
    if announced > limit:
        raise WireError(f"the reply announces {announced} bytes, and at most {limit} are possible: it was not read")
