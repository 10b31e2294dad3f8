"""Malicious stores: valid ones whose documents are changed and given a matching digest again."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from softlabels.audit import Audit
from softlabels.documents import canonical_json, open_sealed, seal
from softlabels.encodings import make_encoding
from softlabels.manifest import IdSpec, TemperatureSpec, TransferSetSpec
from softlabels.store import StoreWriter, plan_store
from softlabels.store.sample_index import npy_bytes
from softlabels.store.store_documents import RECEIPTS
from softlabels.transfer_set import sample_fingerprints

SAMPLES, CLASSES = 100, 4
Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def rows() -> Any:
    """What the stores hold: [100, 4] float16."""
    logits = np.random.default_rng(0).normal(size=(SAMPLES, CLASSES)).astype(np.float16)
    return logits - logits.max(axis=1, keepdims=True)


@pytest.fixture
def make_store(tmp_path: Path, rows: Any) -> Callable[..., Path]:
    """Writes a finished store of 100 samples in four shards; ids are dense, or sparse where `looked_up`."""

    def make(container: str = "zarr", *, looked_up: bool = False, compression: str | None = None) -> Path:
        plan = plan_store(
            name="victim",
            samples=SAMPLES,
            ids=IdSpec(kind="int", dense_start=None if looked_up else 0),
            encoding=make_encoding("f16", classes=CLASSES),
            temperature=TemperatureSpec(default=4.0, captured=1.0, locked=False),
            mean="none",
            teachers=(),
            transfer_set=TransferSetSpec(name="x", source="x:y", arguments={}, labelled=True),
            container=container,  # type: ignore[arg-type]
            rows_per_shard=32,
            rows_per_chunk=8,
        )
        plan = replace(plan, shards=replace(plan.shards, compression=compression))
        writer = StoreWriter.create(tmp_path / "victim", plan)
        for shard in writer.missing_shards():
            with writer.claim(shard) as claim:
                numbers = np.arange(claim.rows.start, claim.rows.stop)
                claim.commit(
                    ids=numbers[::-1] * 3 if looked_up else numbers,
                    encoded={"targets": rows[numbers]},
                    fingerprints=sample_fingerprints(numbers[:, None]),
                    labels=numbers % CLASSES,
                    audit=Audit().to_json(),
                )
        writer.finish()
        return writer.root

    return make


@pytest.fixture(params=("zarr", "hdf5"))
def store(request: pytest.FixtureRequest, make_store: Callable[..., Path]) -> Path:
    """A finished store of each container."""
    return make_store(request.param)


def publish(root: Path, shard: int, receipt: dict[str, Any]) -> None:
    """Have the manifest list the digest of a changed receipt."""
    table = np.load(root / RECEIPTS)
    table[shard] = list(hashlib.sha256(canonical_json(receipt)).digest())
    (root / RECEIPTS).write_bytes(npy_bytes(table))
    manifest = open_sealed((root / "manifest.json").read_bytes(), what="manifest")
    manifest["metadata_sha256"][RECEIPTS] = hashlib.sha256(npy_bytes(table)).hexdigest()
    manifest["ledger"] = hashlib.sha256(table.tobytes()).hexdigest()
    (root / "manifest.json").write_bytes(seal(manifest))


@pytest.fixture
def rewrite() -> Callable[[Path, Change], None]:
    """Changes a document and the digests of it: anybody who makes a store can do that."""

    def rewrite(path: Path, change: Change) -> None:
        body = open_sealed(path.read_bytes(), what=str(path))
        change(body)
        path.write_bytes(seal(body))
        if path.parent.name == "ledger":
            publish(path.parents[1], int(path.stem), body)

    return rewrite


@pytest.fixture
def little_memory() -> Callable[..., AbstractContextManager[None]]:
    """A block of code that may not allocate more than a few megabytes."""

    @contextmanager
    def little(megabytes: float = 64) -> Iterator[None]:
        tracemalloc.start()
        try:
            yield
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < megabytes * 2**20, f"{peak / 2**20:.0f} MiB were allocated"

    return little
