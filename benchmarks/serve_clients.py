"""One client process of the serving benchmark, controlled by lines on its standard input.

    python -m benchmarks.serve_clients KIND ADDRESS SAMPLES ROW_BYTES BATCH

KIND is ours, ours_decoded, ours_epoch, tcp, tcp_epoch, flight, flight_epoch or redis. A line
`SECONDS` makes it ask for that long, one with an epoch's number makes it read that epoch; it answers with a line of
JSON: batches, bytes, seconds, latencies.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.serve_peers import FIELD, IN_ORDER, read_exactly
from benchmarks.serve_redis import ask_redis

Ask = Callable[[NDArray[np.int64]], int]
"""Asks for the rows of these ids; returns how many bytes of rows came."""

Stream = Callable[[int], Iterator[int]]
"""Asks for an epoch; yields the bytes of rows of each batch as it comes."""


def ours(address: str) -> Ask:
    """The public client; encoded rows, as a student's device decodes them."""
    import softlabels

    store = softlabels.open(address)
    return lambda ids: sum(array.nbytes for array in store.batch(ids, labels=False).encoded.values())


def ours_decoded(address: str) -> Ask:
    """The public client, rows decoded to float32 by NumPy."""
    import softlabels

    store = softlabels.open(address)
    return lambda ids: store.batch(ids, labels=False).logits().nbytes


def ours_epoch(address: str, batch: int) -> Stream:
    """The public client's epoch stream."""
    import softlabels

    store = softlabels.open(address)

    def stream(epoch: int) -> Iterator[int]:
        shuffle = epoch != IN_ORDER
        for targets in store.epoch(seed=0, epoch=max(epoch, 0), batch_size=batch, shuffle=shuffle, labels=False):
            yield sum(array.nbytes for array in targets.encoded.values())

    return stream


def _connect(address: str) -> socket.socket:
    host, port = address.split(":")
    connection = socket.create_connection((host, int(port)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def tcp(address: str, row_bytes: int) -> Ask:
    """A bare socket into one buffer that is used again."""
    connection = _connect(address)
    buffers: dict[int, memoryview] = {}

    def ask(ids: NDArray[np.int64]) -> int:
        size = len(ids) * row_bytes
        buffer = buffers.setdefault(size, memoryview(bytearray(size)))
        connection.sendall(np.concatenate([[len(ids), 0], ids]).tobytes())
        read_exactly(connection, buffer)
        return size

    return ask


def tcp_epoch(address: str, row_bytes: int, samples: int, batch: int) -> Stream:
    """A bare socket, a batch at a time into one buffer that is used again."""
    connection = _connect(address)
    buffer = memoryview(bytearray(batch * row_bytes))

    def stream(epoch: int) -> Iterator[int]:
        connection.sendall(np.array([1, batch, epoch]).tobytes())
        for first in range(0, samples, batch):
            size = min(batch, samples - first) * row_bytes
            read_exactly(connection, buffer[:size])
            yield size

    return stream


def _rows_of(batch: Any) -> NDArray[Any]:
    column = batch.column(FIELD)
    values = column.values.to_numpy(zero_copy_only=True)
    return values.reshape(len(column), -1)


def flight(address: str) -> Ask:
    """Arrow Flight's client, the rows as NumPy sees them without a copy."""
    from pyarrow import flight as pf

    client = pf.FlightClient(f"grpc://{address}")

    def ask(ids: NDArray[np.int64]) -> int:
        ticket = pf.Ticket(np.concatenate([[len(ids), 0], ids]).tobytes())
        return sum(_rows_of(chunk.data).nbytes for chunk in client.do_get(ticket))

    return ask


def flight_epoch(address: str, batch: int) -> Stream:
    """Arrow Flight's client over one stream of record batches."""
    from pyarrow import flight as pf

    client = pf.FlightClient(f"grpc://{address}")

    def stream(epoch: int) -> Iterator[int]:
        for chunk in client.do_get(pf.Ticket(np.array([1, batch, epoch]).tobytes())):
            yield _rows_of(chunk.data).nbytes

    return stream


def ask_for(seconds: float, ask: Ask, samples: int, batch: int, rng: np.random.Generator) -> dict[str, Any]:
    """Ask for random batches until the time is up."""
    chosen = rng.integers(0, samples, size=(512, batch))
    latencies: list[float] = []
    size = 0
    began = now = time.perf_counter()
    while now - began < seconds:
        size += ask(chosen[len(latencies) % len(chosen)])
        then, now = now, time.perf_counter()
        latencies.append(now - then)
    p50, p99 = np.percentile(latencies, [50, 99])
    return {
        "batches": len(latencies),
        "bytes": size,
        "seconds": now - began,
        "p50_us": p50 * 1e6,
        "p99_us": p99 * 1e6,
    }


def stream_once(stream: Stream, epoch: int) -> dict[str, Any]:
    """One whole epoch."""
    began = time.perf_counter()
    sizes = list(stream(epoch))
    return {"batches": len(sizes), "bytes": sum(sizes), "seconds": time.perf_counter() - began}


def main(kind: str, address: str, samples: int, row_bytes: int, batch: int) -> None:
    """Serve the lines on standard input."""
    rng = np.random.default_rng()
    asks = {"ours": ours, "ours_decoded": ours_decoded, "flight": flight}
    streams = {"ours_epoch": ours_epoch, "flight_epoch": flight_epoch}
    stream, ask = None, None
    if kind == "tcp":
        ask = tcp(address, row_bytes)
    elif kind == "redis":
        ask = ask_redis(_connect(address), row_bytes)
    elif kind == "tcp_epoch":
        stream = tcp_epoch(address, row_bytes, samples, batch)
    elif kind in asks:
        ask = asks[kind](address)
    else:
        stream = streams[kind](address, batch)
    print("ready", flush=True)
    for line in sys.stdin:
        if stream is not None:
            found = stream_once(stream, int(line))
        else:
            assert ask is not None
            found = ask_for(float(line), ask, samples, batch, rng)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]))
