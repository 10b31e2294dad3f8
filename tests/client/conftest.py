"""A peer that answers as badly as it is told to, and what a student of the tiny store learns from."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pytest
from numpy.typing import NDArray

from softlabels import wire
from softlabels.audit import Audit
from softlabels.encodings import make_encoding
from softlabels.manifest import IdSpec, TeacherSpec, TemperatureSpec, TransferSetSpec
from softlabels.row_sums import crc32c
from softlabels.store import LocalRows, StoreWriter, plan_store
from softlabels.transfer_set import ArrayTransferSet, sample_fingerprints
from softlabels_client import RetryPolicy


@dataclass(frozen=True)
class Asked:
    """One request as the peer got it; `connection` counts from 1."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes
    connection: int


Act = Callable[[socket.socket, Asked], bool]
"""What the peer does with a request; True keeps the connection open."""

Change = Callable[[dict[str, NDArray[Any]], dict[str, str]], None]
"""What a lying server does to the arrays and metadata of a reply."""


@dataclass
class Peer:
    """Answers the n-th request by the n-th act, and every later one by the last."""

    url: str
    acts: list[Act] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)

    def next_act(self, asked: Asked) -> Act:
        """The act for a request, which is noted."""
        self.asked.append(asked)
        return self.acts[min(len(self.asked), len(self.acts)) - 1]

    @staticmethod
    def whole(status: int, body: bytes, **headers: str) -> Act:
        """A well-formed answer; `Retry_After="1"` is a header."""

        def act(connection: socket.socket, asked: Asked) -> bool:
            lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
            head = "\r\n".join([f"HTTP/1.1 {status} Said", f"Content-Length: {len(body)}", *lines, "", ""])
            connection.sendall(head.encode() + body)
            return True

        return act

    @staticmethod
    def raw(answer: bytes) -> Act:
        """These bytes, then the end of the connection."""

        def act(connection: socket.socket, asked: Asked) -> bool:
            connection.sendall(answer)
            return False

        return act

    @staticmethod
    def closing(act: Act) -> Act:
        """The same answer, and then the end of the connection, of which the answer says nothing."""

        def acting(connection: socket.socket, asked: Asked) -> bool:
            act(connection, asked)
            return False

        return acting

    @staticmethod
    def hang_up(connection: socket.socket, asked: Asked) -> bool:
        """The end of the connection instead of an answer."""
        return False

    @staticmethod
    def reset(connection: socket.socket, asked: Asked) -> bool:
        """A reset instead of an answer."""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    @staticmethod
    def stall(connection: socket.socket, asked: Asked) -> bool:
        """No answer for as long as anybody waits."""
        connection.recv(1)
        return False

    @staticmethod
    def drip(connection: socket.socket, asked: Asked) -> bool:
        """A byte every 20 ms: each read succeeds, the whole would take half an hour."""
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while True:
            connection.sendall(b"x")
            time.sleep(0.02)


@pytest.fixture
def peer() -> Iterator[Peer]:
    """A peer on a port of its own."""
    listener = socket.create_server(("127.0.0.1", 0))
    scripted = Peer(url=f"http://127.0.0.1:{listener.getsockname()[1]}")
    connections: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connections.append(listener.accept()[0])
                threads.append(threading.Thread(target=_talk, args=(connections[-1], scripted, len(connections))))
                threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    yield scripted
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    accepting.join()
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join()


def _talk(connection: socket.socket, peer: Peer, number: int) -> None:
    # ValueError: what came is no HTTP, for instance the beginning of a TLS handshake.
    with connection, connection.makefile("rb") as incoming, contextlib.suppress(OSError, ValueError):
        while first := incoming.readline():
            method, target, _ = first.decode().split(" ", 2)
            headers = {}
            while (line := incoming.readline().decode().strip()) != "":
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            body = incoming.read(int(headers.get("content-length", "0")))
            asked = Asked(method, target, headers, body, number)
            if not peer.next_act(asked)(connection, asked):
                return


@dataclass(frozen=True)
class Impostor:
    """Answers for the tiny store as its server would, changed as a test likes."""

    rows: LocalRows

    def describe(self, **changes: Any) -> Act:
        """The store's description."""
        document = {"digest": self.rows.digest, "manifest": self.rows.manifest.to_json()}
        return Peer.whole(200, json.dumps({**document, **changes}).encode(), Content_Type="application/json")

    def batch(self, change: Change | None = None) -> Act:
        """The batch that was asked for, with `change` made to it."""

        def act(connection: socket.socket, asked: Asked) -> bool:
            query = dict(parse_qsl(urlsplit(asked.target).query))
            blob = self.blob(np.frombuffer(asked.body, "<i8"), change, fields=query["fields"].split(","))
            return Peer.whole(200, blob, Content_Type=wire.MEDIA_TYPE)(connection, asked)

        return act

    def blob(
        self,
        ids: NDArray[np.int64],
        change: Change | None = None,
        *,
        fields: Iterable[str] = ("targets", "labels", "ids"),
    ) -> bytes:
        """A reply's body for these ids, with the checksum of what it holds."""
        arrays = self.rows.fetch(ids, ("targets", "labels", "fingerprints", "ids"))
        metadata = {"digest": self.rows.digest}
        if change is not None:
            change(arrays, metadata)
        question = wire.batch_question(self.rows.digest, columns=["ids"], fields=fields)
        return wire.to_bytes(arrays, metadata, question=crc32c(wire.column_bytes(ids), question))


@pytest.fixture
def impostor(tiny_store: Path) -> Impostor:
    """Somebody who poses as the tiny store's server."""
    return Impostor(LocalRows(tiny_store))


@pytest.fixture(scope="session")
def quick() -> RetryPolicy:
    """Retries that do not make a test wait."""
    return RetryPolicy(first_pause_s=0.01, longest_pause_s=0.02)


@pytest.fixture(scope="session")
def tiny_inputs() -> ArrayTransferSet:
    """The inputs that the tiny store's targets were computed for, without labels of their own."""
    return ArrayTransferSet("noise", np.random.default_rng(7).normal(size=(200, 4)).astype(np.float32))


Serve = Callable[..., str]
"""`serve(folder, *options)` starts `softlabels serve` in a process of its own and returns its address."""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Servers over folders of a test's own; they end with it. `serve.processes` are there to be killed."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(folder: Path, *options: str) -> str:
        log = tmp_path / f"server-{len(processes)}.log"
        with log.open("wb") as output:
            command = [sys.executable, "-m", "softlabels", "serve", str(folder), *(options or ("--port", "0"))]
            processes.append(subprocess.Popen(command, stdout=output, stderr=output))
        give_up = time.monotonic() + 60
        while time.monotonic() < give_up and processes[-1].poll() is None:
            if found := re.search(r" at (http://\S+)", log.read_text()):
                return found.group(1)
            time.sleep(0.05)
        pytest.fail(f"the server did not start:\n{log.read_text()}")

    start.processes = processes  # type: ignore[attr-defined]
    yield start
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait(timeout=20)


MakeStore = Callable[..., Path]
"""`make_store(root, transfer_set, ...)` writes a finished store for a transfer set and returns its folder."""


@pytest.fixture(scope="session")
def make_store() -> MakeStore:
    """Writes small finished stores with the real writer."""

    def make(
        root: Path,
        transfer_set: ArrayTransferSet,
        logits_BC: NDArray[np.float32],
        *,
        encoding: str = "f32",
        temperature: TemperatureSpec | None = None,
    ) -> Path:
        samples = transfer_set.take(np.arange(len(transfer_set)))
        kind = "str" if samples.ids.dtype.kind == "U" else "int"
        rows = make_encoding(encoding, classes=logits_BC.shape[1])
        plan = plan_store(
            name=root.name,
            samples=len(transfer_set),
            ids=IdSpec(kind=kind, width_bytes=16 if kind == "str" else 0),
            encoding=rows,
            temperature=temperature or TemperatureSpec(default=2.0, captured=1.0, locked=False),
            mean="none",
            teachers=(
                TeacherSpec(name="made", model="m:f", arguments={}, weights=None, weights_sha256=None, weight=1.0),
            ),
            transfer_set=TransferSetSpec(
                name=transfer_set.name, source="m:g", arguments={}, labelled=samples.labels is not None
            ),
        )
        writer = StoreWriter.create(root, plan)
        for shard in writer.missing_shards():
            with writer.claim(shard) as claim:
                part = slice(claim.rows.start, claim.rows.stop)
                shifted = logits_BC[part] - logits_BC[part].max(axis=1, keepdims=True)
                audit = Audit((1.0,))
                audit.add(shifted, rows.decode(rows.encode(shifted)), captured=plan.temperature.captured)
                claim.commit(
                    ids=samples.ids[part],
                    encoded=rows.encode(shifted),
                    fingerprints=sample_fingerprints(samples.inputs[part]),
                    labels=None if samples.labels is None else samples.labels[part],
                    audit=audit.to_json(),
                )
        writer.finish()
        return root

    return make
