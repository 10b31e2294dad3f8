"""Replies of a server: read whole within a deadline, or as a stream while they are still arriving."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from softlabels.errors import ServerUnreachableError, TruncatedError, WireError
from softlabels_client.http.buffers import Buffers
from softlabels_client.http.raw_connection import RawConnection
from softlabels_client.http.retry import Deadline

_PIECE_BYTES = 1 << 16
_UNKNOWN_LENGTH = 1 << 62
"""Stands for the bytes left of a chunked stream, whose frames say how much there is."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A whole reply.

    Attributes:
        status: HTTP status.
        headers: by lower-case name.
        body: read-only.
    """

    status: int
    headers: Mapping[str, str]
    body: memoryview


class RawStream:
    """A streaming reply of known length on a raw socket: the fast path.

    Args:
        connection: used by this reply alone.
        headers: by lower-case name.
        length: bytes of the body.
        received: the part of it that came with the head.
        new_deadline: makes the deadline of one read.
        buffers: memory for frames.
    """

    status = 200

    def __init__(
        self,
        connection: RawConnection,
        headers: Mapping[str, str],
        length: int,
        received: bytes,
        new_deadline: Callable[[], Deadline],
        buffers: Buffers,
    ) -> None:
        self.headers, self.left_bytes, self.buffers = headers, length, buffers
        self._connection, self._received, self._new_deadline = connection, memoryview(received), new_deadline

    def read(self, size_bytes: int) -> memoryview:
        """Return the next bytes. Raises as `read_into`."""
        view = memoryview(bytearray(size_bytes))
        self.read_into(view)
        return view

    def read_into(self, view: memoryview) -> None:
        """Fill a buffer.

        Raises:
            TruncatedError: the reply ends before. ServerUnreachableError: timeout or broken connection.
        """
        if len(view) > self.left_bytes:
            raise TruncatedError(f"the reply has {self.left_bytes} bytes left, and {len(view)} are due")
        count = min(len(view), len(self._received))
        if count:
            view[:count] = self._received[:count]
            self._received = self._received[count:]
        if count < len(view):
            try:
                count += self._connection.read_into(view[count:], self._new_deadline())
            except OSError as error:
                raise ServerUnreachableError(f"the stream broke: {type(error).__name__}: {error}") from error
        if count < len(view):
            raise TruncatedError(f"the stream was cut with {self.left_bytes - count} bytes to come")
        self.left_bytes -= count

    def finish(self) -> None:
        """Raise WireError if the reply has more bytes than it should."""
        if self.left_bytes:
            raise WireError(f"{self.left_bytes} bytes follow the end of the stream")

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class ParsedReply:
    """A reply whose head a library has parsed: any status, over TLS or a proxy, of a known length or in chunks.

    Args:
        status: HTTP status.
        headers: by lower-case name.
        length: bytes of the body; None if unknown.
        chunked: whether the body has chunked transfer encoding.
        read_once: returns up to this many bytes after one system call; raises OSError or http.client.HTTPException.
        set_timeout: sets the socket's timeout, seconds.
        close: closes the connection.
        timeout_s: for each read of a stream.
        buffers: memory for frames.
    """

    def __init__(
        self,
        *,
        status: int,
        headers: Mapping[str, str],
        length: int | None,
        chunked: bool,
        read_once: Callable[[int], bytes],
        set_timeout: Callable[[float], None],
        close: Callable[[], None],
        timeout_s: float,
        buffers: Buffers,
    ) -> None:
        self.status, self.headers, self.buffers, self.close = status, headers, buffers, close
        self.left_bytes = _UNKNOWN_LENGTH if length is None else length
        self._length, self._chunked = length, chunked
        self._read_once, self._set_timeout, self._timeout_s = read_once, set_timeout, timeout_s

    def check_identity_encoding(self) -> None:
        """Raise WireError if the body is compressed: its bytes would be no arrays."""
        if self.headers.get("content-encoding", "identity") != "identity":
            raise WireError("the reply is compressed, which was not asked for: turn that off in the proxy between")

    def read_whole(self, limit: int, deadline: Deadline) -> memoryview:
        """Return the body.

        Raises:
            WireError: compressed, longer than `limit`, or of unknown length. TruncatedError, OSError, HTTPException.
        """
        self.check_identity_encoding()
        if self._length is None:
            return self._read_chunks(limit, deadline)
        if self._length > limit:
            raise too_long(self._length, limit)
        # Unlike a bytearray not zeroed first: every byte is written below, or the buffer is dropped.
        body, received = np.empty(self._length, dtype=np.uint8).data, 0
        while received < self._length:
            # Set before every read: a peer that sends a byte now and then must not outlast the deadline.
            self._set_timeout(deadline.left_s())
            piece = self._read_once(min(self._length - received, _PIECE_BYTES))
            if not piece:
                raise TruncatedError(f"the reply was cut after {received} of {self._length} bytes", received=received)
            body[received : received + len(piece)] = piece
            received += len(piece)
        return body.toreadonly()

    def _read_chunks(self, limit: int, deadline: Deadline) -> memoryview:
        if not self._chunked:
            raise WireError("the reply has neither a length nor chunks, so a cut one cannot be told from a whole one")
        body = bytearray()
        while len(body) <= limit:
            self._set_timeout(deadline.left_s())
            piece = self._read_once(_PIECE_BYTES)
            if not piece:
                return memoryview(body).toreadonly()
            body += piece
        raise WireError(f"the reply has more than the {limit} bytes that are possible: the rest was not read")

    def read(self, size_bytes: int) -> memoryview:
        """Return the next bytes. Raises as `read_into`."""
        view = memoryview(bytearray(size_bytes))
        self.read_into(view)
        return view

    def read_into(self, view: memoryview) -> None:
        """Fill a buffer.

        Raises:
            TruncatedError: the reply ends before. ServerUnreachableError: timeout or broken connection.
        """
        filled = 0
        while filled < len(view):
            try:
                self._set_timeout(self._timeout_s)
                piece = self._read_once(min(len(view) - filled, _PIECE_BYTES))
            except (OSError, http.client.HTTPException) as error:
                raise ServerUnreachableError(f"the stream broke: {type(error).__name__}: {error}") from error
            if not piece:
                raise TruncatedError("the stream was cut")
            view[filled : filled + len(piece)] = piece
            filled += len(piece)
        self.left_bytes -= filled

    def finish(self) -> None:
        """Raise WireError if the reply has more bytes than it should."""
        if self._length is not None and self.left_bytes:
            raise WireError(f"{self.left_bytes} bytes follow the end of the stream")


ReplyStream: TypeAlias = RawStream | ParsedReply
"""A streaming reply."""


def too_long(announced: int, limit: int) -> WireError:
    """Return the error for a reply that announces more bytes than are possible."""
    return WireError(f"the reply announces {announced} bytes, and at most {limit} are possible: it was not read")
