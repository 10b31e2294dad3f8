"""Stores of every layout, and a server over them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.audit import Audit
from softlabels.encodings import make_encoding
from softlabels.encodings.basis_learning import learn_basis
from softlabels.manifest import IdSpec, RowLayout, TemperatureSpec, TransferSetSpec, ViewSpec
from softlabels.store import SampleTable, StoreWriter, plan_store
from softlabels.transfer_set import sample_fingerprints
from softlabels_server import Settings, StoreFolder, create_app
from softlabels_server.process.server import listen, make_server, url_of

CLASSES, SAMPLES, VIEWS = 7, 40, 3


def _logits(rows: int, classes: int = CLASSES, *, members: int | None = None) -> np.ndarray:
    shape = (rows, classes) if members is None else (rows, members, classes)
    found = np.random.default_rng(5).normal(size=shape).astype(np.float32) * 4
    return found - found.max(axis=-1, keepdims=True)


def _write(root: Path, rows: np.ndarray, keys: Any, *, encoding: Any = None, **plan: Any) -> None:
    encoding = encoding or make_encoding("f32", classes=CLASSES)
    manifest = plan_store(
        name=root.name,
        samples=SAMPLES,
        encoding=encoding,
        temperature=TemperatureSpec(default=4.0, captured=1.0, locked=False),
        mean=plan.pop("mean", "none"),
        teachers=(),
        transfer_set=TransferSetSpec(name="x", source="x:y", arguments={}),
        rows_per_shard=16,
        rows_per_chunk=4,
        ids=plan.pop("ids", IdSpec(kind="int", dense_start=0)),
        **plan,
    )
    writer = StoreWriter.create(root, manifest, table=plan.get("table"), encoding=encoding)
    for shard in writer.missing_shards():
        with writer.claim(shard) as claim:
            piece = rows[claim.rows.start : claim.rows.stop]
            encoded = encoding.encode(piece.reshape(-1, piece.shape[-1]))
            shaped = {n: a.reshape(*piece.shape[:-1], *a.shape[1:]) for n, a in encoded.items()}
            audit = Audit((1.0,))
            flat = piece.reshape(-1, piece.shape[-1])
            audit.add(flat, flat, captured=1.0)
            claim.commit(encoded=shaped, audit=audit.to_json(), **keys(claim.rows))
    writer.finish()


def _sample_keys(span: range) -> dict[str, Any]:
    positions = np.arange(span.start, span.stop)
    return {"ids": positions, "fingerprints": sample_fingerprints(positions[:, None])}


def _view_keys(span: range) -> dict[str, Any]:
    row = np.arange(span.start, span.stop)
    return {
        "ids": row // VIEWS,
        "fingerprints": sample_fingerprints(row[:, None]),
        "view_parameters": np.stack([row, row * 0.5], axis=1),
    }


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store of each kind."""
    root = tmp_path_factory.mktemp("kinds")
    _write(
        root / "views",
        _logits(SAMPLES * VIEWS),
        _view_keys,
        layout=RowLayout(kind="views", samples=SAMPLES, rows=SAMPLES * VIEWS, views=VIEWS),
        views=ViewSpec(transform="m:f", parameters=("top", "left")),
    )
    _write(root / "members", _logits(SAMPLES, members=2), _sample_keys, members=2, mean="geometric")
    lengths = np.arange(SAMPLES) % 5
    for name, ids in (
        ("sequences", np.arange(SAMPLES)),
        ("texts", np.array([f"t{i:02d}" for i in range(SAMPLES)])[::-1]),
    ):
        dense = name == "sequences"
        table = SampleTable(
            ids=ids, lengths=lengths, fingerprints=sample_fingerprints(np.arange(SAMPLES)[:, None]), dense=dense
        )
        spec = IdSpec(kind="int", dense_start=0) if dense else IdSpec(kind="str", width_bytes=8)
        _write(root / name, _logits(int(lengths.sum())), lambda span: {}, table=table, ids=spec)
    rows = _logits(SAMPLES, 60)
    _write(root / "learnt", rows, _sample_keys, encoding=learn_basis(rows, row_bytes=60))
    return root


@pytest.fixture(scope="session")
def url(folder: Path) -> Iterator[str]:
    """A server over them."""
    settings = Settings(port=0)
    listener = listen(settings)
    server = make_server(create_app(StoreFolder(folder), settings), settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield url_of(listener)
    server.should_exit = True
    thread.join(timeout=30)
