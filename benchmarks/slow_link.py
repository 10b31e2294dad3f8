"""A slow link: a proxy that delays and throttles real TCP, and counts the requests.

    python -m benchmarks.slow_link PORT [--rtt-ms 50] [--mbit 100]

says on which port of its own it hands on to PORT.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

_PIECE_BYTES = 1 << 14
_QUESTION = re.compile(rb"(?:GET|POST) (\S+) HTTP/1\.1\r\n")


@dataclass(frozen=True, kw_only=True)
class Link:
    """What a link is like.

    Attributes:
        rtt_s: seconds there and back.
        bytes_per_s: in each direction, of all connections together.
    """

    rtt_s: float = 0.05
    bytes_per_s: float = 100e6 / 8


class SlowLink:
    """Hands bytes on between clients and a server, later and slower.

    Every byte leaves when the link is free, and arrives half a round trip later; what waits for the link, as in a
    router, is bounded, so a sender is slowed down as TCP does it. A connection takes a round trip to be made.

    Args:
        port: of the server, on this machine.
        link: what it is like.
    """

    def __init__(self, port: int, link: Link) -> None:
        self.questions: list[str] = []
        self._target, self._link = port, link
        self._up, self._down = _Lane(link), _Lane(link)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> SlowLink:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End every connection."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for connection in self._open:
            connection.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection(("127.0.0.1", self._target))
                self._open += [near, far]
                self._hand_on(near, far, self._up, after_s=time.monotonic() + self._link.rtt_s)
                self._hand_on(far, near, self._down, after_s=0.0)

    def _hand_on(self, source: socket.socket, sink: socket.socket, lane: _Lane, *, after_s: float) -> None:
        flight = _Flight(lane, after_s)
        for target, end in ((self._take_off, source), (self._land, sink)):
            self._threads.append(threading.Thread(target=target, args=(end, flight)))
            self._threads[-1].start()

    def _take_off(self, source: socket.socket, flight: _Flight) -> None:
        data = b"-"
        with contextlib.suppress(OSError):
            while data:
                data = source.recv(_PIECE_BYTES)
                if flight.lane is self._up:
                    self.questions += [target.decode() for target in _QUESTION.findall(data)]
                flight.begin(data)
        flight.begin(b"")

    def _land(self, sink: socket.socket, flight: _Flight) -> None:
        with contextlib.suppress(OSError):
            while data := flight.end():
                sink.sendall(data)
        flight.give_up()
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


class _Lane:
    """One direction of the link, which all connections share: when will the next byte be through?"""

    def __init__(self, link: Link) -> None:
        self.link = link
        self._free_s = 0.0
        self._turn = threading.Lock()

    def through_at(self, size_bytes: int) -> float:
        """When the last of so many bytes has left, if they queue up now."""
        with self._turn:
            self._free_s = max(self._free_s, time.monotonic()) + size_bytes / self.link.bytes_per_s
            return self._free_s


class _Flight:
    """The bytes of one connection in one direction that are under way."""

    def __init__(self, lane: _Lane, after_s: float) -> None:
        self.lane = lane
        self._after_s = after_s
        self._pieces: deque[tuple[float, bytes]] = deque()
        self._bytes = 0
        # What the link itself holds, and as much again in the router before it.
        self._most_bytes = 2 * int(lane.link.bytes_per_s * lane.link.rtt_s) + 4 * _PIECE_BYTES
        self._changed = threading.Condition()
        self._given_up = False

    def begin(self, data: bytes) -> None:
        """Send a piece off; waits while too much is under way. An empty one is the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._bytes < self._most_bytes or self._given_up)
        lands_s = max(self.lane.through_at(len(data)), self._after_s) + self.lane.link.rtt_s / 2
        with self._changed:
            self._pieces.append((lands_s, data))
            self._bytes += len(data)
            self._changed.notify_all()

    def end(self) -> bytes:
        """The next piece, when it lands."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._pieces))
            lands_s, data = self._pieces[0]
        time.sleep(max(0.0, lands_s - time.monotonic()))
        with self._changed:
            self._pieces.popleft()
            self._bytes -= len(data)
            self._changed.notify_all()
        return data

    def give_up(self) -> None:
        """Nobody takes the rest."""
        with self._changed:
            self._given_up = True
            self._changed.notify_all()


@contextlib.contextmanager
def bare_server(size_bytes: int) -> Iterator[int]:
    """A bare socket that sends so many bytes to whoever connects and says a byte; its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = listener.accept()[0]
                with connection, contextlib.suppress(OSError):
                    connection.recv(1)
                    connection.sendall(bytes(size_bytes))

    server = threading.Thread(target=serve)
    server.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    server.join()


def bare_bytes_per_s(port: int, size_bytes: int) -> float:
    """What a bare socket gets from a `bare_server` by this port: from its connection to its last byte."""
    buffer = bytearray(1 << 20)
    begun_s = time.monotonic()
    with socket.create_connection(("127.0.0.1", port)) as near:
        near.sendall(b"?")
        left = size_bytes
        while left:
            count = near.recv_into(buffer)
            if not count:
                raise ConnectionError("the bare socket's link broke")
            left -= count
    return size_bytes / (time.monotonic() - begun_s)


def main() -> int:
    """Hand on until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("--rtt-ms", type=float, default=50.0)
    parser.add_argument("--mbit", type=float, default=100.0)
    options = parser.parse_args()
    with SlowLink(options.port, Link(rtt_s=options.rtt_ms / 1e3, bytes_per_s=options.mbit * 1e6 / 8)) as link:
        print(link.port, flush=True)
        with contextlib.suppress(EOFError):
            while True:
                input()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
