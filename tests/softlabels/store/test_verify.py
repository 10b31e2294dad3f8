"""`verify`: a sound store passes, and each kind of damage is found and located."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.cli import main
from softlabels.errors import UnknownStoreError
from softlabels.store import StoreWriter
from softlabels.store.ledger import Ledger
from softlabels.store.store_documents import load_manifest
from softlabels.store.verify import verify

Flip = Callable[..., None]


def chunk_place(root: Path, array: str, shard: int, chunk: int) -> tuple[Path, int]:
    """The file and byte offset of a chunk."""
    manifest = load_manifest(root)
    receipt = Ledger(root, manifest).read(shard)
    assert receipt is not None
    part = receipt.parts[array]
    return root / part.path, part.offset + chunk * part.stride


class TestSoundStore:
    def test_it_passes(self, store: Path) -> None:
        """Nothing is wrong; every row, chunk and file was looked at."""
        report = verify(store)
        assert report.sound
        assert (report.rows, report.committed, report.shards) == (200, 4, 4)
        assert report.chunks == 4 * 13
        assert report.files == 4 + (16 if (store / "zarr.json").exists() else 4)

    def test_a_sample_of_it_passes(self, store: Path) -> None:
        """A few random chunks, every array of each."""
        report = verify(store, sample=5)
        assert report.sound
        assert report.chunks == 4 * 5

    def test_a_sample_may_be_larger_than_the_store(self, store: Path) -> None:
        """Then it is every chunk."""
        assert verify(store, sample=1000).rows == 200

    def test_members_views_and_sequences(self, tiny_store: Path) -> None:
        """A store that others made passes too."""
        assert verify(tiny_store).sound

    def test_no_store(self, tmp_path: Path) -> None:
        """A folder that is no store is an error and not a fault."""
        with pytest.raises(UnknownStoreError):
            verify(tmp_path)


class TestDamage:
    def test_a_flipped_bit_is_located(self, store: Path, flip: Flip) -> None:
        """Shard, array, chunk and rows are named."""
        path, offset = chunk_place(store, "targets", 1, 2)
        flip(path, byte=offset + 7)
        report = verify(store)
        assert len(report.faults) == 1
        fault = report.faults[0]
        assert (fault.kind, fault.shard, fault.array, fault.chunk) == ("checksum", 1, "targets", 2)
        assert fault.rows == (96, 111)
        assert str(fault).startswith("shard 1, array targets, chunk 2, rows 96 to 111, ")

    def test_a_sample_that_holds_it_finds_it(self, store: Path, flip: Flip) -> None:
        """With as many chunks as there are, none is left out."""
        path, offset = chunk_place(store, "labels", 3, 0)
        flip(path, byte=offset)
        assert [fault.array for fault in verify(store, sample=1000, every_fault=True).faults] == ["labels"]

    def test_all_faults_are_listed(self, store: Path, flip: Flip) -> None:
        """Two damaged chunks and a lost receipt, the cheap check first."""
        for shard, chunk in ((0, 1), (2, 3)):
            path, offset = chunk_place(store, "targets", shard, chunk)
            flip(path, byte=offset)
        (store / "ledger" / "00000003.json").unlink()
        faults = verify(store, every_fault=True).faults
        assert [(f.shard, f.chunk) for f in faults] == [(3, None), (0, 1), (2, 3)]

    def test_bytes_outside_the_chunks(self, store: Path, flip: Flip) -> None:
        """The index of a Zarr shard, the header of an HDF5 file: covered by no chunk's checksum, but by the receipt."""
        path, _ = chunk_place(store, "targets", 0, 0)
        flip(path, byte=path.stat().st_size - 6 if "targets" in str(path) else 20)
        [fault] = verify(store).faults
        assert (fault.kind, fault.shard, fault.chunk) == ("checksum", 0, None)

    @pytest.mark.parametrize("name", ["plan.json", "manifest.json", "ledger/00000001.json"])
    def test_documents(self, store: Path, flip: Flip, name: str) -> None:
        """Plan, manifest and receipts each carry their own digest."""
        flip(store / name, byte=100)
        faults = verify(store, every_fault=True).faults
        assert faults[0].kind == "document"
        assert faults[0].path == name

    def test_a_lost_file(self, store: Path) -> None:
        """Missing though its shard is committed."""
        path, _ = chunk_place(store, "fingerprints", 2, 0)
        path.unlink()
        [fault] = verify(store).faults
        assert (fault.kind, fault.shard, fault.rows) == ("missing", 2, (128, 191))

    def test_a_short_file(self, store: Path) -> None:
        """Its size is checked before it is read."""
        path, _ = chunk_place(store, "targets", 3, 0)
        os.truncate(path, path.stat().st_size - 1)
        [fault] = verify(store, sample=1000).faults
        assert (fault.kind, fault.shard) == ("missing", 3)

    def test_a_folder_in_a_file_s_place(self, store: Path) -> None:
        """What cannot be read is a fault and not a crash."""
        path, _ = chunk_place(store, "targets", 3, 0)
        path.unlink()
        path.mkdir()
        assert verify(store).faults[0].kind == "missing"

    def test_a_stray_file(self, store: Path) -> None:
        """An unlisted file in an array's folder; the store's own folder is the user's."""
        path, _ = chunk_place(store, "targets", 0, 0)
        (path.parent / "extra").write_bytes(b"?")
        (store / "NOTES.txt").write_text("mine")
        [fault] = verify(store, every_fault=True).faults
        assert (fault.kind, fault.path) == ("stray", str((path.parent / "extra").relative_to(store)))

    def test_a_shard_replaced_with_its_receipt(self, store: Path, source: Any, tmp_path: Path) -> None:
        """Sound by itself and of the same plan, but not what the manifest was published with."""
        other = type(source)(container=source.container, ids=source.ids, seed=1)
        other.write(tmp_path / "other")
        for path in (tmp_path / "other").rglob("*"):
            if path.is_file() and ("00000001" in path.name or "/c/1" in str(path)):
                path.replace(store / path.relative_to(tmp_path / "other"))
        faults = verify(store, every_fault=True).faults
        assert ["replaced" in fault.message for fault in faults] == [True]

    def test_metadata_and_index(self, store: Path, flip: Flip) -> None:
        """The files beside the shards, by their SHA-256 in the manifest."""
        manifest = load_manifest(store)
        for path in manifest.metadata_sha256:
            flip(store / path, byte=(store / path).stat().st_size // 2)
        paths = {fault.path for fault in verify(store, every_fault=True).faults}
        assert paths >= set(manifest.metadata_sha256)


class TestSense:
    """What a writer commits by mistake is sound by its checksums, and makes no sense."""

    def damage(self, source: Any, root: Path, **changes: Any) -> list[Any]:
        """Faults of a store whose second shard was committed with these changes."""
        writer = StoreWriter.create(root, source.plan())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("softlabels.store.writer.check_values", lambda *given: None)  # writers of 0.1.0 did not look
            for shard in range(4):
                source.commit(writer, shard, **(changes if shard == 1 else {}))
        writer.finish()
        return verify(root, every_fault=True).faults

    def test_nan(self, source: Any, tmp_path: Path) -> None:
        """A row that is no distribution."""
        targets = source.logits()[64:128].astype("<f2")
        targets[20, 3] = np.nan
        [fault] = self.damage(source, tmp_path / "s", encoded={"targets": targets})
        assert (fault.kind, fault.shard, fault.array, fault.rows) == ("contents", 1, "targets", (84, 84))

    def test_rows_that_are_not_shifted(self, source: Any, tmp_path: Path) -> None:
        """Every row's largest logit is kept at 0."""
        targets = source.logits()[64:128].astype("<f2")
        targets[[5, 9]] += 3
        [fault] = self.damage(source, tmp_path / "s", encoded={"targets": targets})
        assert fault.rows == (69, 73)

    def test_labels_out_of_range(self, source: Any, tmp_path: Path) -> None:
        """There is no class 10 among ten."""
        labels = np.full(64, 10)
        [fault] = self.damage(source, tmp_path / "s", labels=labels)
        assert (fault.array, fault.rows) == ("labels", (64, 127))


class TestUnfinished:
    def test_it_says_which_shards_are_missing(self, source: Any, tmp_path: Path) -> None:
        """Unfinished is a fault of its own, after everything else."""
        source.write(tmp_path / "s", shards=[0, 2])
        [fault] = verify(tmp_path / "s", every_fault=True).faults
        assert fault.kind == "unfinished"
        assert "2 of 4 shards are not committed (1, 3)" in fault.message

    def test_what_is_committed_is_checked(self, source: Any, tmp_path: Path, flip: Flip) -> None:
        """Damage in a committed shard is told first."""
        source.write(tmp_path / "s", shards=[0, 2])
        path, offset = chunk_place(tmp_path / "s", "targets", 2, 1)
        flip(path, byte=offset)
        assert [fault.kind for fault in verify(tmp_path / "s", every_fault=True).faults] == ["checksum", "unfinished"]

    def test_unpublished(self, store: Path) -> None:
        """All shards are there, the manifest is not."""
        (store / "manifest.json").unlink()
        assert "not published" in verify(store).faults[0].message


class TestCommand:
    def test_sound(self, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Exit code 0 and one line."""
        assert main(["verify", str(store)]) == 0
        assert "sound; 200 rows" in capsys.readouterr().out

    def test_damaged(self, store: Path, flip: Flip, capsys: pytest.CaptureFixture[str]) -> None:
        """Exit code 1; shard, chunk and rows are named, and what to do."""
        for chunk in (0, 3):
            path, offset = chunk_place(store, "targets", 2, chunk)
            flip(path, byte=offset)
        assert main(["verify", str(store)]) == 1
        out = capsys.readouterr().out
        assert "shard 2, array targets, chunk 0, rows 128 to 143" in out
        assert "chunk 3" not in out
        assert f"softlabels repair {store}" in out
        assert main(["verify", str(store), "--all"]) == 1
        assert "chunk 3, rows 176 to 191" in capsys.readouterr().out

    def test_json(self, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The report for programs."""
        assert main(["verify", str(store), "--json", "--sample", "3"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["sound"] is True
        assert document["chunks"] == 12
