"""Flipped bits, truncated and missing files: rows are right or refused, `verify` reports, and `repair` repairs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.documents import canonical_json
from softlabels.errors import SoftLabelsError
from softlabels.store.ledger import Ledger
from softlabels.store.repair import repair
from softlabels.store.store_documents import load_manifest
from softlabels.store.store_reader import LocalRows
from softlabels.store.verify import verify

FLIPS = 500
Tree = Callable[[Path], dict[str, str]]
Copy = Callable[[str], Path]
Refuse = Callable[[Path, str], int]


def files_of(root: Path) -> list[Path]:
    """Every file of a store's contents."""
    found = [path for path in root.rglob("*") if path.is_file() and path.relative_to(root).parts[0] != "locks"]
    return sorted(found)


def chunk_place(root: Path, array: str, shard: int, chunk: int) -> tuple[Path, int, int]:
    """The file, byte offset and size of a chunk."""
    manifest = load_manifest(root)
    receipt = Ledger(root, manifest).read(shard)
    assert receipt is not None
    part = receipt.parts[array]
    sizes = part.sizes or (part.stride,) * (chunk + 1)
    return root / part.path, part.offset + sum(sizes[:chunk]), sizes[chunk]


class TestFlippedBits:
    def test_each_is_detected_or_harmless(
        self, damaged_copy: Copy, kind_name: str, rng: np.random.Generator, refuse_wrong_rows: Refuse
    ) -> None:
        """500 flips in each kind of store, anywhere in any file, so that small files are hit as often as large ones."""
        root = damaged_copy(kind_name)
        whole = refuse_wrong_rows(root, kind_name)
        files = [path for path in files_of(root) if path.stat().st_size]
        harmless = unserved = 0
        for _ in range(FLIPS):
            path = files[rng.integers(len(files))]
            byte, bit = int(rng.integers(path.stat().st_size)), int(rng.integers(8))
            before = path.read_bytes()
            path.write_bytes(flipped(before, byte, bit))
            served = refuse_wrong_rows(root, kind_name)
            faults = verify(root).faults
            if not faults:
                # Only where a document means the very same with and without the flip: 1e-05 and 1E-05.
                assert path.suffix == ".json", (path, byte, bit)
                assert meaning(before) == meaning(path.read_bytes()), (path, byte, bit)
                assert served == whole
                harmless += 1
            unserved += served < whole
            path.write_bytes(before)
        assert verify(root).sound
        print(f"{kind_name}: {FLIPS} flips, {harmless} harmless, {unserved} met by a reader and refused")
        assert harmless < FLIPS // 20


class TestFiles:
    @pytest.mark.parametrize("damage", ["delete", "empty", "halve", "cut two bytes", "add one byte", "zero", "link"])
    def test_every_file_is_missed_and_mended(
        self,
        fork_server: Any,
        undisturbed: Callable[[str], Path],
        damaged_copy: Copy,
        kind_name: str,
        damage: str,
        tree: Tree,
        refuse_wrong_rows: Refuse,
    ) -> None:
        """No wrong row is returned, `verify` finds it, and after `repair` and `resume` the store is bit-identical."""
        expected = tree(undisturbed(kind_name))
        for path in expected:
            root = damaged_copy(kind_name)
            do_damage(root, path, damage)
            refuse_wrong_rows(root, kind_name)
            assert not verify(root).sound, (path, damage)
            done = repair(root)
            refuse_wrong_rows(root, kind_name)
            assert fork_server.run("write", root=root, kind=kind_name) == 0, (path, damage, done, fork_server.said())
            assert tree(root) == expected, (path, damage, done)
            assert verify(root).sound

    def test_the_job_is_watched_too(self, damaged_copy: Copy) -> None:
        """A damaged job is a fault; a missing one is not, since only `resume` needs it."""
        root = damaged_copy("zarr")
        (root / "job.json").write_text("{}")
        [fault] = verify(root, every_fault=True).faults
        assert fault.path == "job.json"
        done = repair(root)
        assert done.moved == {"job.json": "damaged/job.json"}
        assert verify(root).sound


class TestBehindTheLedger:
    """Chunks that vanish while receipts and file sizes stay as they were."""

    @pytest.mark.parametrize("how", ["zeros", "hole", "with checksum", "all of the file"])
    @pytest.mark.parametrize("array", ["targets", "labels"])
    def test_a_chunk_of_zeros(
        self,
        fork_server: Any,
        undisturbed: Callable[[str], Path],
        damaged_copy: Copy,
        tree: Tree,
        refuse_wrong_rows: Refuse,
        kind_name: str,
        array: str,
        how: str,
    ) -> None:
        """Zeros are never returned as targets, although Fletcher-32 of zeros is zero; labels may well be zeros."""
        root = damaged_copy(kind_name)
        shard, chunk = (2, 1) if array == "labels" and kind_name != "zarr-sequences" else (0, 1)
        path, offset, size = chunk_place(root, array, shard, chunk)
        with path.open("r+b") as file:
            if how == "all of the file":
                offset, size = 0, path.stat().st_size
            file.seek(offset)
            file.write(bytes(size if how in ("with checksum", "all of the file", "hole") else size - 4))
        if tree(root) == tree(undisturbed(kind_name)):
            pytest.skip("this chunk was zeros before")
        refuse_wrong_rows(root, kind_name)
        assert not verify(root).sound
        assert not verify(root, sample=10_000).sound or how == "all of the file"
        repair(root)
        assert fork_server.run("write", root=root, kind=kind_name) == 0
        assert tree(root) == tree(undisturbed(kind_name))

    def test_chunks_that_change_places(self, damaged_copy: Copy, kind_name: str, refuse_wrong_rows: Refuse) -> None:
        """Each checksum is right, but the rows are swapped: the receipt shows it."""
        root = damaged_copy(kind_name)
        path, first, size = chunk_place(root, "targets", 0, 0)
        _, second, other = chunk_place(root, "targets", 0, 1)
        if size != other:
            pytest.skip("compressed chunks of different sizes cannot change places")
        raw = bytearray(path.read_bytes())
        raw[first : first + size], raw[second : second + size] = raw[second : second + size], raw[first : first + size]
        path.write_bytes(raw)
        refuse_wrong_rows(root, kind_name)
        assert not verify(root).sound
        assert not verify(root, sample=10_000).sound

    def test_receipts_that_change_places(self, damaged_copy: Copy, kind_name: str, refuse_wrong_rows: Refuse) -> None:
        """A receipt says which shard it is of."""
        root = damaged_copy(kind_name)
        one, two, aside = (root / "ledger" / name for name in ("00000000.json", "00000001.json", "aside"))
        one.rename(aside)
        two.rename(one)
        aside.rename(two)
        refuse_wrong_rows(root, kind_name)
        assert [fault.kind for fault in verify(root, every_fault=True).faults][:2] == ["document", "document"]

    def test_files_of_two_shards_change_places(
        self, damaged_copy: Copy, kind_name: str, refuse_wrong_rows: Refuse
    ) -> None:
        """Two intact files of one store, swapped: their chunks do not end as the receipt says."""
        root = damaged_copy(kind_name)
        one, two = (chunk_place(root, "targets", shard, 0)[0] for shard in (0, 1))
        aside = root / "aside"
        one.rename(aside)
        two.rename(one)
        aside.rename(two)
        refuse_wrong_rows(root, kind_name)
        assert not verify(root).sound

    def test_a_file_that_shrinks_under_a_reader(self, damaged_copy: Copy, fork_server: Any) -> None:
        """A shard that was not read yet is refused; the process lives."""
        root = damaged_copy("zarr")
        rows = LocalRows(root)
        rows.fetch(np.array([0]), ("targets",))
        path, _, _ = chunk_place(root, "targets", 1, 0)
        os.truncate(path, 10)
        with pytest.raises(SoftLabelsError, match="10 bytes"):
            rows.fetch(np.array([40]), ("targets",))
        rows.fetch(np.array([0]), ("targets",))


def flipped(raw: bytes, byte: int, bit: int) -> bytes:
    """These bytes with one bit changed."""
    return raw[:byte] + bytes([raw[byte] ^ 1 << bit]) + raw[byte + 1 :]


def meaning(raw: bytes) -> bytes:
    """What a JSON document says, however it is spelt."""
    return canonical_json(json.loads(raw))


def do_damage(root: Path, name: str, damage: str) -> None:
    """What may happen to a file as a whole."""
    path = root / name
    size = path.stat().st_size
    if damage == "delete":
        path.unlink()
    elif damage == "add one byte":
        with path.open("ab") as file:
            file.write(b"\0")
    elif damage == "zero":
        path.write_bytes(bytes(size))
    elif damage == "link":
        aside = root.with_name(f"{root.name}-aside")
        path.rename(aside)
        path.symlink_to(aside)
    else:
        os.truncate(path, {"empty": 0, "halve": size // 2, "cut two bytes": size - 2}[damage])
