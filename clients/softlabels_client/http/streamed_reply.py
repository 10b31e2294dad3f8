"""How is a long answer read while it is still on its way? Piece by piece, each within a time limit."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Mapping
from typing import TypeAlias

from softlabels.errors import ServerUnreachableError, TruncatedError, WireError
from softlabels_client.http.buffers import Buffers
from softlabels_client.http.raw_connection import PlainConnection
from softlabels_client.http.retry import Deadline

_BROKEN = (OSError, http.client.HTTPException)


class PlainReply:
    """An answer of known length over a plain socket.

    Args:
        connection: which is this answer's alone.
        headers: by lower-case name.
        length: of the body.
        taken: what of it is here already.
        again: a new deadline; every read has one of its own.
        buffers: where frames go.
    """

    status = 200

    def __init__(
        self,
        connection: PlainConnection,
        headers: Mapping[str, str],
        length: int,
        taken: bytes,
        again: Callable[[], Deadline],
        buffers: Buffers,
    ) -> None:
        self.headers, self.left_bytes = headers, length
        self._connection, self._taken, self._again, self._buffers = connection, memoryview(taken), again, buffers

    def buffer(self, size_bytes: int) -> memoryview:
        """Memory for a frame."""
        return self._buffers.take(size_bytes)

    def read(self, size_bytes: int) -> memoryview:
        """So many bytes. Raises as `read_into` does."""
        view = memoryview(bytearray(size_bytes))
        self.read_into(view)
        return view

    def read_into(self, view: memoryview) -> None:
        """Fill a buffer.

        Raises:
            TruncatedError: the answer ends before. ServerUnreachableError: nothing came in time, or the link broke.
        """
        if len(view) > self.left_bytes:
            raise TruncatedError(f"the answer has {self.left_bytes} bytes left where {len(view)} were to come")
        count = min(len(view), len(self._taken))
        if count:
            view[:count] = self._taken[:count]
            self._taken = self._taken[count:]
        if count < len(view):
            try:
                count += self._connection.read_into(view[count:], self._again())
            except OSError as error:
                raise ServerUnreachableError(f"the stream broke: {type(error).__name__}: {error}") from error
        if count < len(view):
            raise TruncatedError(f"the stream was cut with {self.left_bytes - count} bytes to come")
        self.left_bytes -= count

    def rest(self, most_bytes: int) -> memoryview:
        """All that is left, if it is not more than this."""
        return self.read(min(self.left_bytes, most_bytes))

    def finish(self) -> None:
        """Refuse an answer that has more bytes than it should. Raises WireError."""
        if self.left_bytes:
            raise WireError(f"{self.left_bytes} bytes follow the end of the stream")

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


class ParsedReply:
    """Any answer, as `http.client` reads it: over TLS, in chunks, or not a success.

    Args:
        connection: which is this answer's alone.
        response: whose head has been read.
        timeout_s: for each read.
        buffers: where frames go.
    """

    def __init__(
        self,
        connection: http.client.HTTPConnection,
        response: http.client.HTTPResponse,
        timeout_s: float,
        buffers: Buffers,
    ) -> None:
        self.status = response.status
        self.headers: Mapping[str, str] = {name.lower(): value for name, value in response.getheaders()}
        if self.headers.get("content-encoding", "identity") != "identity":
            raise WireError("the answer is compressed, which was not asked for: switch that off in the proxy between")
        # Chunks end by themselves; the frames say how much there is.
        self.left_bytes = response.length if response.length is not None else 1 << 62
        self._counted = response.length is not None
        self._connection, self._response, self._timeout_s, self._buffers = connection, response, timeout_s, buffers

    def buffer(self, size_bytes: int) -> memoryview:
        """Memory for a frame."""
        return self._buffers.take(size_bytes)

    def read(self, size_bytes: int) -> memoryview:
        """So many bytes. Raises as `read_into` does."""
        view = memoryview(bytearray(size_bytes))
        self.read_into(view)
        return view

    def read_into(self, view: memoryview) -> None:
        """Fill a buffer.

        Raises:
            TruncatedError: the answer ends before. ServerUnreachableError: nothing came in time, or the link broke.
        """
        filled = 0
        try:
            while filled < len(view):
                self._connection.sock.settimeout(self._timeout_s)
                count = self._response.readinto(view[filled:])
                if not count:
                    raise TruncatedError("the stream was cut")
                filled += count
        except TruncatedError:
            raise
        except _BROKEN as error:
            raise ServerUnreachableError(f"the stream broke: {type(error).__name__}: {error}") from error
        self.left_bytes -= filled

    def rest(self, most_bytes: int) -> memoryview:
        """All that is left, up to so many bytes."""
        return memoryview(self._response.read(most_bytes))

    def finish(self) -> None:
        """Refuse an answer that has more bytes than it should. Raises WireError."""
        if self._counted and self.left_bytes:
            raise WireError(f"{self.left_bytes} bytes follow the end of the stream")

    def close(self) -> None:
        """Close the connection."""
        self._response.close()
        self._connection.close()


OpenReply: TypeAlias = PlainReply | ParsedReply
"""A long answer, however it is read."""
