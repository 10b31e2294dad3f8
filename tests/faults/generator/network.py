"""A proxy between client and server that changes, replaces or repeats chosen requests and replies, byte by byte."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

_READ_BYTES = 1 << 16
UPSTREAM_TIMEOUT_S = 0.5
"""A request whose length was changed may never be answered; the server itself would wait longer."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """A whole request or reply, as it travels."""

    head: bytes
    body: bytes

    @property
    def raw(self) -> bytes:
        """Every byte of it."""
        return self.head + self.body


def kind_of(target: str) -> str:
    """Return which route a request is for."""
    path = target.partition("?")[0]
    if path.endswith("/batch"):
        return "batch"
    if "/epochs/" in path:
        return "epoch"
    if path.endswith("/constants"):
        return "constants"
    return "list" if path.rstrip("/").endswith("/v1/stores") else "description"


Change = Callable[[Message], list[bytes] | None]
"""Returns what is sent instead, piece by piece, or None to end the connection."""


@dataclass(kw_only=True)
class Tampering:
    """What the proxy does.

    Attributes:
        port: port of the server that requests go to.
        layer: "request: batch", "reply: epoch", …
        change: what happens to a message of this layer; None for nothing.
        skip: this many messages of the layer pass first.
        most: this many are changed, then the rest passes; None for all.
        seen: messages of the layer so far.
        done: messages changed so far.
        replies: every reply that passed, by route, for replays.
        requests: the latest request, by route.
    """

    port: int
    layer: str = ""
    change: Change | None = None
    skip: int = 0
    most: int | None = None
    seen: int = 0
    done: int = 0
    replies: dict[str, list[Message]] = field(default_factory=dict)
    requests: dict[str, Message] = field(default_factory=dict)

    def of(self, layer: str, message: Message) -> list[bytes] | None:
        """Return what becomes of a message."""
        if layer != self.layer or self.change is None:
            return [message.raw]
        self.seen += 1
        if self.seen <= self.skip or (self.most is not None and self.done >= self.most):
            return [message.raw]
        sent = self.change(message)
        if sent != [message.raw]:
            self.done += 1
        return sent


class Proxy:
    """Passes whole HTTP messages on, through a `Tampering` that may be replaced at any time."""

    def __init__(self) -> None:
        self.tampering = Tampering(port=0)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """End every connection."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """End the connections that are open now."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        self._open.add(near)
        far: socket.socket | None = None
        port = None
        waiting = b""
        try:
            with near:
                while True:
                    request, waiting = read_message(near, waiting)
                    if request is None:
                        return
                    tampering = self.tampering
                    if far is None or port != tampering.port:
                        if far is not None:
                            far.close()
                        far = socket.create_connection(("127.0.0.1", tampering.port), timeout=5)
                        far.settimeout(UPSTREAM_TIMEOUT_S)
                        port = tampering.port
                    if not self._exchange(near, far, request, tampering):
                        return
        except (OSError, ValueError):
            return
        finally:
            self._open.discard(near)
            if far is not None:
                far.close()

    def _exchange(self, near: socket.socket, far: socket.socket, request: Message, tampering: Tampering) -> bool:
        kind = kind_of(request.head.split(b" ", 2)[1].decode("latin-1"))
        tampering.requests[kind] = request
        sent = tampering.of(f"request: {kind}", request)
        if sent is None:
            return False
        for piece in sent:
            far.sendall(piece)
        changed = sent != [request.raw]
        reply, rest = read_message(far, b"", timed=changed)
        if reply is None:
            return False
        tampering.replies.setdefault(kind, []).append(reply)
        pieces = tampering.of(f"reply: {kind}", reply)
        if pieces is None:
            return False
        for piece in pieces:
            near.sendall(piece)
        # A reply of another length, or bytes after it, leave the connection out of step: the peer has to notice.
        short = sum(map(len, pieces)) < len(reply.raw)
        return not short and not changed and not rest


def read_message(connection: socket.socket, waiting: bytes, *, timed: bool = False) -> tuple[Message | None, bytes]:
    """Read a request or reply with a Content-Length; return it and what came after it. None at the end."""
    if not timed and connection.gettimeout() is not None:
        connection.settimeout(5.0)
    elif timed:
        connection.settimeout(UPSTREAM_TIMEOUT_S)
    while b"\r\n\r\n" not in waiting:
        piece = connection.recv(_READ_BYTES)
        if not piece:
            return None, b""
        waiting += piece
    head, _, waiting = waiting.partition(b"\r\n\r\n")
    found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    length = int(found[1]) if found else 0
    pieces, have = [waiting], len(waiting)
    while have < length:
        piece = connection.recv(min(_READ_BYTES, length - have))
        if not piece:
            break
        pieces.append(piece)
        have += len(piece)
    body = b"".join(pieces)
    return Message(head=head + b"\r\n\r\n", body=body[:length]), body[length:]
