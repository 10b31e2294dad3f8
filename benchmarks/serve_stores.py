"""Which stores does the serving benchmark read? Random rows, written once by the real writer and kept between runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from softlabels.audit import Audit
from softlabels.encodings import make_encoding
from softlabels.manifest import IdSpec, TemperatureSpec, TransferSetSpec
from softlabels.store import StoreWriter, plan_store

STORES: dict[str, tuple[int, int, str]] = {
    "w1": (200_000, 1_000, "f16"),
    "w1q8": (200_000, 1_000, "q8"),
    "w3": (60_000, 10, "f32"),
}
"""Rows, classes and encoding of each."""


def make_stores(folder: Path) -> None:
    """Write the stores that are not there yet; labelled, with dense ids, in shards of the writer's choice."""
    for name, (rows, classes, encoding) in STORES.items():
        if not (folder / name / "manifest.json").exists():
            _write(folder / name, rows, classes, encoding)


def _write(root: Path, rows: int, classes: int, encoding_name: str) -> None:
    encoding = make_encoding(encoding_name, classes=classes)
    plan = plan_store(
        name=root.name,
        samples=rows,
        ids=IdSpec(kind="int", dense_start=0),
        encoding=encoding,
        temperature=TemperatureSpec(default=4.0, captured=1.0, locked=False),
        mean="none",
        teachers=(),
        transfer_set=TransferSetSpec(name="noise", source="benchmarks:noise", arguments={}, labelled=True),
    )
    writer = StoreWriter.create(root, plan)
    for shard in writer.missing_shards():
        with writer.claim(shard) as claim:
            ids = np.arange(claim.rows.start, claim.rows.stop)
            claim.commit(
                ids=ids,
                encoded=encoding.encode(noise(shard, len(ids), classes)),
                fingerprints=np.zeros((len(ids), 16), dtype=np.uint8),
                labels=ids % classes,
                audit=Audit().to_json(),
            )
    writer.finish()


def noise(seed: int, rows: int, classes: int) -> NDArray[np.float32]:
    """Logits as spread as a trained net's: standard deviation 3, largest 0."""
    logits_BC = np.random.default_rng(seed).standard_normal((rows, classes), dtype=np.float32) * 3
    return logits_BC - logits_BC.max(axis=1, keepdims=True)
