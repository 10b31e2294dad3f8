"""The same rows from Redis: a server of its own with every row under its id, and MGET over a socket.

The client is as lean as one can be: it knows how long each value is, so that a reply is read into one buffer and seen
as an array without a look at any byte between.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.serve_peers import gathered, read_exactly
from softlabels.store import LocalRows

_ROWS_AT_ONCE = 1_000
_START_S = 20.0


def is_there() -> bool:
    """Whether redis-server can be run; installed from Debian where root may do that."""
    if shutil.which("redis-server") is None and shutil.which("apt-get") is not None and os.geteuid() == 0:
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "redis-server"]
        subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return shutil.which("redis-server") is not None


@contextmanager
def redis(store: Path) -> Iterator[str]:
    """Where a Redis listens that holds the targets of a store, each row under the eight bytes of its id."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    options = [
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--appendonly",
        "no",
        "--dir",
        str(store.parent),
    ]
    server = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
    try:
        with _connected(port, server) as connection:
            _fill(connection, LocalRows(store))
        yield f"127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def ask_redis(connection: socket.socket, row_bytes: int) -> Callable[[NDArray[np.int64]], int]:
    """Asks for rows by id; returns how many bytes of rows came."""
    before = b"$%d\r\n" % row_bytes
    stride = len(before) + row_bytes + 2
    buffers: dict[int, NDArray[np.uint8]] = {}

    def ask(ids: NDArray[np.int64]) -> int:
        count = len(ids)
        head = b"*%d\r\n" % count
        buffer = buffers.setdefault(count, np.empty(len(head) + count * stride, dtype=np.uint8))
        keys = ids.tobytes()
        words = (b"$8\r\n%b\r\n" % keys[place : place + 8] for place in range(0, len(keys), 8))
        connection.sendall(b"*%d\r\n$4\r\nMGET\r\n%b" % (count + 1, b"".join(words)))
        read_exactly(connection, buffer.data)
        found = buffer[len(head) :].reshape(count, stride)[:, len(before) : -2]
        return found.nbytes

    return ask


def _connected(port: int, server: subprocess.Popen[bytes]) -> socket.socket:
    give_up = time.monotonic() + _START_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError:
            if time.monotonic() > give_up or server.poll() is not None:
                raise
            time.sleep(0.05)


def _fill(connection: socket.socket, rows: LocalRows) -> None:
    for first in range(0, rows.manifest.samples, _ROWS_AT_ONCE):
        positions = np.arange(first, min(first + _ROWS_AT_ONCE, rows.manifest.samples), dtype=np.int64)
        found = gathered(rows, positions)
        words = [b"*%d\r\n$4\r\nMSET\r\n" % (2 * len(positions) + 1)]
        for key, row in zip(positions, found, strict=True):
            value = row.tobytes()
            words.append(b"$8\r\n%b\r\n$%d\r\n%b\r\n" % (key.tobytes(), len(value), value))
        connection.sendall(b"".join(words))
        answer = connection.recv(64)
        if answer != b"+OK\r\n":
            raise RuntimeError(f"Redis did not take the rows: {answer!r}")
