"""HttpTransport: sends a request, retries it within a deadline, and returns the whole reply or raises its error.

Plain http without a proxy uses raw sockets (`raw_connection`), since batches are read that way; TLS and proxies use
urllib3 (`connection_pool`), which is imported only then. All requests are reads, so all may be sent again.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import ssl
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from softlabels import wire
from softlabels.errors import DamageError, RequestError, SoftLabelsError, TruncatedError, WireError
from softlabels_client.http.address import StoreAddress, proxy_for
from softlabels_client.http.raw_connection import Buffers, RawConnection, parse_usual, read_body
from softlabels_client.http.replies import ParsedReply, RawStream, Reply, ReplyStream, check_length
from softlabels_client.http.retry import (
    RETRIED_STATUSES,
    Deadline,
    RetryPolicy,
    SumMismatchError,
    changed_on_the_way,
    connection_error,
    retry_after_s,
    status_error,
)

if TYPE_CHECKING:
    from softlabels_client.http.connection_pool import ConnectionPool

MAX_ERROR_BYTES = 1 << 20
"""Longest body of an error reply that is read: problem details are a few sentences."""

_MOST_HEADS = 64
"""Request heads cached: a trainer sends one kind of request, and another for the last batch."""

_STALE = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)
"""Errors of a request on an idle connection that the server closed meanwhile."""


@dataclass(frozen=True, kw_only=True)
class _Request:
    method: str
    target: str
    body: bytes | None
    headers: dict[str, str]
    max_bytes: int
    deadline: Deadline
    read: Callable[[memoryview], Any]


class HttpTransport:
    """Requests to the server of one store, over connections that are kept alive.

    Safe in threads and after fork: a child process opens its own connections. Pickles without connections. Honours
    HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY as they are when it is made.

    Args:
        address: address of the store.
        token: bearer token, for a server that requires one.
        timeout_s: limit of one request, all retries included, seconds.
        retry: when to send a request again.
    Raises:
        RequestError: a timeout or token that cannot be used.
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
            raise RequestError("the token is empty or contains characters that no HTTP header may carry")
        self._address, self._token, self._timeout_s = address, token, timeout_s
        self._retry = retry or RetryPolicy()
        self._proxy = proxy_for(address)
        # RawConnection relies on socket options of POSIX systems.
        self._is_raw = address.scheme == "http" and self._proxy is None and os.name == "posix"
        self._has_answered = False
        # Shared by threads without a lock: `append` and `pop` of a deque are atomic.
        self._idle: deque[RawConnection] = deque()
        self._pool: ConnectionPool | None = None
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
        read: Callable[[memoryview], Any] = lambda body: None,
    ) -> Reply:
        """Send a request, retrying it, and return its whole reply, of status 200.

        Args:
            method, body, headers: of the request; common headers are added.
            path: path below the server's base address.
            max_bytes: longest reply accepted; a longer one is refused before it is read.
            read: checks the body and returns the reply's `content`. If it raises, the connection is closed, since
                what else comes on it may belong to another request; after SumMismatchError the request is sent again
                once, with a header that has the server verify the rows.
        Raises:
            ChecksumError: the reply was changed on the way, twice.
            TruncatedError: the reply was cut each time.
            WireError: the reply is longer than `max_bytes`, compressed, or of unknown length.
            ServerUnreachableError: no usable reply within the deadline.
            SoftLabelsError: the class that the server's problem details name.
        """
        request = self._prepared(method, path, body, headers or {}, max_bytes, read)
        url, failures = self._address.base_url + path, 0
        while True:
            asked_s: float | None = None
            try:
                reply = self._exchange(request)
            except SumMismatchError:
                self.close()  # an idle connection may be as far out of step
                if wire.VERIFY_HEADER in request.headers:
                    raise changed_on_the_way(url) from None
                request = replace(request, headers={**request.headers, wire.VERIFY_HEADER: "1"})
                continue
            except (OSError, http.client.HTTPException) as error:
                # A reply that breaks the protocol, or that `read` refuses, is not requested again.
                if isinstance(error, DamageError) and not isinstance(error, TruncatedError):
                    raise
                failure = connection_error(error, url=url, timeout_s=self._timeout_s)
                # A retry cannot make a certificate valid.
                transient = not isinstance(error, ssl.SSLCertVerificationError)
            else:
                if reply.status == 200:
                    self._has_answered = True
                    return reply
                failure = status_error(reply.status, reply.headers, reply.body, url=url)
                transient, asked_s = reply.status in RETRIED_STATUSES, retry_after_s(reply.headers)
            failures += 1
            try:
                self.pause_or_raise(failure, failures, transient=transient, asked_s=asked_s, deadline=request.deadline)
            finally:
                # A raised error refers to the frames it passed through; if they referred to it in turn, connections
                # would stay open until the next collection of reference cycles.
                del failure

    def open(self, path: str, *, verify: bool = False) -> ReplyStream:
        """Request a streaming reply; sent once. Raises as `request`, at the first failure.

        Args:
            verify: have the server compare the first frame with what was written.
        """
        headers = {"Accept": wire.MEDIA_TYPE, **({wire.VERIFY_HEADER: "1"} if verify else {})}
        request = self._prepared("GET", path, None, headers, 0)
        url = self._address.base_url + path
        try:
            with contextlib.ExitStack() as on_failure:
                stream = self._open_raw(request) if self._is_raw else self._send_pooled(request)
                on_failure.callback(stream.close)
                if isinstance(stream, ParsedReply):
                    stream.check_identity_encoding()
                if stream.status == 200:
                    self._has_answered = True
                    on_failure.pop_all()
                    return stream
                assert isinstance(stream, ParsedReply), "the fast path is for status 200"
                body = stream.read_whole(MAX_ERROR_BYTES, request.deadline)
        except WireError:
            raise
        except (OSError, http.client.HTTPException) as error:
            raise connection_error(error, url=url, timeout_s=self._timeout_s) from error
        raise status_error(stream.status, stream.headers, body, url=url)

    def pause_or_raise(
        self,
        failure: SoftLabelsError,
        failures: int,
        *,
        transient: bool,
        asked_s: float | None = None,
        deadline: Deadline | None = None,
    ) -> None:
        """Wait before a request is sent again; raise its error if that is pointless.

        Args:
            failure: error of the last attempt.
            failures: failed attempts in a row.
            transient: whether the same request may succeed in a moment.
            asked_s: pause that the server asks for, seconds.
            deadline: the pause must end before it.
        """
        most = self._retry.attempts if self._has_answered else self._retry.attempts_at_first
        pause_s = self._retry.pause_s(failures, asked_s=asked_s)
        if not transient or failures >= most or (deadline is not None and not deadline.allows(pause_s)):
            try:
                raise failure
            finally:
                del failure  # as in `request`
        time.sleep(pause_s)

    def close(self) -> None:
        """Close idle connections; a later request opens a new one."""
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_idle", "_process", "_pool")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _idle=deque(), _process=os.getpid(), _pool=None)

    def __del__(self) -> None:
        # The constructor may have raised before there was anything to close.
        if hasattr(self, "_idle"):
            self.close()

    def _prepared(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        max_bytes: int,
        read: Callable[[memoryview], Any] = lambda body: None,
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
            read=read,
        )

    def _exchange(self, request: _Request) -> Reply:
        if not self._is_raw:
            return self._exchange_parsed(self._send_pooled(request), request)
        self._forget_after_fork()
        idle = self._idle_connection()
        if idle is not None:
            # If the server closed it while idle, that says nothing about its health: a fresh connection decides.
            with contextlib.suppress(*_STALE):
                return self._exchange_raw(idle, request)
        return self._exchange_raw(self._new_connection(request), request)

    def _idle_connection(self) -> RawConnection | None:
        with contextlib.suppress(IndexError):
            while not (connection := self._idle.pop()).is_quiet():
                connection.close()
            return connection
        return None

    def _new_connection(self, request: _Request) -> RawConnection:
        return RawConnection(self._address.host, self._address.port, timeout=request.deadline.left_s())

    def _exchange_raw(self, connection: RawConnection, request: _Request) -> Reply:
        is_reusable = True
        try:
            if connection.sock is None:
                connection.connect()
            head, buffer, begin, end = connection.ask(self._head_of(request), request.body, request.deadline)
            usual = parse_usual(head)
            received = memoryview(buffer)
            if usual is None:
                parsed, keeps_alive = self._parsed(connection, request, bytes(received[:end]))
                reply = self._exchange_parsed(parsed, request)
                # Whether nothing came behind the body: `http.client` reads ahead. Of chunks it is not known.
                body_bytes = -1 if parsed.length is None else parsed.length
                is_reusable = keeps_alive and connection.parsed_bytes() == begin + body_bytes
            else:
                headers, length = usual
                check_length(length, request.max_bytes)
                body = read_body(connection, length, received[begin:end], request.deadline, self._buffers)
                reply = Reply(status=200, headers=headers, body=body, content=request.read(body))
        except BaseException:
            # KeyboardInterrupt too: half a reply may still arrive on this connection, so it cannot be used again.
            connection.close()
            raise
        if is_reusable:
            self._idle.append(connection)
        else:
            connection.close()
        return reply

    def _exchange_parsed(self, parsed: ParsedReply, request: _Request) -> Reply:
        limit = request.max_bytes if parsed.status == 200 else MAX_ERROR_BYTES
        # Not closed on success: the caller keeps a raw connection, and urllib3 takes its own back at the body's end.
        try:
            body = parsed.read_whole(limit, request.deadline)
            content = request.read(body) if parsed.status == 200 else None
        except BaseException:
            parsed.close()
            raise
        return Reply(status=parsed.status, headers=parsed.headers, body=body, content=content)

    def _open_raw(self, request: _Request) -> ReplyStream:
        # Never an idle connection, which the server may have closed: a streaming request is sent only once.
        connection = self._new_connection(request)
        try:
            connection.connect()
            head, buffer, begin, end = connection.ask(self._head_of(request), None, request.deadline)
            usual = parse_usual(head)
            if usual is None:
                return self._parsed(connection, request, bytes(memoryview(buffer)[:end]))[0]
        except BaseException:
            connection.close()
            raise
        headers, length = usual
        return RawStream(
            status=200,
            headers=headers,
            length=length,
            timeout_s=self._timeout_s,
            buffers=self._buffers,
            close=connection.close,
            connection=connection,
            received=memoryview(bytes(buffer[begin:end])),
        )

    def _parsed(self, connection: RawConnection, request: _Request, received: bytes) -> tuple[ParsedReply, bool]:
        """Let `http.client` parse an unusual reply; also return whether the server keeps the connection."""
        connection.use_timeout(request.deadline.left_s())
        response = connection.parse_unusual(request.method, received)
        parsed = ParsedReply(
            status=response.status,
            headers={name.lower(): value for name, value in response.getheaders()},
            length=response.length,
            timeout_s=self._timeout_s,
            buffers=self._buffers,
            close=connection.close,
            chunked=response.chunked,
            read_once=response.read1,
            set_timeout=connection.use_timeout,
        )
        return parsed, not response.will_close

    def _send_pooled(self, request: _Request) -> ParsedReply:
        self._forget_after_fork()
        if self._pool is None:
            # Imported only here: importing urllib3 takes 150 ms, and trainers on plain http never need it.
            from softlabels_client.http.connection_pool import ConnectionPool

            self._pool = ConnectionPool(proxy=self._proxy, timeout_s=self._timeout_s, buffers=self._buffers)
        url = self._address.base_url.removesuffix(self._address.prefix) + request.target
        return self._pool.send(
            request.method, url, body=request.body, headers=request.headers, deadline=request.deadline
        )

    def _head_of(self, request: _Request) -> bytes:
        """Return the bytes before a request's body; cached, since they are equal for every batch of an epoch."""
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

    def _forget_after_fork(self) -> None:
        if self._process != os.getpid():
            # The parent still uses these sockets; closing the child's copies leaves the parent's open.
            self.close()
            self._process = os.getpid()
