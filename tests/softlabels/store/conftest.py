"""Small stores of both containers to verify, damage, repair and merge: made of random logits, the same each time."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.audit import Audit
from softlabels.encodings import make_encoding
from softlabels.manifest import IdSpec, Manifest, TeacherSpec, TemperatureSpec, TransferSetSpec
from softlabels.store import StoreWriter, plan_store
from softlabels.transfer_set import sample_fingerprints

NOT_COMPARED = ("locks", "staging", "damaged")
"""Folders that are not part of a store's contents."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Contents of a store: 200 samples of 10 classes in four shards, the last one short."""

    ids: str = "dense"
    container: str = "zarr"
    seed: int = 0
    samples: int = 200
    classes: int = 10
    teacher: str = "noise"

    def plan(self) -> Manifest:
        """The plan of the store."""
        specs = {
            "dense": IdSpec(kind="int", dense_start=5),
            "int": IdSpec(kind="int"),
            "str": IdSpec(kind="str", width_bytes=9),
        }
        return plan_store(
            name="t",
            samples=self.samples,
            ids=specs[self.ids],
            encoding=make_encoding("f16", classes=self.classes),
            temperature=TemperatureSpec(default=4.0, captured=1.0, locked=False),
            mean="none",
            teachers=(
                TeacherSpec(
                    name=self.teacher, model="m:f", arguments={}, weights=None, weights_sha256=None, weight=1.0
                ),
            ),
            transfer_set=TransferSetSpec(name="x", source="x:y", arguments={}, labelled=True),
            container=self.container,  # type: ignore[arg-type]
            rows_per_shard=64,
            rows_per_chunk=16,
        )

    def all_ids(self) -> np.ndarray:
        """Every sample's id."""
        if self.ids == "dense":
            return np.arange(self.samples) + 5
        shuffled = np.random.default_rng(1).permutation(self.samples) * 3
        return shuffled if self.ids == "int" else np.array([f"img-{i:05d}" for i in shuffled])

    def logits(self) -> np.ndarray:
        """logits_BC of every sample, exact in f16, row maxima 0."""
        found = np.random.default_rng(self.seed).normal(size=(self.samples, self.classes)).astype(np.float16) * 4
        return (found - found.max(axis=1, keepdims=True)).astype(np.float32)

    def labels(self) -> np.ndarray:
        """Labels of every sample: mostly class 0, so that whole chunks of them are zeros."""
        return np.where(np.arange(self.samples) < 150, 0, np.arange(self.samples) % (self.classes + 1) - 1)

    def commit(self, writer: StoreWriter, shard: int, **changes: Any) -> None:
        """Write one shard; `changes` replace arguments of the commit."""
        with writer.claim(shard) as claim:
            rows = slice(claim.rows.start, claim.rows.stop)
            logits = self.logits()[rows]
            audit = Audit((1.0,))
            audit.add(logits, logits, captured=1.0)
            given = {
                "ids": self.all_ids()[rows],
                "encoded": make_encoding("f16", classes=self.classes).encode(logits),
                "fingerprints": sample_fingerprints(np.arange(self.samples)[rows, None]),
                "labels": self.labels()[rows],
                "audit": audit.to_json(),
            }
            claim.commit(**{**given, **changes})

    def write(self, root: Path, shards: list[int] | None = None) -> StoreWriter:
        """Write these shards of the store, all unless told otherwise, and finish it where none is missing."""
        writer = StoreWriter.create(root, self.plan())
        for shard in writer.missing_shards() if shards is None else shards:
            self.commit(writer, shard)
        if not writer.missing_shards():
            writer.finish()
        return writer


def tree_of(root: Path) -> dict[str, str]:
    """SHA-256 of every file of a store by path, without locks, staging and damaged files."""
    found = {}
    for path in sorted(root.rglob("*")):
        inner = path.relative_to(root)
        if path.is_file() and inner.parts[0] not in NOT_COMPARED:
            found[str(inner)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="session", params=[("zarr", "dense"), ("zarr", "str"), ("hdf5", "int")], ids="-".join)
def source(request: pytest.FixtureRequest) -> Source:
    """Stores of both containers and every kind of ids."""
    container, ids = request.param
    return Source(container=container, ids=ids)


@pytest.fixture(scope="session")
def written(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store that nobody changes."""
    root = tmp_path_factory.mktemp("written") / "store"
    source.write(root)
    return root


@pytest.fixture
def store(written: Path, tmp_path: Path) -> Path:
    """A finished store of the test's own."""
    return Path(shutil.copytree(written, tmp_path / "store"))


@pytest.fixture
def make_source() -> Callable[..., Source]:
    """Other sources than the usual ones."""
    return Source


@pytest.fixture
def tree() -> Callable[[Path], dict[str, str]]:
    """SHA-256 of every file of a store by path."""
    return tree_of


@pytest.fixture
def flip() -> Callable[..., None]:
    """Flips one bit of a file."""

    def flip(path: Path, *, byte: int, bit: int = 4) -> None:
        raw = bytearray(path.read_bytes())
        raw[byte] ^= 1 << bit
        path.write_bytes(raw)

    return flip
