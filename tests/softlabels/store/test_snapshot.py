"""A reader holds the version of a store that it opened, or says that another one took its place."""

from __future__ import annotations

import mmap
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import softlabels
from softlabels.audit import Audit
from softlabels.encodings import make_encoding
from softlabels.errors import ChecksumError, DamageError, ManifestError, StoreChangedError, TruncatedError
from softlabels.manifest import IdSpec, TemperatureSpec, TransferSetSpec
from softlabels.row_sums import sums_of_rows
from softlabels.store import LocalRows, SampleTable, StoreWriter, plan_store
from softlabels.store.ledger import Ledger
from softlabels.transfer_set import sample_fingerprints

ALL = np.arange(200)
FIELDS = ("targets", "labels")


@pytest.fixture
def two(tmp_path: Path, source: Any, make_source: Callable[..., Any]) -> tuple[Path, Path]:
    """Stores of two runs of one plan, with different rows."""
    other = make_source(container=source.container, ids=source.ids, seed=9)
    source.write(tmp_path / "store")
    other.write(tmp_path / "new")
    return tmp_path / "store", tmp_path / "new"


def targets(rows: LocalRows, numbers: NDArray[np.int64] = ALL) -> NDArray[Any]:
    """Rows of the array `targets`, as they are stored."""
    return rows.fetch_rows(numbers, FIELDS)["targets"].view(np.uint16)


def copy_over(source: Path, target: Path, *, in_place: bool) -> None:
    """Copy a store over another: into the same files with the same times, or by renaming, as `rsync` does."""
    for path in sorted(source.rglob("*")):
        there = target / path.relative_to(source)
        if path.is_dir():
            there.mkdir(exist_ok=True)
        elif in_place and there.exists():
            before = there.stat()
            there.write_bytes(path.read_bytes())
            os.utime(there, ns=(before.st_atime_ns, before.st_mtime_ns))
        else:
            shutil.copy2(path, there.with_name(there.name + ".tmp"))
            there.with_name(there.name + ".tmp").rename(there)


def flip_in_silence(path: Path, at: int) -> None:
    """Flip a bit through a shared mapping, of which the operating system tells nobody, as of what a disk does."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[at] ^= 4


class TestReplaced:
    def test_a_folder_that_is_renamed_is_still_the_same_store(self, two: tuple[Path, Path]) -> None:
        """`mv new store`: the open reader reads on in the old folder, a new one the new store."""
        store, new = two
        expected = targets(LocalRows(store))
        rows = LocalRows(store)
        targets(rows, ALL[:3])
        store.rename(store.with_name("old"))
        new.rename(store)
        assert np.array_equal(targets(rows), expected)
        assert not np.array_equal(targets(LocalRows(store)), expected)

    def test_what_is_gone_with_the_old_folder(self, two: tuple[Path, Path]) -> None:
        """Shards that were not read yet cannot be: the store was replaced, it is not damaged."""
        store, new = two
        rows = LocalRows(store)
        targets(rows, ALL[:3])
        shutil.rmtree(store)
        new.rename(store)
        with pytest.raises(StoreChangedError, match="open it again"):
            targets(rows)

    @pytest.mark.parametrize("in_place", [False, True], ids=["rsync", "cp"])
    @pytest.mark.parametrize("read_before", [0, 3, 200])
    def test_files_that_are_copied_over(self, two: tuple[Path, Path], in_place: bool, read_before: int) -> None:
        """Rows of the version that was opened, or StoreChangedError: never one of the other version."""
        store, new = two
        expected = targets(LocalRows(store))
        rows = LocalRows(store)
        targets(rows, ALL[:read_before])
        copy_over(new, store, in_place=in_place)
        if read_before == 200 and not in_place:
            assert np.array_equal(targets(rows), expected)
            return
        with pytest.raises(StoreChangedError):
            targets(rows)
        assert targets(LocalRows(store)).shape == expected.shape

    def test_a_shard_of_another_run_is_refused(self, two: tuple[Path, Path], source: Any) -> None:
        """With its receipt and sums it is sound in itself; the manifest has the digest of the other receipt."""
        store, new = two
        for path in sorted(new.rglob("*")):
            inside = str(path.relative_to(new))
            if path.is_file() and ("00000001" in inside or "/1/" in f"/{inside}/"):
                shutil.copy2(path, store / inside)
        rows = LocalRows(store)
        targets(rows, ALL[:64])
        with pytest.raises(ManifestError):
            targets(rows)

    def test_a_reader_in_another_process_reads_the_same_version(self, two: tuple[Path, Path]) -> None:
        """Unpickling opens the store again; another version there is an error."""
        store, new = two
        pickled = pickle.dumps(LocalRows(store, verify="every-read"))
        assert len(targets(pickle.loads(pickled))) == 200
        shutil.rmtree(store)
        new.rename(store)
        with pytest.raises(StoreChangedError):
            pickle.loads(pickled)

    def test_damage_without_another_store_is_damage(self, two: tuple[Path, Path]) -> None:
        """A missing file says `repair`, not "open it again"."""
        store, _ = two
        rows = LocalRows(store)
        for path in sorted((store / "targets").rglob("*")) + sorted((store / "shards").rglob("*")):
            if path.is_file() and path.name != "zarr.json":
                path.unlink()
        with pytest.raises(TruncatedError):
            targets(rows)


class TestEveryRead:
    """What changes on disk in silence, after the first check."""

    def test_a_changed_row_is_refused(self, two: tuple[Path, Path]) -> None:
        """Its sum is the one that was kept when it was written."""
        store, _ = two
        rows, careless = LocalRows(store, verify="every-read"), LocalRows(store)
        targets(rows)
        targets(careless)
        receipt = Ledger(store, rows.manifest).read(1)
        assert receipt is not None
        flip_in_silence(store / receipt.parts["targets"].path, receipt.parts["targets"].offset + 50)
        with pytest.raises(ChecksumError):
            rows.fetch_rows(ALL, tuple(rows.manifest.arrays))
        with pytest.raises(ChecksumError):
            careless.fetch_rows(ALL, tuple(rows.manifest.arrays), verify=True)

    def test_a_changed_sum_is_refused(self, two: tuple[Path, Path]) -> None:
        """The message names the row whose sum it is."""
        store, _ = two
        rows = LocalRows(store, verify="every-read")
        width = 4 * len(rows.manifest.row_sum_names)
        column = rows.manifest.row_sum_names.index("targets")
        flip_in_silence(store / "sums" / "00000002.u4", width * 5 + 4 * column)
        with pytest.raises(ChecksumError, match="row 133 of array 'targets'"):
            targets(rows)

    def test_row_sums_are_those_of_the_rows(self, two: tuple[Path, Path]) -> None:
        """In any order, across shards, repeated."""
        rows = LocalRows(two[0])
        chosen = np.random.default_rng(0).integers(0, 200, 64)
        arrays = rows.fetch_rows(chosen, tuple(rows.manifest.arrays))
        sums = rows.row_sums(chosen)
        assert sums is not None
        for column, name in enumerate(rows.manifest.row_sum_names):
            if name != "ids":  # strings come decoded
                assert np.array_equal(sums[:, column], sums_of_rows(arrays[name])), name


@pytest.fixture
def sequences(tmp_path: Path) -> Path:
    """A finished store of 600 sequences with ids that are looked up, some of them empty."""
    rng = np.random.default_rng(3)
    ids, lengths = rng.permutation(6000)[:600].astype(np.int64), rng.integers(0, 4, 600)
    table = SampleTable(ids=ids, lengths=lengths, fingerprints=sample_fingerprints(ids[:, None]), dense=False)
    encoding = make_encoding("f32", classes=5)
    plan = plan_store(
        name="sequences",
        samples=600,
        ids=IdSpec(kind="int"),
        encoding=encoding,
        temperature=TemperatureSpec(default=1.0, captured=1.0, locked=False),
        mean="none",
        teachers=(),
        transfer_set=TransferSetSpec(name="x", source="x:y", arguments={}),
        rows_per_shard=256,
        rows_per_chunk=64,
        table=table,
    )
    writer = StoreWriter.create(tmp_path / "sequences", plan, table=table)
    for shard in writer.missing_shards():
        with writer.claim(shard) as claim:
            logits = -np.repeat(np.asarray(claim.rows, dtype=np.float32)[:, None], 5, axis=1)
            logits[:, 0] = 0
            audit = Audit((1.0,))
            audit.add(logits, logits, captured=1.0)
            claim.commit(encoded=encoding.encode(logits), audit=audit.to_json())
    writer.finish()
    return tmp_path / "sequences"


INDEXES = ("sorted_ids", "positions", "offsets", "fingerprints")


class TestIndexes:
    """Every way to an index goes through its verified form: rows of sequences do not carry their ids."""

    @pytest.mark.parametrize("name", INDEXES)
    @pytest.mark.parametrize("opened_before", [False, True])
    def test_a_flipped_bit_is_refused_by_every_way(self, sequences: Path, name: str, opened_before: bool) -> None:
        """Ids, epochs, batches: all that need the file refuse."""
        store = softlabels.open(sequences)
        ids = store.ids()
        store = store if opened_before else softlabels.open(sequences)
        ways: dict[str, Callable[[], Any]] = {
            "ids": store.ids,
            "epoch": lambda: list(store.epoch(seed=1, epoch=0, batch_size=64, fingerprints=True)),
            "batch": lambda: store.batch(ids[:50], fingerprints=True),
        }
        if opened_before:
            for read in ways.values():
                read()
        path = sequences / "index" / f"{name}.npy"
        raw = bytearray(path.read_bytes())
        for at in range(128, len(raw), 8):
            raw[at] ^= 1
        with path.open("r+b") as file:
            file.write(raw)
        for way, read in ways.items():
            # `ids` reads whole samples too, without fingerprints.
            if (way, name) == ("ids", "fingerprints"):
                assert np.array_equal(read(), ids)
                continue
            # The order of the ids is kept in memory.
            if opened_before and name == "positions" and way != "batch":
                read()
                continue
            with pytest.raises(ManifestError):
                read()

    @pytest.mark.parametrize("name", INDEXES)
    def test_what_changes_in_silence_after_the_first_read(self, sequences: Path, name: str) -> None:
        """The pages that are read are compared with sums kept since the file was verified."""
        store = softlabels.open(sequences)
        ids = store.ids()
        store.batch(ids, fingerprints=True)
        flip_in_silence(sequences / "index" / f"{name}.npy", 128 + 8 * 100)
        with pytest.raises(DamageError):
            store.batch(ids, fingerprints=True)
