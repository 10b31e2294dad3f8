"""Does the server's memory stay flat, over many requests and with a thousand readers who do not read?

    python -m benchmarks.serve_memory FOLDER [REQUESTS]

FOLDER holds what `bench_serve` made. Prints the server's resident memory, in MB, as it goes.
"""

from __future__ import annotations

import re
import resource
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

import softlabels
from benchmarks.bench_serve import first_line, process

READERS = 1000


def resident_mb(pid: int) -> float:
    """What the server holds that is its own: mapped files, which the system can drop at any time, do not count."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found.group(1)) / 1024


def main(folder: str, requests: int) -> None:
    """Ask, then hold a thousand streams open, then ask again."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with ExitStack() as stack:
        server = stack.enter_context(process("softlabels", "serve", folder, "--port", "0"))
        found = re.search(r"http://([\d.]+):(\d+)", first_line(server))
        assert found is not None
        host, port = found.group(1), int(found.group(2))
        store = softlabels.open(f"http://{host}:{port}/w3")
        ids = np.random.default_rng(0).integers(0, len(store), size=(64, 256))
        for number in range(requests):
            store.batch(ids[number % 64])
            if number in (1000, requests // 2, requests - 1):
                print(f"after {number + 1} requests: {resident_mb(server.pid):.1f} MB", flush=True)
        head = b"GET /v1/stores/w1/epochs/0?seed=0&batch_size=1024 HTTP/1.1\r\nHost: x\r\n\r\n"
        readers = []
        began = time.monotonic()
        for number in range(READERS):
            reader = stack.enter_context(socket.create_connection((host, port)))
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.sendall(head)
            readers.append(reader)
            if number in (99, READERS - 1):
                time.sleep(3)
                print(f"with {number + 1} readers who do not read: {resident_mb(server.pid):.1f} MB", flush=True)
        for _ in range(3):
            for reader in readers:
                reader.recv(1 << 16)
            store.batch(ids[0])
        took_s = time.monotonic() - began
        print(f"after a trickle to each: {resident_mb(server.pid):.1f} MB, {took_s:.0f} s", flush=True)
        for reader in readers:
            reader.close()
        time.sleep(3)
        for number in range(1000):
            store.batch(ids[number % 64])
        print(f"when they are gone: {resident_mb(server.pid):.1f} MB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 100_000)
