"""How does a request reach the server and its answer come back whole? One narrow seam: `HttpTransport.request`.

Built on `http.client`, because it lets a body be read straight into one buffer of the known length, each read under the
request's own deadline; what is usual goes past its parser, see `plain`. Everything sent here is a pure read, so
everything may be sent again.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import ssl
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from softlabels import wire
from softlabels.errors import RequestError, ServerUnreachableError, SoftLabelsError, TruncatedError, WireError
from softlabels_client.http.address import StoreAddress
from softlabels_client.http.buffers import Buffers
from softlabels_client.http.raw_connection import PlainConnection, read_usual, usual_length
from softlabels_client.http.retry import (
    RETRIED_STATUSES,
    Deadline,
    RetryPolicy,
    explain,
    mends_itself,
    refusal,
    retry_after_s,
)
from softlabels_client.http.streamed_reply import OpenReply, ParsedReply, PlainReply

MAX_ERROR_BYTES = 1 << 20
"""Problem details are a few sentences; whatever is longer is not read."""

_PIECE_BYTES = 1 << 16
_MOST_HEADS = 64
"""Heads of requests that are kept: a trainer asks in one form, and for a last batch in another."""
_STALE = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)
"""What a request fails with on a kept connection that the server closed meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A server's whole answer.

    Attributes:
        status: HTTP status.
        headers: by lower-case name.
        body: read-only.
    """

    status: int
    headers: Mapping[str, str]
    body: memoryview


@dataclass(frozen=True, kw_only=True)
class _Request:
    method: str
    target: str
    body: bytes | None
    headers: dict[str, str]
    max_bytes: int
    deadline: Deadline


class HttpTransport:
    """Requests to the server of one store, over connections that are kept and used again.

    Safe in threads and after fork: a child process opens connections of its own. Pickles without its connections.

    Args:
        address: the store.
        token: bearer token, for a server that asks for one.
        timeout_s: how long one request may take, all retries included.
        retry: when to send again.
    Raises:
        RequestError: a timeout or token that cannot be.
    """

    def __init__(
        self,
        address: StoreAddress,
        *,
        token: str | None = None,
        timeout_s: float = 30.0,
        retry: RetryPolicy | None = None,
    ) -> None:
        if not 0 < timeout_s <= 86_400:
            raise RequestError(f"timeout_s is {timeout_s}; a request may take more than 0 s and at most a day")
        if token is not None and not (token and token.isascii() and token.isprintable()):
            raise RequestError("the token is empty or holds characters that no HTTP header may carry")
        self._address, self._token, self._timeout_s = address, token, timeout_s
        self._retry = retry or RetryPolicy()
        self._has_answered = False
        self._tls: ssl.SSLContext | None = None
        self._idle: deque[http.client.HTTPConnection] = deque()
        self._process = os.getpid()
        self._buffers = Buffers()
        self._heads: dict[Any, bytes] = {}

    def request(
        self,
        method: str,
        path: str,
        *,
        max_bytes: int,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send a request that only reads, again if need be, until its answer is here whole or the time is up.

        Args:
            method: as HTTP has it.
            path: below the server's base address.
            max_bytes: a longer answer is refused before it is read.
            body: as HTTP has it.
            headers: further ones.
        Returns:
            An answer of status 200.
        Raises:
            TruncatedError: the answer was cut each time.
            WireError: the answer is longer than `max_bytes`, compressed, or of unknown length.
            ServerUnreachableError: nothing usable came.
            SoftLabelsError: whichever class the server's problem details stand for.
        """
        request = self._prepared(method, path, body, headers or {}, max_bytes)
        where, failures = self._address.base_url + path, 0
        while True:
            asked_s: float | None = None
            mends = True
            try:
                reply = self._exchange(request)
            except WireError:
                raise
            except (OSError, http.client.HTTPException) as error:
                failure = explain(error, where=where, timeout_s=self._timeout_s)
                mends = mends_itself(error)
            else:
                if reply.status == 200:
                    self._has_answered = True
                    return reply
                failure = refusal(reply.status, reply.headers, reply.body, where=where)
                mends, asked_s = reply.status in RETRIED_STATUSES, retry_after_s(reply.headers)
            failures += 1
            try:
                self._pause_or_give_up(failure, failures, request.deadline, mends=mends, asked_s=asked_s)
            finally:
                # A raised error names the frames that it came through; named by them in turn, it would hold the
                # connections open until the next collection of cycles.
                del failure

    def open(self, path: str) -> OpenReply:
        """Ask for a long answer, which is read as it comes; not sent again when it breaks.

        Raises: as `request` does, but at the first failure.
        """
        request = self._prepared("GET", path, None, {"Accept": wire.MEDIA_TYPE}, 0)
        connection = self._fresh_connection(request.deadline)
        where = self._address.base_url + path
        try:
            connection.connect()
            reply = self._opened(connection, request)
            if reply.status == 200:
                self._has_answered = True
                return reply
            body = reply.rest(MAX_ERROR_BYTES)
        except WireError:
            connection.close()
            raise
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise explain(error, where=where, timeout_s=self._timeout_s) from error
        except BaseException:
            connection.close()
            raise
        connection.close()
        raise refusal(reply.status, reply.headers, body, where=where)

    def pause_or_raise(self, error: SoftLabelsError, failures: int) -> None:
        """Wait before a stream is asked for again; raise what it failed with where that would change nothing."""
        mends = isinstance(error, TruncatedError | WireError | ServerUnreachableError)
        if not mends or failures >= self._retry.attempts:
            try:
                raise error
            finally:
                del error
        time.sleep(self._retry.pause_s(failures))

    def _opened(self, connection: http.client.HTTPConnection, request: _Request) -> OpenReply:
        def again() -> Deadline:
            return Deadline(self._timeout_s)

        if isinstance(connection, PlainConnection):
            head, buffer, begin, end = connection.ask(self._head_of(request), None, request.deadline)
            usual = usual_length(head)
            if usual is not None:
                taken = bytes(memoryview(buffer)[begin:end])
                return PlainReply(connection, usual[0], usual[1], taken, again, self._buffers)
            connection.use_timeout(request.deadline)
            response = connection.unusual("GET", bytes(memoryview(buffer)[:end]))
        else:
            connection.sock.settimeout(request.deadline.left_s())
            connection.request("GET", request.target, headers=request.headers)
            response = connection.getresponse()
        return ParsedReply(connection, response, self._timeout_s, self._buffers)

    def close(self) -> None:
        """Close the connections that wait to be used again; a later request opens a new one."""
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_idle", "_process", "_tls")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _idle=deque(), _process=os.getpid(), _tls=None)

    def __del__(self) -> None:
        if hasattr(self, "_idle"):
            self.close()

    def _prepared(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], max_bytes: int
    ) -> _Request:
        sent = {"Accept-Encoding": "identity", "User-Agent": "softlabels", **headers}
        if self._token is not None:
            sent["Authorization"] = f"Bearer {self._token}"
        return _Request(
            method=method,
            target=self._address.prefix + path,
            body=body,
            headers=sent,
            max_bytes=max_bytes,
            deadline=Deadline(self._timeout_s),
        )

    def _pause_or_give_up(
        self, failure: SoftLabelsError, failures: int, deadline: Deadline, *, mends: bool, asked_s: float | None
    ) -> None:
        most = self._retry.attempts if self._has_answered else self._retry.attempts_at_first
        pause_s = self._retry.pause_s(failures, asked_s=asked_s)
        if not mends or failures >= most or not deadline.allows(pause_s):
            try:
                raise failure
            finally:
                del failure
        time.sleep(pause_s)

    def _exchange(self, request: _Request) -> Reply:
        kept = self._kept_connection()
        if kept is not None:
            with contextlib.suppress(*_STALE):
                return self._exchange_over(kept, request)
            # Closed while it lay idle, which says nothing about the server: a fresh connection decides.
        return self._exchange_over(self._fresh_connection(request.deadline), request)

    def _exchange_over(self, connection: http.client.HTTPConnection, request: _Request) -> Reply:
        try:
            if connection.sock is None:
                connection.connect()
            if isinstance(connection, PlainConnection):
                reply, keep = self._exchange_plainly(connection, request)
            else:
                assert connection.sock is not None
                connection.sock.settimeout(request.deadline.left_s())
                connection.request(request.method, request.target, body=request.body, headers=request.headers)
                reply, keep = _read_reply(connection.getresponse(), connection.sock, request)
        except BaseException:
            # Ctrl-C too: half an answer may still be on its way on this connection, so nobody may use it again.
            connection.close()
            raise
        if keep:
            self._idle.append(connection)
        else:
            connection.close()
        return reply

    def _exchange_plainly(self, connection: PlainConnection, request: _Request) -> tuple[Reply, bool]:
        deadline = request.deadline
        head, buffer, begin, end = connection.ask(self._head_of(request), request.body, deadline)
        usual = usual_length(head)
        taken = memoryview(buffer)
        if usual is None:
            connection.use_timeout(deadline)
            return _read_reply(connection.unusual(request.method, bytes(taken[:end])), connection.sock, request)
        headers, length = usual
        if length > request.max_bytes:
            raise _too_long(length, request.max_bytes)
        body = read_usual(connection, length, taken[begin:end], deadline, self._buffers)
        return Reply(status=200, headers=headers, body=body), True

    def _head_of(self, request: _Request) -> bytes:
        """The bytes before a request's body; the same for every batch of an epoch, so they are kept."""
        length = None if request.body is None else len(request.body)
        key = (request.method, request.target, length, *request.headers.items())
        head = self._heads.get(key)
        if head is None:
            host = self._address.base_url.removesuffix(self._address.prefix).partition("://")[2]
            lines = [f"{request.method} {request.target} HTTP/1.1", f"Host: {host}"]
            lines += [f"{name}: {value}" for name, value in request.headers.items()]
            lines += [] if length is None else [f"Content-Length: {length}"]
            if any("\r" in line or "\n" in line for line in lines):
                raise RequestError("a line break in a request's address or header would begin another header")
            if len(self._heads) > _MOST_HEADS:
                self._heads.clear()
            head = self._heads[key] = "\r\n".join([*lines, "", ""]).encode("ascii")
        return head

    def _kept_connection(self) -> http.client.HTTPConnection | None:
        if self._process != os.getpid():
            # After a fork the parent goes on using these sockets: closing our copies of them leaves its own open.
            self.close()
            self._process = os.getpid()
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        return None

    def _fresh_connection(self, deadline: Deadline) -> http.client.HTTPConnection:
        host, port, timeout_s = self._address.host, self._address.port, deadline.left_s()
        if self._address.scheme == "https":
            # Made once: reading the machine's certificates takes longer than a batch.
            self._tls = self._tls or ssl.create_default_context()
            return http.client.HTTPSConnection(host, port, timeout=timeout_s, context=self._tls)
        plain = PlainConnection if os.name == "posix" else http.client.HTTPConnection
        return plain(host, port, timeout=timeout_s)


def _read_reply(response: http.client.HTTPResponse, sock: socket.socket, request: _Request) -> tuple[Reply, bool]:
    """Any answer at all, read by `http.client`; and whether the connection can be used again."""
    with response:
        headers = {name.lower(): value for name, value in response.getheaders()}
        limit = request.max_bytes if response.status == 200 else MAX_ERROR_BYTES
        body = _read_body(response, sock, limit, request.deadline)
        return Reply(status=response.status, headers=headers, body=body), not response.will_close


def _read_body(response: http.client.HTTPResponse, sock: socket.socket, limit: int, deadline: Deadline) -> memoryview:
    if response.getheader("Content-Encoding", "identity") != "identity":
        raise WireError("the answer is compressed, which was not asked for: switch that off in the proxy between")
    announced = response.length
    if announced is None:
        return _read_chunks(response, sock, limit, deadline)
    if announced > limit:
        raise _too_long(announced, limit)
    # Not zeroed first, unlike a bytearray: every byte is written below, or the buffer is thrown away.
    body = np.empty(announced, dtype=np.uint8).data
    received = 0
    while received < announced:
        sock.settimeout(deadline.left_s())
        # One system call at a time, straight into the buffer; `response.readinto` would wait for all, however long.
        count = response.fp.readinto1(body[received:])
        if not count:
            raise TruncatedError(f"the answer was cut after {received} of {announced} bytes", received=received)
        received += count
    return body.toreadonly()


def _too_long(announced: int, limit: int) -> WireError:
    return WireError(f"the answer announces {announced} bytes where at most {limit} can be right: it was not read")


def _read_chunks(response: http.client.HTTPResponse, sock: socket.socket, limit: int, deadline: Deadline) -> memoryview:
    if not response.chunked:
        raise WireError("the answer has neither a length nor chunks, so a cut one could not be told from a whole one")
    body = bytearray()
    while len(body) <= limit:
        sock.settimeout(deadline.left_s())
        piece = response.read1(_PIECE_BYTES)
        if not piece:
            return memoryview(body).toreadonly()
        body += piece
    raise WireError(f"the answer has more than the {limit} bytes that can be right: the rest was not read")
