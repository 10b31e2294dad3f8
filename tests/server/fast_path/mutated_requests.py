"""Requests changed at random, sent to two servers of the same stores of which one has a fast path: replies must agree.

Both servers are real: uvicorn's protocol, event loop and connections, and the application. They run in the loop of the
caller, so that each segment of a request is received by both as it was cut, and a comparison needs no timeouts.
"""

from __future__ import annotations

import array
import asyncio
import fcntl
import logging
import random
import socket
import struct
import termios
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from softlabels_server import Settings, StoreFolder, create_app
from softlabels_server.process.server import make_server

TOKEN = "s3cret-of-the-test"

IDS = 100
"""Sample ids of the store `dense` are 0 to 99."""


class KeptPlans(dict[bytes, Any]):
    """The plans of a server, which counts how often one is found."""

    found = 0

    def get(self, key: bytes, default: Any = None) -> Any:
        """Return the plan of a head, or the default."""
        self.found += key in self
        return super().get(key, default)


class NoPlans(dict[bytes, Any]):
    """Plans of a server without a fast path: none is kept."""

    def __setitem__(self, key: bytes, value: Any) -> None:
        pass


@dataclass
class Connection:
    """One connection to a server in this loop.

    Attributes:
        client_end: socket of the client.
        server_end, protocol: socket and protocol of the server.
        received: what the server has sent.
    """

    client_end: socket.socket
    server_end: socket.socket
    protocol: Any
    received: bytearray

    async def send(self, data: bytes) -> None:
        """Send one segment, and return when the server has done with it all that it can."""
        try:
            self.client_end.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return  # the server has closed
        while not self._is_quiet():
            self._receive()
            await asyncio.sleep(0)
        self._receive()

    async def close(self) -> bytes:
        """Close the connection; return all that the server sent."""
        self._receive()
        self.client_end.close()
        while self.protocol.parser is not None or any(not task.done() for task in self.protocol.tasks):
            await asyncio.sleep(0)
        return bytes(self.received)

    def _is_quiet(self) -> bool:
        """Whether the server has read everything, and answered it unless it waits for more of a body."""
        protocol, cycle = self.protocol, self.protocol.cycle
        if protocol.parser is None or protocol.transport.is_closing():
            return True
        unread = array.array("i", [0])
        fcntl.ioctl(self.server_end, termios.FIONREAD, unread)
        is_waiting = cycle is None or cycle.response_complete or (cycle.more_body and not cycle.body)
        return (
            unread[0] == 0 and is_waiting and not protocol.pipeline and not protocol.transport.get_write_buffer_size()
        )

    def _receive(self) -> None:
        try:
            while piece := self.client_end.recv(1 << 20, socket.MSG_DONTWAIT):
                self.received += piece
        except (BlockingIOError, ConnectionResetError):
            pass


class LoopServer:
    """A server of a folder in the running event loop; `plans` are those of its fast path."""

    def __init__(self, root: Path, plans: dict[bytes, Any]) -> None:
        settings = Settings(port=0, token=TOKEN, body_timeout_s=1000.0, header_timeout_s=1000.0)
        self.folder = StoreFolder(root)
        self._server = make_server(create_app(self.folder, settings), settings)
        self._config = self._server.config
        self._config.load()
        self._config.http_protocol_class.response_plans = plans  # type: ignore[attr-defined]
        self._server.server_state.default_headers = [(b"date", b"Tue, 01 Dec 2026 00:00:00 GMT")]

    async def connect(self) -> Connection:
        """Open a connection."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        kind: Any = self._config.http_protocol_class
        made = partial(kind, config=self._config, server_state=self._server.server_state, app_state={})
        _, protocol = await asyncio.get_running_loop().connect_accepted_socket(made, theirs)
        return Connection(ours, theirs, protocol, bytearray())


class RequestMutator:
    """Makes connections: lists of segments, most of them changed from what clients send.

    Args:
        rng: everything is chosen with it, so that a seed gives the same connections again.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._of_holder: list[bytes] = []

    def of_holder(self) -> list[bytes]:
        """Return the segments of a connection of somebody who has the token."""
        rng = self._rng
        requests = []
        for _ in range(rng.choice((1, 1, 2))):
            head, body = self._changed(*self._well_formed(with_token=True))
            # Repeated, so that the first leaves a plan, if one may be kept, and the others are answered by it.
            requests += [head + body] * rng.choice((1, 2, 3))
        self._of_holder = requests
        return self._cut(requests)

    def of_stranger(self) -> list[bytes]:
        """Return the segments of a connection without the token, most of them after what its holder has just sent."""
        rng = self._rng
        requests = []
        for request in rng.choice((self._of_holder, self._of_holder[-1:], [])):
            # What the server may have taken for the head: everything up to the first empty line.
            head, _, rest = request.partition(b"\r\n\r\n")
            head = rng.choice((head, _without_line(head, b"authorization"))) + b"\r\n\r\n"
            head = head.replace(TOKEN.encode(), rng.choice((b"", b"x", TOKEN.encode()[:-1], b"s" * len(TOKEN))))
            requests.append(head + rng.choice((rest.replace(TOKEN.encode(), b""), self._ids(1), self._ids(8))))
        if not requests:
            requests = [b"".join(self._changed(*self._well_formed(with_token=False)))]
        return self._cut(requests)

    def _cut(self, requests: list[bytes]) -> list[bytes]:
        """Return a segment per request, or all requests in one, cut somewhere."""
        if self._rng.random() < 0.8:
            return [request for request in requests if request]
        joined = b"".join(requests)
        cut = self._rng.randrange(len(joined) + 1)
        return [part for part in (joined[:cut], joined[cut:]) if part]

    def _changed(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        for _ in range(self._rng.choice((0, 1, 1, 2, 3))):
            head, body = self._rng.choice(self._changes)(self, head, body)
        return head, body

    def _well_formed(self, *, with_token: bool) -> tuple[bytes, bytes]:
        rng = self._rng
        body, kind = self._ids(rng.choice((1, 8))), b"application/octet-stream"
        target = b"/v1/stores/dense/batch" + rng.choice((b"", b"?fields=targets,labels"))
        if rng.random() < 0.1:
            body, kind = b'{"ids": [%d, 3]}' % rng.randrange(IDS), b"application/json"
        lines = [b"POST %b HTTP/1.1" % target, b"Host: x", b"Content-Type: " + kind, b"Content-Length: %d" % len(body)]
        if with_token:
            lines.append(b"Authorization: Bearer " + TOKEN.encode())
        return b"\r\n".join(lines) + b"\r\n\r\n", body

    def _ids(self, count: int) -> bytes:
        return struct.pack(f"<{count}q", *(self._rng.randrange(IDS) for _ in range(count)))

    def _before(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        junk = (b"\r\n", b"\n", b"\r\n\r\n", b"\n\r\n\r\n", b" ", b"\0", b"\r\r\n", b"GET /health HTTP/1.1\r\n\r\n")
        return self._rng.choice(junk) + head, body

    def _header(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        """Add a header line anywhere, also before the request line or after the empty line."""
        length = len(body)
        line = self._rng.choice(
            (
                *(
                    b"Transfer-Encoding: " + value
                    for value in (b"chunked", b"gzip, chunked", b"identity", b" Chunked", b"x")
                ),
                *(b"Content-Length: %d" % value for value in (length, length + 8, max(0, length - 8), -1)),
                *(b"Content-Length: " + value for value in (b"08", b"8, 8", b"+8", b"0x8", b"")),
                *(b"Content-Type: " + kind for kind in (b"application/json", b"application/octet-stream", b"")),
                *(b"Authorization: " + value for value in (b"Bearer x", b"Bearer ", b"Basic eDp5", b"")),
                b"Connection: close",
                b"Connection: keep-alive",
                b"Connection: upgrade\r\nUpgrade: websocket",
                b"Upgrade: h2c",
                b"Expect: 100-continue",
                b"Content-Encoding: gzip",
                b"Host: y",
                b"Accept: application/json",
                b"Accept: */*",
                b"Trailer: Authorization",
                b"X-Folded: a\r\n b",
                b"X-Tab:\tb\t",
                b"X-Bad\0: 1",
                b"X Space: 1",
                b"X-Colon : 1",
                b"NoColon",
                b": empty",
            )
        )
        lines = head.split(b"\r\n")
        lines.insert(self._rng.randrange(len(lines)), line)
        return b"\r\n".join(lines), body

    def _line(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        """Drop, repeat, exchange or respell a line, or end it in another way."""
        rng = self._rng
        lines = head.split(b"\r\n")
        at = rng.randrange(max(1, len(lines) - 2))
        what = rng.randrange(6)
        if what == 0:
            del lines[at]
        elif what == 1:
            lines.insert(at, lines[at])
        elif what == 2:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        elif what == 3:
            lines[at] = rng.choice(
                (lines[at].upper(), lines[at].lower(), lines[at] + b" ", lines[at].replace(b": ", b":"))
            )
        else:
            end = rng.choice((b"\n", b"\r", b"\r\r\n", b"\n\n", b"\r\n ", b"\r\n\t", b"\0\r\n"))
            return b"\r\n".join(lines[: at + 1]) + end + b"\r\n".join(lines[at + 1 :]), body
        return b"\r\n".join(lines), body

    def _request_line(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        line, _, rest = head.partition(b"\r\n")
        old, new = self._rng.choice(
            (
                *((b"POST", method) for method in (b"GET", b"HEAD", b"PUT", b"post", b"OPTIONS", b"CONNECT", b"PRI")),
                *((b"HTTP/1.1", version) for version in (b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"http/1.1", b"")),
                (b"/v1", b"http://x/v1"),
                (b"/v1", b"//v1"),
                (b"/v1", b"/v1/../v1"),
                (b"dense", b"%64ense"),
                (b"dense", b"halves"),
                (b"dense", b"den\xc3\x9fe"),
                (b"batch", b"batch#x"),
                (b"batch", b"batch?"),
                (b"batch", b"batch?columns=ids"),
                (b" ", b"  "),
                (b" ", b"\t"),
            )
        )
        return line.replace(old, new, 1) + b"\r\n" + rest, body

    def _chunked(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        """Send the body in chunks, with or without the length, trailers and extensions."""
        rng = self._rng
        head = rng.choice((head, _without_line(head, b"content-length")))
        head = head.removesuffix(b"\r\n\r\n") + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
        extension = rng.choice((b"", b";x", b";" + b"y" * 9))
        trailer = rng.choice((b"", b"Content-Type: application/json\r\n", b"Host: z\r\n", b"Content-Length: 8\r\n"))
        return head, b"%x%b\r\n%b\r\n0\r\n%b\r\n" % (len(body), extension, body, trailer)

    def _body(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        """Make the body shorter, longer or another; or replace it by chunks that are as long."""
        rng = self._rng
        chunks = b"8;%b\r\n%b\r\n0\r\n\r\n" % (b"x" * 45, self._ids(1))  # 64 bytes, as eight ids
        bodies = (body[:-1], body + b"\0", body[:-8], body + self._ids(1), self._ids(8), b"", chunks)
        return head, rng.choice(bodies)

    def _bytes(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        """Change, insert or delete a byte of the head."""
        rng = self._rng
        at = rng.randrange(len(head)) if head else 0
        what = rng.randrange(3)
        new = b"" if what == 0 else bytes([rng.choice((0, 9, 10, 13, 32, 58, rng.randrange(256)))])
        return head[:at] + new + head[at + (what != 1) :], body

    _changes = (_before, _header, _header, _line, _request_line, _chunked, _body, _bytes)


def _without_line(head: bytes, name: bytes) -> bytes:
    return b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(name + b":"))


@dataclass(frozen=True)
class Comparison:
    """What was compared.

    Attributes:
        connections, requests: how many were sent to each server.
        answered: replies with rows.
        from_plans: how often the fast path had a plan for a head.
        plans: heads that have one at the end.
    """

    connections: int
    requests: int
    answered: int
    from_plans: int
    plans: int


async def compare(root: Path, *, seed: int, requests: int) -> Comparison:
    """Send mutated requests to a server with and one without the fast path, and compare all that they send.

    Raises:
        AssertionError: the replies differ, or rows were sent to somebody without the token.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it warns of each of thousands of bad requests
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    plans = KeptPlans()
    fast, slow = LoopServer(root, plans), LoopServer(root, NoPlans())
    for server in (fast, slow):
        server.folder.get("dense")
    await asyncio.sleep(1.1)  # a store just opened is taken for slow, and slow stores are not read in the event loop
    mutator = RequestMutator(random.Random(seed))
    sent = answered = number = 0
    while sent < requests:
        with_token = number % 2 == 0
        segments = mutator.of_holder() if with_token else mutator.of_stranger()
        replies = []
        for server in (fast, slow):
            connection = await server.connect()
            for segment in segments:
                await connection.send(segment)
            replies.append(await connection.close())
        assert with_token or TOKEN.encode() not in b"".join(segments)
        what = f"seed {seed}, connection {number}, with token: {with_token}: {segments}"
        assert replies[0] == replies[1], f"{what}\nfast path: {replies[0]!r}\napplication: {replies[1]!r}"
        rows = replies[0].count(b'"format":"softlabels-batch') + replies[0].count(b'"metadata": {"format"')
        assert with_token or rows == 0, f"rows without the token: {what}: {replies[0]!r}"
        assert b"incident" not in replies[0], f"an unexpected error: {what}: {replies[0]!r}"
        sent += len(segments)
        answered += rows
        number += 1
    for server in (fast, slow):
        server.folder.close()
    return Comparison(number, sent, answered, plans.found, len(plans))
