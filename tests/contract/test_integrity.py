"""Format version 2 in every container: sums of rows and chunks, digests of receipts, and shards that are read back."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softlabels
from softlabels.atomic_files import write_atomically
from softlabels.documents import as_json, open_sealed, seal
from softlabels.errors import (
    ChecksumError,
    ConflictError,
    ManifestError,
    NonFiniteLogitsError,
    RequestError,
    ShapeMismatchError,
    ShardConflictError,
)
from softlabels.row_sums import sums_of_rows
from softlabels.store import LocalRows, StoreWriter
from softlabels.store.chunks import masked, salt_of, sums_path
from softlabels.store.copies import merge
from softlabels.store.ledger import Ledger
from softlabels.store.repair import repair
from softlabels.store.store_documents import RECEIPTS, load_manifest
from softlabels.store.verify import verify


def older(made: Any) -> Any:
    """The same store as a softlabels of format version 1 writes it."""
    return dataclasses.replace(made, plan=made.plan.as_version(1))


def replace_shard(root: Path, other: Path, shard: int) -> None:
    """Replace a shard, its sums and its receipt by those of another store of the same plan."""
    receipt = Ledger(other, load_manifest(other)).read(shard)
    assert receipt is not None
    for path in (*receipt.files, f"ledger/{shard:08d}.json"):
        shutil.copyfile(other / path, root / path)


@pytest.fixture
def two_runs(make_store: Any, kind: Any) -> tuple[Any, Any]:
    """Two finished stores of one plan whose teacher answered differently."""
    first, second = make_store(kind, name="first"), make_store(kind, name="second", seed=1)
    # One data set: only the targets differ.
    second = dataclasses.replace(second, labels=first.labels, fingerprints=first.fingerprints)
    for made in (first, second):
        made.write()
    assert first.plan.digest == second.plan.digest
    return first, second


class TestRowSums:
    @pytest.mark.parametrize("encoding", ["f16", "topk"])
    def test_they_are_those_of_the_rows(self, make_store: Any, kind: Any, encoding: str) -> None:
        """CRC-32C of each row of each array, alphabetical, masked by row number and salt, which is of their digest."""
        made = make_store(kind, encoding=encoding, ids="strings")
        made.write()
        rows = LocalRows(made.root)
        for shard in range(rows.manifest.shards.count):
            receipt = Ledger(made.root, rows.manifest).read(shard)
            assert receipt is not None
            numbers = np.arange(*receipt.rows)
            arrays = rows.fetch_rows(numbers, tuple(rows.manifest.arrays))
            ids = np.zeros((len(numbers), 12), dtype=np.uint8)
            for row, name in zip(ids, arrays["ids"].tolist(), strict=True):
                row[: len(name.encode())] = list(name.encode())
            arrays["ids"] = ids
            expected = np.stack([sums_of_rows(arrays[name]) for name in sorted(rows.manifest.arrays)], axis=1)
            stored = np.fromfile(made.root / sums_path(shard), "<u4").reshape(len(numbers), -1)
            assert receipt.salt == salt_of(expected)
            assert np.array_equal(masked(stored, numbers, receipt.salt), expected)

    def test_a_row_exchanged_before_its_chunk_was_summed(self, made: Any, kind: Any) -> None:
        """Chunk sums fit what was written; only the sums of the arrays in memory do not: `verify` names the rows."""
        wrong = bytearray((made.root / sums_path(1)).read_bytes())
        wrong[0:4], wrong[16:20] = wrong[16:20], wrong[0:4]
        receipt = open_sealed((made.root / "ledger/00000001.json").read_bytes(), what="receipt")
        size, digest = write_atomically(made.root / sums_path(1), [bytes(wrong)])
        receipt["files"][sums_path(1)] = {"size": size, "sha256": digest}
        (made.root / "ledger/00000001.json").write_bytes(seal(receipt))
        (made.root / "manifest.json").unlink()
        found = [fault for fault in verify(made.root, every_fault=True).faults if fault.kind == "checksum"]
        assert [(fault.shard, fault.rows) for fault in found if fault.rows == (64, 65)] == [(1, (64, 65))]


class TestChunkSums:
    @pytest.mark.parametrize("kind", ["hdf5"], indirect=True)
    def test_zeros_for_ones_are_noticed(self, make_store: Any, kind: Any, place: Any) -> None:
        """Fletcher-32 takes 0x0000 for 0xFFFF: labels of -1 that became class 0 are refused, `verify` names them."""
        made = make_store(kind)
        made = dataclasses.replace(made, labels=np.full(200, -1, dtype=np.int64))
        made.write()
        path, offset, size = place(made.root, "labels", 1, 2)
        contents = bytearray(path.read_bytes())
        contents[offset : offset + size - 4] = bytes(size - 4)
        path.write_bytes(contents)
        with pytest.raises(ChecksumError, match="shard 1, chunk 2"):
            LocalRows(made.root).fetch_rows(np.array([64 + 40]), ("labels",))
        assert verify(made.root).faults[0].chunk == 2
        assert repair(made.root).dropped == [1]

    @pytest.mark.parametrize("kind", ["hdf5"], indirect=True)
    def test_a_receipt_without_them_is_refused(self, make_store: Any, kind: Any) -> None:
        """Dropping the stronger sum from a receipt of an unfinished store does not bring the weaker one back."""
        made = make_store(kind)
        made.write(shards=range(2), finish=False)
        path = made.root / "ledger/00000001.json"
        receipt = open_sealed(path.read_bytes(), what="receipt")
        del receipt["parts"]["labels"]["crc32c"]
        path.write_bytes(seal(receipt))
        with pytest.raises(ManifestError, match=r"parts\.labels"):
            LocalRows(made.root).fetch_rows(np.array([64]), ("labels",))

    def test_a_receipt_without_row_sums_is_refused(self, make_store: Any, kind: Any) -> None:
        """Nor does a receipt of format version 1 in a store of version 2."""
        made = make_store(kind)
        made.write(shards=range(2), finish=False)
        path = made.root / "ledger/00000001.json"
        receipt = open_sealed(path.read_bytes(), what="receipt")
        del receipt["salt"]
        path.write_bytes(seal(receipt))
        with pytest.raises(ManifestError, match="row sums"):
            LocalRows(made.root).fetch_rows(np.array([64]), ("labels",))


class TestShardOfAnotherRun:
    def test_a_reader_refuses_it(self, two_runs: Any) -> None:
        """Its rows are never served under the digest of the store that they do not belong to."""
        first, second = two_runs
        replace_shard(first.root, second.root, 2)
        with softlabels.open(first.root) as store, pytest.raises(ManifestError, match="was published with"):
            store.batch(first.ids[128:130])

    def test_repair_drops_it_and_nothing_else(self, two_runs: Any, tmp_path: Path) -> None:
        """After that shard is computed again, the store is the one that it was, digest included."""
        first, second = two_runs
        before = softlabels.open(first.root).digest
        replace_shard(first.root, second.root, 2)
        assert {fault.shard for fault in verify(first.root, every_fault=True).faults} == {2}
        done = repair(first.root)
        assert (done.dropped, done.digest) == ([2], None)
        first.write()
        assert softlabels.open(first.root).digest == before
        assert verify(first.root).sound

    def test_with_the_digests_of_all_receipts(self, two_runs: Any) -> None:
        """Where the digests were replaced too, which shard is wrong is not known: nothing is published anew."""
        first, second = two_runs
        before = (first.root / "manifest.json").read_bytes()
        replace_shard(first.root, second.root, 2)
        shutil.copyfile(second.root / RECEIPTS, first.root / RECEIPTS)
        with softlabels.open(first.root) as store, pytest.raises(ManifestError, match="receipts"):
            store.batch(first.ids[:2])
        done = repair(first.root)
        assert (done.mixed, done.dropped, done.digest) == (True, [], None)
        assert (first.root / "manifest.json").read_bytes() == before

    @pytest.mark.parametrize("mixed", [False, True], ids=["of one run", "of two runs"])
    def test_beside_a_damaged_receipt_and_damaged_digests(self, two_runs: Any, mixed: bool) -> None:
        """What is left of the digests still tells whether the other receipts are the published ones."""
        first, second = two_runs
        before = softlabels.open(first.root).digest
        (first.root / "ledger/00000001.json").write_text("{}")
        contents = bytearray((first.root / RECEIPTS).read_bytes())
        contents[-40] ^= 1  # of shard 2
        (first.root / RECEIPTS).write_bytes(contents)
        if mixed:
            replace_shard(first.root, second.root, 2)
        done = repair(first.root)
        assert (done.mixed, done.dropped, done.digest) == (mixed, [1], None)
        assert (first.root / "manifest.json").exists() == mixed
        if not mixed:
            first.write()
            assert softlabels.open(first.root).digest == before

    def test_an_old_store_is_not_published_as_a_mixture(self, two_runs: Any) -> None:
        """Version 1 has a digest over all receipts only: `verify` tells, `repair` leaves the store as it is."""
        first, second = (
            dataclasses.replace(older(made), root=made.root.with_name(f"{made.root.name}1")) for made in two_runs
        )
        for made in (first, second):
            made.write()
        replace_shard(first.root, second.root, 2)
        assert "which one is not known" in verify(first.root).faults[0].message
        done = repair(first.root)
        assert (done.mixed, done.dropped, done.digest) == (True, [], None)

    def test_merge_does_not_take_it(self, two_runs: Any, tmp_path: Path) -> None:
        """A finished source's shards are compared with what it was published with."""
        first, second = two_runs
        replace_shard(first.root, second.root, 2)
        done = merge([first.root], tmp_path / "all")
        assert (done.missing, list(done.damaged)) == ([2], [2])

    def test_a_published_store_takes_no_other_shard(self, two_runs: Any) -> None:
        """A receipt was deleted, and the teacher answers differently now: its shard is refused, not served."""
        first, second = two_runs
        (first.root / "ledger/00000001.json").unlink()
        with pytest.raises(ShardConflictError, match="published"):
            dataclasses.replace(second, root=first.root).write(shards=range(1, 2))


class TestReadBack:
    @pytest.mark.parametrize(
        "audit", [None, {}, {"rows": "many", "top1_agreements": 0, "kl": {}}, {"rows": float("nan")}]
    )
    def test_a_receipt_that_no_reader_reads(self, make_store: Any, kind: Any, audit: Any) -> None:
        """It is refused before anything is on disk; the shard can then be committed."""
        made = make_store(kind)
        writer = StoreWriter.create(made.root, made.plan)
        with pytest.raises(ShapeMismatchError, match="audit"), writer.claim(0) as claim:
            claim.commit(**{**made.shard(0), "audit": audit})
        left = [path.name for path in made.root.rglob("*") if path.is_file() and path.suffix != ".lock"]
        assert left == ["plan.json"]
        made.write()
        assert verify(made.root).sound

    @pytest.mark.parametrize("byte", [12, 0.5, -3])
    @pytest.mark.parametrize("array", ["targets", "sums"])
    def test_a_disk_that_changes_bytes(
        self, make_store: Any, kind: Any, monkeypatch: pytest.MonkeyPatch, array: str, byte: float
    ) -> None:
        """A file that is not what was written is noticed before its receipt exists, wherever the byte is."""
        made = make_store(kind)
        writer = StoreWriter.create(made.root, made.plan)

        def damaged(path: Path, buffers: Any, **options: Any) -> tuple[int, str]:
            done = write_atomically(path, buffers, **options)
            if path.parts[len(made.root.parts)] in ({"sums"} if array == "sums" else {"targets", "shards"}):
                contents = bytearray(path.read_bytes())
                contents[len(contents) // 2 if byte == 0.5 else int(byte)] ^= 1
                path.write_bytes(contents)
            return done

        monkeypatch.setattr("softlabels.store.writer.write_atomically", damaged)
        with pytest.raises(ChecksumError, match="was not committed"), writer.claim(0) as claim:
            claim.commit(**made.shard(0))
        assert writer.missing_shards() == [0, 1, 2, 3]
        monkeypatch.undo()
        made.write()
        assert verify(made.root).sound

    def test_rows_that_verify_would_refuse(self, make_store: Any, kind: Any) -> None:
        """NaN and labels that are no classes are refused before anything is on disk."""
        made = make_store(kind)
        writer = StoreWriter.create(made.root, made.plan)
        rows, labels = made.encoded["targets"][:64].copy(), made.labels[:64].copy()
        rows[63, 9], labels[5] = np.nan, 10
        with pytest.raises(NonFiniteLogitsError, match="NaN"), writer.claim(0) as claim:
            claim.commit(**{**made.shard(0), "encoded": {"targets": rows}})
        with pytest.raises(RequestError, match="label 10 of row 5"), writer.claim(0) as claim:
            claim.commit(**{**made.shard(0), "labels": labels})
        assert writer.missing_shards() == [0, 1, 2, 3]

    def test_an_index_that_a_disk_changes(self, make_store: Any, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """The store is not published with an index that is not the one that was written."""
        made = make_store(kind, ids="strings")
        writer = made.write(finish=False)

        def damaged(path: Path, buffers: Any, **options: Any) -> tuple[int, str]:
            done = write_atomically(path, buffers, **options)
            if path.name == "positions.npy":
                contents = bytearray(path.read_bytes())
                contents[-3] ^= 1
                path.write_bytes(contents)
            return done

        monkeypatch.setattr("softlabels.store.writer.write_atomically", damaged)
        with pytest.raises(ChecksumError, match="not published"):
            writer.finish()
        assert not writer.finished
        monkeypatch.undo()
        writer.finish()
        assert verify(made.root).sound

    def test_a_manifest_of_another_plan(self, make_store: Any, kind: Any) -> None:
        """A run that has nothing left to do looks whether what is published is its store."""
        made, other = make_store(kind, name="a"), make_store(kind, name="b", labelled=False)
        writer = made.write()
        other.write()
        shutil.copyfile(other.root / "manifest.json", made.root / "manifest.json")
        with pytest.raises(ManifestError, match="another plan"):
            writer.finish()

    def test_shards_that_are_not_the_published_ones(self, two_runs: Any) -> None:
        """Nor are the shards of another run of the same plan."""
        first, second = two_runs
        replace_shard(first.root, second.root, 3)
        with pytest.raises(ManifestError, match="was published with"):
            StoreWriter.resume(first.root).finish()


class TestOlderFormat:
    def test_a_store_that_was_begun_in_it_is_finished_in_it(self, make_store: Any, kind: Any) -> None:
        """The same job continues it; its digest is what the older softlabels would have given it."""
        made, whole = make_store(kind), older(make_store(kind, name="whole"))
        whole.write()
        older(made).write(shards=range(2), finish=False)
        made.write()
        assert softlabels.open(made.root).digest == softlabels.open(whole.root).digest
        assert not (made.root / "sums").exists()
        assert verify(made.root).sound

    def test_its_plan_may_be_lost(self, make_store: Any, kind: Any) -> None:
        """The receipts tell which format the store was begun in."""
        made = make_store(kind)
        older(made).write(shards=range(2), finish=False)
        (made.root / "plan.json").unlink()
        assert made.write().plan.format_version == 1

    def test_the_formats_are_not_merged(self, make_store: Any, kind: Any, tmp_path: Path) -> None:
        """A store has one format; the message names it."""
        made, old = make_store(kind), older(make_store(kind, name="old"))
        made.write(shards=range(2), finish=False)
        old.write(shards=range(2, 4), finish=False)
        with pytest.raises(ConflictError, match="format_version: 2 and 1"):
            merge([made.root, old.root], tmp_path / "all")

    def test_it_is_repaired(self, make_store: Any, kind: Any, flip: Any) -> None:
        """A damaged shard is dropped and computed again."""
        made = older(make_store(kind))
        made.write()
        before = softlabels.open(made.root).digest
        flip(made.root, shard=1, chunk=2)
        assert repair(made.root).dropped == [1]
        made.write()
        assert softlabels.open(made.root).digest == before


def test_the_receipts_of_one_contents_are_the_same_in_every_run(make_store: Any, kind: Any) -> None:
    """Salts follow from the rows, so that a shard computed twice has one receipt."""
    receipts = []
    for name in ("a", "b"):
        made = make_store(kind, name=name)
        writer = made.write()
        receipts.append([as_json(writer.ledger.read(shard)) for shard in range(4)])
    assert receipts[0] == receipts[1]
    assert len({receipt["salt"] for receipt in receipts[0]}) == 4
