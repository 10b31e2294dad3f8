"""Serving rows without HTTP: a bare TCP socket and Arrow Flight over the same gather of the same store.

    python -m benchmarks.serve_peers tcp|flight STORE

Prints its port, then serves until it is ended. A request of the bare socket is two int64, count and batch size, and
the ids: with a batch size of 0 the rows of those ids come back; else the rows of all positions in the order of the
epoch named by the one id, a batch at a time. Nothing is checked, named or described: it is the floor that HTTP stands
on.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.order import EpochConfig
from softlabels.store import LocalRows

FIELD = "targets"
IN_ORDER = -1
"""Stands for the epoch in the store's own order."""


def gathered(rows: LocalRows, positions: NDArray[np.int64]) -> NDArray[Any]:
    """The same gather that softlabels serves from."""
    return rows.fetch_rows(positions, (FIELD,))[FIELD]


def epoch_batches(rows: LocalRows, epoch: int, batch_size: int) -> Iterator[NDArray[np.int64]]:
    """Positions of an epoch, a batch at a time."""
    config = EpochConfig(seed=0, epoch=max(epoch, 0), batch_size=batch_size, shuffle=epoch != IN_ORDER)
    for step in config.batches(rows.manifest, rows.digest):
        yield step.positions


def read_exactly(connection: socket.socket, buffer: memoryview) -> bool:
    """Fill a buffer; False where the peer closed instead."""
    while len(buffer):
        count = connection.recv_into(buffer, 0, socket.MSG_WAITALL)
        if not count:
            return False
        buffer = buffer[count:]
    return True


def answer(connection: socket.socket, rows: LocalRows) -> None:
    """Serve one connection."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    head = np.empty(2, dtype=np.int64)
    while read_exactly(connection, head.view(np.uint8).data):
        ids = np.empty(int(head[0]), dtype=np.int64)
        read_exactly(connection, ids.view(np.uint8).data)
        if head[1] == 0:
            connection.sendall(gathered(rows, ids))
            continue
        for positions in epoch_batches(rows, int(ids[0]), int(head[1])):
            connection.sendall(gathered(rows, positions))


def serve_tcp(rows: LocalRows) -> None:
    """One thread a connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            threading.Thread(target=answer, args=(listener.accept()[0], rows), daemon=True).start()


def serve_flight(rows: LocalRows) -> None:
    """Arrow Flight, the rows as fixed-size lists over the gathered memory."""
    import pyarrow as pa
    from pyarrow import flight

    def batch_of(positions: NDArray[np.int64]) -> Any:
        found = gathered(rows, positions)
        values = pa.array(found.reshape(-1))
        return pa.record_batch({FIELD: pa.FixedSizeListArray.from_arrays(values, found.shape[1])})

    class Server(flight.FlightServerBase):  # type: ignore[misc]
        """Tickets are what the bare socket is sent."""

        def do_get(self, context: Any, ticket: Any) -> Any:
            """Answer a ticket."""
            asked = np.frombuffer(ticket.ticket, dtype=np.int64)
            if asked[1] == 0:
                batch = batch_of(asked[2:])
                return flight.GeneratorStream(batch.schema, iter([batch]))
            batches = (batch_of(positions) for positions in epoch_batches(rows, int(asked[2]), int(asked[1])))
            first = next(batches)
            return flight.GeneratorStream(first.schema, _chain(first, batches))

    server = Server("grpc://127.0.0.1:0")
    print(server.port, flush=True)
    server.serve()


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


if __name__ == "__main__":
    {"tcp": serve_tcp, "flight": serve_flight}[sys.argv[1]](LocalRows(Path(sys.argv[2])))
