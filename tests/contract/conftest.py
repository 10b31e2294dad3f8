"""Small stores of every container, and ways to damage them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from msgspec.structs import replace

from softlabels.audit import Audit
from softlabels.encodings import hidden_encoding, make_encoding, rng_keys
from softlabels.encodings.basis_learning import learn_basis
from softlabels.manifest import Container, IdSpec, Manifest, TemperatureSpec, TransferSetSpec
from softlabels.store import StoreWriter, plan_store
from softlabels.store.ledger import Ledger
from softlabels.store.store_documents import load_plan
from softlabels.store.store_reader import LocalRows
from softlabels.transfer_set import sample_fingerprints

SAMPLES, CLASSES = 200, 10
ROWS_PER_SHARD, ROWS_PER_CHUNK = 64, 16
"""Three whole shards and one of 8 rows, so that the last shard and its only chunk are both partial."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A container and the compression of its chunks."""

    container: Container
    compression: str | None = None

    def __str__(self) -> str:
        return self.container + (f"-{self.compression}" if self.compression else "")


@pytest.fixture(params=("zarr", "hdf5", "zarr-zstd", "zarr-blosc", "hdf5-gzip"))
def kind(request: pytest.FixtureRequest) -> Kind:
    """Every way to keep a store; a test that needs only some of them names these, `indirect=True`."""
    container, _, compression = str(request.param).partition("-")
    assert container in ("zarr", "hdf5")
    return Kind(container=cast(Container, container), compression=compression or None)


@dataclass(frozen=True, kw_only=True)
class Made:
    """A store and what was put into it."""

    root: Path
    plan: Manifest
    ids: Any
    labels: Any
    fingerprints: Any
    encoding: Any
    encoded: dict[str, Any]

    def shard(self, number: int) -> dict[str, Any]:
        """Arguments of `ShardClaim.commit` for this shard."""
        rows = slice(number * ROWS_PER_SHARD, min((number + 1) * ROWS_PER_SHARD, SAMPLES))
        audit = Audit((1.0,))
        audit.add(np.zeros((rows.stop - rows.start, 2)), np.zeros((rows.stop - rows.start, 2)), captured=1.0)
        return {
            "ids": self.ids[rows],
            "encoded": {name: array[rows] for name, array in self.encoded.items()},
            "fingerprints": self.fingerprints[rows],
            "labels": None if self.labels is None else self.labels[rows],
            "audit": audit.to_json(),
        }

    def write(self, *, shards: range | None = None, finish: bool = True) -> StoreWriter:
        """Write these shards, all unless told otherwise."""
        writer = StoreWriter.create(self.root, self.plan, encoding=self.encoding)
        for number in range(self.plan.shards.count) if shards is None else shards:
            with writer.claim(number) as claim:
                claim.commit(**self.shard(number))
        if finish:
            writer.finish()
        return writer


MakeStore = Callable[..., Made]

ENCODING_PARAMS: dict[str, dict[str, Any]] = {"topk": {"k": 3}, "sampled": {"head": 2, "draws": 4}}


def sample_ids(style: str) -> tuple[Any, IdSpec]:
    """Ids of a style: dense and sparse integers, strings of one to twelve bytes with characters beyond ASCII."""
    rng = np.random.default_rng(5)
    if style == "dense":
        return np.arange(SAMPLES, dtype=np.int64) + 1000, IdSpec(kind="int", dense_start=1000)
    if style == "sparse":
        return rng.permutation(10 * SAMPLES)[:SAMPLES].astype(np.int64) - SAMPLES, IdSpec(kind="int")
    words = np.array([f"{'ü' * (i % 4)}{i:x}" for i in rng.permutation(SAMPLES)])
    return words, IdSpec(kind="str", width_bytes=12)


def _plan(encoding: Any, spec: IdSpec, kind: Kind, *, labelled: bool) -> Manifest:
    plan = plan_store(
        name="small",
        samples=SAMPLES,
        ids=spec,
        encoding=encoding,
        temperature=TemperatureSpec(default=4.0, captured=1.0, locked=False)
        if encoding.retemperable
        else TemperatureSpec(default=1.0, captured=1.0, locked=True),
        mean="none",
        teachers=(),
        transfer_set=TransferSetSpec(name="x", source="x:y", arguments={}, labelled=labelled),
        container=kind.container,
        rows_per_shard=ROWS_PER_SHARD,
        rows_per_chunk=ROWS_PER_CHUNK,
    )
    return replace(plan, shards=replace(plan.shards, compression=kind.compression))


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """Plans a store of a kind, with contents that follow from a seed; `Made.write` then writes it."""

    def make(
        kind: Kind, *, name: str = "s", ids: str = "dense", labelled: bool = True, encoding: str = "f16", seed: int = 0
    ) -> Made:
        rng = np.random.default_rng(seed)
        logits = rng.normal(size=(SAMPLES, CLASSES)).astype(np.float32) * 3
        logits -= logits.max(axis=1, keepdims=True)
        if encoding == "basis":
            codec: Any = learn_basis(logits, row_bytes=14, heads=(2,), residuals=(0, 4))
        elif encoding == "hidden":  # with a head of ones and zeros, hidden states are logits
            codec = hidden_encoding(np.eye(CLASSES, dtype="f4"), np.zeros(CLASSES, dtype="f4"), kept_as="q8")
        else:
            codec = make_encoding(encoding, classes=CLASSES, params=ENCODING_PARAMS.get(encoding))
        found, spec = sample_ids(ids)
        labels = rng.integers(-1, CLASSES, size=SAMPLES).astype(np.int64)
        return Made(
            root=tmp_path / name,
            plan=_plan(codec, spec, kind, labelled=labelled),
            ids=found,
            labels=labels if labelled else None,
            fingerprints=sample_fingerprints(rng.integers(0, 256, size=(SAMPLES, 7), dtype=np.uint8)),
            encoding=codec,
            encoded=codec.encode(logits, keys_B=rng_keys("small", found)),
        )

    return make


@pytest.fixture
def made(make_store: MakeStore, kind: Kind) -> Made:
    """A finished store of each kind."""
    made = make_store(kind)
    made.write()
    return made


@pytest.fixture
def flip() -> Callable[..., Path]:
    """Flips one bit of a chunk: the damage that a disk does."""

    def flip(root: Path, *, field: str = "targets", shard: int, chunk: int, byte: int = 3) -> Path:
        path, offset, _ = chunk_place(root, field, shard, chunk)
        contents = bytearray(path.read_bytes())
        contents[offset + byte] ^= 0x10
        path.write_bytes(contents)
        return path

    return flip


@pytest.fixture
def place() -> Callable[[Path, str, int, int], tuple[Path, int, int]]:
    """The location of a chunk: file, offset, bytes."""
    return chunk_place


def chunk_place(root: Path, field: str, shard: int, chunk: int) -> tuple[Path, int, int]:
    """The location of a chunk: file, offset, bytes."""
    plan = load_plan(root)
    receipt = Ledger(root, plan).read(shard)
    assert receipt is not None
    part = receipt.parts[field]
    sizes = part.sizes or (part.stride,) * (chunk + 1)
    return root / part.path, part.offset + sum(sizes[:chunk]), sizes[chunk]


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[..., Path]:
    """Copies a store to damage."""

    def copy(root: Path, name: str = "copy") -> Path:
        return Path(shutil.copytree(root, tmp_path / name))

    return copy


@pytest.fixture
def rows_of() -> Callable[[Path], LocalRows]:
    """Opens a store at the level of rows."""
    return LocalRows
