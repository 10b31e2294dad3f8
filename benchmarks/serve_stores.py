"""Stores of the serving benchmark: synthetic rows, written once by the real writer and kept between runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.audit import Audit
from softlabels.encodings import Encoding, make_encoding
from softlabels.manifest import IdSpec, TemperatureSpec, TransferSetSpec
from softlabels.store import LocalRows, StoreWriter, plan_store

STORES: dict[str, tuple[int, int, str]] = {
    "w1": (200_000, 1_000, "f16"),
    "w1q8": (200_000, 1_000, "q8"),
    "w3": (60_000, 10, "f32"),
}
"""Rows, classes and encoding of each."""

MOST_KL_NATS = 3e-5
"""What the 8-bit store may lose, on average over its rows: with more than that its speed would be no comparison."""


def make_stores(folder: Path) -> None:
    """Write the stores that are not there yet; labelled, with dense ids, in shards of the writer's choice."""
    for name, (rows, classes, encoding) in STORES.items():
        if not (folder / name / "manifest.json").exists():
            _write(folder / name, rows, classes, encoding)


def loss_of(store: Path) -> str:
    """What the audit of a store says of its rows, in a line. Raises ValueError: more was lost than is fair."""
    audit = LocalRows(store).manifest.audit
    found = {} if audit is None else audit["kl_nats"]
    if not found or not all(figures["mean"] <= MOST_KL_NATS for figures in found.values()):
        raise ValueError(
            f"{store.name} loses {found}, more than {MOST_KL_NATS}: delete it, so that it is written again"
        )
    said = ", ".join(f"mean {figures['mean']:.1e} at T = {temperature}" for temperature, figures in found.items())
    return f"{store.name}: KL to the exact rows in nats, {said}"


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
            logits_BC = like_a_nets(shard, len(ids), classes)
            encoded = encoding.encode(logits_BC)
            claim.commit(
                ids=ids,
                encoded=encoded,
                fingerprints=np.zeros((len(ids), 16), dtype=np.uint8),
                labels=ids % classes,
                audit=_audit(encoding, logits_BC, encoded).to_json(),
            )
    writer.finish()


def _audit(encoding: Encoding, logits_BC: NDArray[np.float32], encoded: Mapping[str, NDArray[Any]]) -> Audit:
    """Over all rows, a thousand at a time: in float64 a shard would take gigabytes."""
    audit = Audit((1.0, 4.0))
    for first in range(0, len(logits_BC), 1_000):
        part = slice(first, first + 1_000)
        audit.add(logits_BC[part], encoding.decode({name: rows[part] for name, rows in encoded.items()}), captured=1.0)
    return audit


def like_a_nets(seed: int, rows: int, classes: int) -> NDArray[np.float32]:
    """Logits spread as a trained net's: a bulk with standard deviation 2, four classes that stand out, largest 0."""
    rng = np.random.default_rng(seed)
    logits_BC = rng.standard_normal((rows, classes), dtype=np.float32) * 2
    for height in (10.0, 7.0, 6.0, 5.0):
        logits_BC[np.arange(rows), rng.integers(0, classes, size=rows)] += height
    return logits_BC - logits_BC.max(axis=1, keepdims=True)
