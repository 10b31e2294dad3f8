"""Fixtures of the server's tests: stores of every kind, an app running in a thread, and a client for it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import pytest
import urllib3
from fastapi import FastAPI
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load

from softlabels import wire
from softlabels.audit import Audit
from softlabels.encodings import make_encoding
from softlabels.ids import IdArray, id_kind
from softlabels.manifest import IdSpec, Manifest, TemperatureSpec, TransferSetSpec
from softlabels.row_sums import crc32c
from softlabels.store import StoreWriter, plan_store
from softlabels.transfer_set import sample_fingerprints
from softlabels_server import Settings, StoreFolder, create_app
from softlabels_server.process.server import listen, make_server, url_of

ROWS, CLASSES, SHARD = 100, 7, 32


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What a test store is made of, for comparison."""

    ids: IdArray
    logits_BC: NDArray[np.float32]
    labels: NDArray[np.int64]
    fingerprints: NDArray[np.uint8]


def make_rows(seed: int = 0, *, ids: IdArray | None = None) -> Rows:
    """Random rows whose largest logit is 0; every fifth is unlabelled."""
    rng = np.random.default_rng(seed)
    logits_BC = rng.normal(size=(ROWS, CLASSES)).astype(np.float32)
    logits_BC -= logits_BC.max(axis=1, keepdims=True)
    labels = rng.integers(0, CLASSES, size=ROWS)
    labels[::5] = -1
    return Rows(
        ids=np.arange(ROWS, dtype=np.int64) if ids is None else ids,
        logits_BC=logits_BC,
        labels=labels,
        fingerprints=sample_fingerprints(logits_BC),
    )


def write_store(
    root: Path,
    rows: Rows,
    *,
    name: str | None = None,
    encoding: str = "f32",
    labelled: bool = True,
    locked_at: float | None = None,
    shards: int | None = None,
) -> Manifest:
    """Write a store into `root`; with `shards` only so many of its four are committed and it stays unfinished."""
    text = id_kind(rows.ids) == "str"
    dense = not text and bool((np.diff(rows.ids) == 1).all())
    kept = make_encoding(encoding, classes=CLASSES)
    temperature = TemperatureSpec(default=locked_at or 4.0, captured=locked_at or 1.0, locked=locked_at is not None)
    plan = plan_store(
        name=name or root.name,
        samples=ROWS,
        ids=IdSpec(
            kind="str" if text else "int",
            dense_start=int(rows.ids[0]) if dense else None,
            width_bytes=24 if text else 0,
        ),
        encoding=kept,
        temperature=temperature,
        mean="none" if locked_at is None else "arithmetic",
        teachers=(),
        transfer_set=TransferSetSpec(name="noise", source="m:f", arguments={}, labelled=labelled),
        rows_per_shard=SHARD,
        rows_per_chunk=8,
    )
    writer = StoreWriter.create(root, plan)
    for shard in writer.missing_shards()[:shards]:
        with writer.claim(shard) as claim:
            part = slice(claim.rows.start, claim.rows.stop)
            claim.commit(
                ids=rows.ids[part],
                encoded=kept.encode(rows.logits_BC[part]),
                fingerprints=rows.fingerprints[part],
                labels=rows.labels[part] if labelled else None,
                audit=Audit().to_json(),
            )
    return writer.plan if shards is not None else writer.finish()


@dataclass(frozen=True, kw_only=True)
class Stores:
    """A folder of stores and what each was made of."""

    root: Path
    rows: dict[str, Rows]
    manifests: dict[str, Manifest]


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    """Stores of every kind; tests must not change them."""
    root = tmp_path_factory.mktemp("stores")
    names = np.array([f"größe/{number:03d}.png" for number in range(ROWS)])[::-1]
    rows = {
        "dense": make_rows(0),
        "halves": make_rows(1, ids=np.arange(ROWS) + 1000),
        "sparse": make_rows(2, ids=np.random.default_rng(2).permutation(ROWS * 10)[:ROWS] - 500),
        "named": make_rows(3, ids=names),
        "locked": make_rows(4),
        "begun": make_rows(5),
        "unlabelled": make_rows(6),
    }
    manifests = {
        "dense": write_store(root / "dense", rows["dense"]),
        "halves": write_store(root / "halves", rows["halves"], encoding="f16"),
        "sparse": write_store(root / "sparse", rows["sparse"], encoding="bf16"),
        "named": write_store(root / "named", rows["named"]),
        "locked": write_store(root / "locked", rows["locked"], locked_at=3.0),
        "begun": write_store(root / "begun", rows["begun"], shards=2),
        "unlabelled": write_store(root / "unlabelled", rows["unlabelled"], labelled=False),
    }
    return Stores(root=root, rows=rows, manifests=manifests)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A reply as it came."""

    status: int
    headers: urllib3.HTTPHeaderDict
    body: bytes
    question: Callable[[str], int] | None = None

    def json(self) -> Any:
        """The body, which is JSON."""
        return json.loads(self.body)

    def problem(self) -> tuple[int, str]:
        """Status and code of a reply that must be problem details."""
        assert self.headers["content-type"] == "application/problem+json", self.body[:300]
        document = self.json()
        assert set(document) == {"type", "title", "status", "detail", "code", "context"}
        assert document["status"] == self.status
        assert document["type"] == f"urn:softlabels:error:{document['code']}"
        return self.status, document["code"]

    def arrays(self, tmp_path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
        """Arrays and metadata of a reply that must be a batch, read by the safetensors library itself."""
        assert (self.status, self.headers["content-type"]) == (200, "application/vnd.safetensors"), self.body[:300]
        assert int(self.headers["content-length"]) == len(self.body)
        path = tmp_path / "batch.safetensors"
        path.write_bytes(self.body)
        with safe_open(path, framework="np") as file:
            metadata = file.metadata()
        assert self.headers["softlabels-digest"] == metadata["digest"]
        arrays = load(self.body)
        assert self.question is not None
        assert wire.is_intact(memoryview(self.body), self.question(metadata["digest"]))
        del arrays[wire.CHECKSUM]
        return arrays, metadata


class Asker:
    """Asks one server. Safe under threads."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.host, _, port = base.removeprefix("http://").rpartition(":")
        self.port = int(port)
        self._pool = urllib3.PoolManager(maxsize=16, retries=False, timeout=30.0)

    def __call__(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        question: Callable[[str], int] | None = None,
        **headers: str,
    ) -> Answer:
        """One request; in header names `_` stands for `-`. A reply's checksum is compared with that of its question."""
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        reply = self._pool.request(method, self.base + path, body=body, headers=named)
        if wire.CHECKSUM_HEADER in reply.headers and question is not None:
            expected = crc32c(reply.data, question(reply.headers["softlabels-digest"]))
            assert reply.headers[wire.CHECKSUM_HEADER] == f"{expected:08x}"
        return Answer(status=reply.status, headers=reply.headers, body=reply.data, question=question)

    def batch(self, name: str, document: object, **headers: str) -> Answer:
        """A batch request in JSON; a string is sent as it is."""
        text = document if isinstance(document, str) else json.dumps(document)
        path = f"/v1/stores/{name}/batch"

        def question(digest: str) -> int:
            keys: Any = json.loads(text)
            columns = {key: keys[key] for key in ("ids", "views", "spans") if keys.get(key) is not None}
            options = {key: keys.get(key) for key in ("fields", "temperature", "decode")}
            before = wire.batch_question(digest, columns=columns, **options)
            return crc32c(wire.column_bytes(*map(np.array, columns.values())), before)

        return self("POST", path, body=text.encode(), question=question, content_type="application/json", **headers)

    def binary(self, name: str, ids: NDArray[np.int64], query: str = "", **headers: str) -> Answer:
        """A batch request with binary ids."""
        path, body = f"/v1/stores/{name}/batch{query}", ids.astype("<i8").tobytes()

        def question(digest: str) -> int:
            keys = dict(parse_qsl(query.removeprefix("?")))
            temperature = float(keys["temperature"]) if "temperature" in keys else None
            columns, fields = (
                keys.get("columns", "ids").split(","),
                keys["fields"].split(",") if "fields" in keys else None,
            )
            before = wire.batch_question(
                digest, columns=columns, fields=fields, temperature=temperature, decode=keys.get("decode")
            )
            return crc32c(body, before)

        return self("POST", path, body=body, question=question, content_type="application/octet-stream", **headers)

    def close(self) -> None:
        """Close the connections."""
        self._pool.clear()


@contextlib.contextmanager
def run_in_thread(app: FastAPI, settings: Settings) -> Iterator[Asker]:
    """The app behind a real uvicorn on a free port, in a thread of this process."""
    listener = listen(settings)
    server = make_server(app, settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    asker = Asker(url_of(listener))
    try:
        while not server.started:
            assert thread.is_alive(), "the server ended before it began"
            time.sleep(0.01)
        yield asker
    finally:
        asker.close()
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()


Serve = Callable[..., Asker]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a server over a folder, with settings of the test's choice; a callback may change the app before."""
    with contextlib.ExitStack() as stack:

        def start(root: Path, *, change: Callable[[FastAPI], None] | None = None, **chosen: Any) -> Asker:
            settings = Settings(port=0, **chosen)
            app = create_app(StoreFolder(root), settings)
            if change is not None:
                change(app)
            return stack.enter_context(run_in_thread(app, settings))

        yield start


@pytest.fixture(scope="session")
def ask(stores: Stores) -> Iterator[Asker]:
    """A server over `stores` with settings as they come."""
    settings = Settings(port=0)
    with run_in_thread(create_app(StoreFolder(stores.root), settings), settings) as asker:
        yield asker


@pytest.fixture
def write() -> Callable[..., Manifest]:
    """Write a store: see `write_store`."""
    return write_store


@pytest.fixture
def rows_of() -> Callable[..., Rows]:
    """Random rows: see `make_rows`."""
    return make_rows
