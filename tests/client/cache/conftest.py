"""Small stores of every kind that a cache keeps, and a source of rows that counts what it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from softlabels.audit import Audit
from softlabels.encodings import Encoding, make_encoding
from softlabels.ids import IdArray
from softlabels.manifest import IdSpec, Manifest, RowLayout, TemperatureSpec, TransferSetSpec, ViewSpec
from softlabels.order import EpochConfig
from softlabels.store import LocalRows, SampleTable, StoreWriter, plan_store
from softlabels.target_store import TargetStore
from softlabels.targets import EpochRows
from softlabels_client.cache import CachedRows

SAMPLES, CLASSES, VIEWS = 120, 6, 3


def write_store(root: Path, ids: IdSpec, *, views: int = 1, seed: int = 0, samples: int = SAMPLES) -> Path:
    """A finished store of random rows, labelled, by the real writer."""
    encoding = make_encoding("f32", classes=CLASSES)
    rng = np.random.default_rng(seed)
    rows = samples * views
    logits_BC = rng.normal(size=(rows, CLASSES)).astype(np.float32)
    logits_BC -= logits_BC.max(axis=1, keepdims=True)
    plan = plan_store(
        name=root.name,
        samples=samples,
        ids=ids,
        encoding=encoding,
        temperature=TemperatureSpec(default=2.0, captured=1.0, locked=False),
        mean="none",
        teachers=(),
        transfer_set=TransferSetSpec(name="noise", source="m:g", arguments={}, labelled=True),
        layout=None if views == 1 else RowLayout(kind="views", samples=samples, rows=rows, views=views),
        views=None if views == 1 else ViewSpec(transform="m:f", parameters=("top", "left")),
        rows_per_shard=rows,
    )
    of_samples: Any = np.arange(samples) * 7 + 1
    if ids.kind == "str":
        of_samples = np.array([f"påfågel/{number:04}.jpeg" for number in range(samples)])
    elif ids.dense_start is not None:
        of_samples = np.arange(samples) + ids.dense_start
    parameters = {} if views == 1 else {"view_parameters": rng.normal(size=(rows, 2))}
    writer = StoreWriter.create(root, plan)
    with writer.claim(0) as claim:
        claim.commit(
            ids=np.repeat(of_samples, views),
            encoded=encoding.encode(logits_BC),
            fingerprints=rng.integers(0, 255, size=(rows, 16), dtype=np.uint8),
            labels=np.arange(rows) % CLASSES,
            audit=Audit().to_json(),
            **parameters,
        )
    writer.finish()
    return root


def write_sequences(root: Path) -> Path:
    """A finished store of sequences of 0 … 4 rows."""
    encoding = make_encoding("f32", classes=CLASSES)
    lengths = np.arange(SAMPLES) % 5
    table = SampleTable(
        ids=np.arange(SAMPLES), lengths=lengths, fingerprints=np.zeros((SAMPLES, 16), np.uint8), dense=True
    )
    plan = plan_store(
        name=root.name,
        samples=SAMPLES,
        ids=IdSpec(kind="int", dense_start=0),
        encoding=encoding,
        temperature=TemperatureSpec(default=2.0, captured=1.0, locked=False),
        mean="none",
        teachers=(),
        transfer_set=TransferSetSpec(name="noise", source="m:g", arguments={}),
        table=table,
    )
    rows = -np.arange(int(lengths.sum()) * CLASSES, dtype=np.float32).reshape(-1, CLASSES)
    writer = StoreWriter.create(root, plan, table=table)
    for shard in writer.missing_shards():
        with writer.claim(shard) as claim:
            part = rows[claim.rows.start : claim.rows.stop]
            claim.commit(encoded=encoding.encode(part - part.max(axis=1, keepdims=True)), audit=Audit().to_json())
    writer.finish()
    return root


KINDS: dict[str, tuple[IdSpec, int]] = {
    "dense": (IdSpec(kind="int", dense_start=5), 1),
    "integers": (IdSpec(kind="int"), 1),
    "strings": (IdSpec(kind="str", width_bytes=30), 1),
    "views": (IdSpec(kind="int", dense_start=0), VIEWS),
    "named-views": (IdSpec(kind="str", width_bytes=21), VIEWS),
}


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A store of each of `KINDS`, and one of sequences."""
    root = tmp_path_factory.mktemp("kinds")
    made = {kind: write_store(root / kind, ids, views=views) for kind, (ids, views) in KINDS.items()}
    return {**made, "sequences": write_sequences(root / "sequences")}


@pytest.fixture(scope="session")
def other_version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store `dense` with the same samples and other rows."""
    return write_store(tmp_path_factory.mktemp("later") / "dense", KINDS["dense"][0], seed=99)


@dataclass
class Counted:
    """A row source that notes what it is asked for."""

    rows: LocalRows
    fetched: list[int] = field(default_factory=list)
    epochs: int = 0
    steps: int = 0

    @property
    def manifest(self) -> Manifest:
        """Of the store."""
        return self.rows.manifest

    @property
    def digest(self) -> str:
        """Of the store."""
        return self.rows.digest

    @property
    def encoding(self) -> Encoding:
        """Of the store."""
        return self.rows.encoding

    def fetch(self, ids: IdArray, fields: tuple[str, ...], **keys: Any) -> dict[str, NDArray[Any]]:
        """Rows, and a note of how many."""
        self.fetched.append(len(ids))
        return self.rows.fetch(ids, fields, **{name: value for name, value in keys.items() if value is not None})

    def epoch(self, config: EpochConfig, fields: tuple[str, ...]) -> Iterator[EpochRows]:
        """An epoch, and a note of it."""
        self.epochs += 1
        for rows in self.rows.epoch(config, fields):
            self.steps += 1
            yield rows

    def close(self) -> None:
        """Let go of the files."""
        self.rows.close()

    def forget(self) -> None:
        """Begin counting anew."""
        self.fetched.clear()
        self.epochs = self.steps = 0


@dataclass(frozen=True)
class Setting:
    """A store read with and without a cache."""

    far: Counted
    near: TargetStore
    cached: TargetStore
    folder: Path

    def again(self, **options: Any) -> TargetStore:
        """The same store and cache, opened once more."""
        return TargetStore(CachedRows(self.far, folder=self.folder, **options), where="again")

    def file(self, name: str) -> Path:
        """A file of the store's table."""
        return next(self.folder.glob(f"*/{self.far.digest}/{name}"))


MakeSetting = Callable[..., Setting]


@pytest.fixture
def make_setting(tmp_path: Path) -> MakeSetting:
    """Puts a cache in front of a store."""

    def make(root: Path, **options: Any) -> Setting:
        far = Counted(LocalRows(root))
        cached = TargetStore(CachedRows(far, folder=tmp_path / "cache", **options), where="cached")
        return Setting(far, TargetStore(LocalRows(root), where="near"), cached, tmp_path / "cache")

    return make


def same(one: Any, other: Any) -> None:
    """Refuse batches that differ in anything."""
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_array_equal(one.labels, other.labels)
    for name, array in other.encoded.items():
        assert one.encoded[name].dtype == array.dtype
        np.testing.assert_array_equal(one.encoded[name], array)
    for name in ("fingerprints", "view_parameters"):
        if getattr(other, name) is None:
            assert getattr(one, name) is None
        else:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.fixture
def refuse_difference() -> Callable[[Any, Any], None]:
    """Refuses batches that differ in anything."""
    return same
