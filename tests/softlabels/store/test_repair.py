"""`repair`: what is faulty is taken out, what follows from sound parts is written again, and `resume` does the rest."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softlabels
from softlabels.cli import main
from softlabels.errors import RowsNotCommittedError, StoreExistsError
from softlabels.store import StoreWriter
from softlabels.store.ledger import Ledger
from softlabels.store.repair import repair
from softlabels.store.verify import verify

Tree = Callable[[Path], dict[str, str]]
Flip = Callable[..., None]


def shard_file(root: Path, shard: int) -> Path:
    """The file that holds the targets of a shard."""
    zarr = root / "targets" / "c" / str(shard) / "0"
    return zarr if zarr.exists() else root / "shards" / f"{shard:08d}.h5"


class TestSound:
    def test_nothing_happens(self, store: Path, tree: Tree) -> None:
        """A sound store stays as it is, byte for byte."""
        before = tree(store)
        done = repair(store)
        assert (done.faults, done.dropped, done.moved, done.rebuilt) == ((), [], {}, [])
        assert done.digest == softlabels.open(store).digest
        assert tree(store) == before

    def test_an_unfinished_store_stays_unfinished(self, source: Any, tmp_path: Path) -> None:
        """That shards are not there yet is no damage."""
        source.write(tmp_path / "s", shards=[1])
        done = repair(tmp_path / "s")
        assert (done.dropped, done.moved, done.digest) == ([], {}, None)


class TestDamagedShard:
    def test_it_is_dropped_and_resume_computes_just_that(
        self, source: Any, store: Path, tree: Tree, flip: Flip, tmp_path: Path
    ) -> None:
        """The store ends bit-identical with one that was never damaged."""
        before = tree(store)
        flip(shard_file(store, 2), byte=400)
        done = repair(store)
        assert done.dropped == [2]
        assert done.digest is None
        assert not (store / "manifest.json").exists()
        assert StoreWriter.resume(store).missing_shards() == [2]
        source.write(store)
        assert tree(store) == before
        assert verify(store).sound

    def test_its_bytes_are_kept_aside(self, store: Path, flip: Flip) -> None:
        """Nothing is deleted: the damaged file lies under damaged/, with the receipt and the manifest."""
        flip(shard_file(store, 2), byte=400)
        damaged = shard_file(store, 2).read_bytes()
        where = str(shard_file(store, 2).relative_to(store))
        done = repair(store)
        assert (store / done.moved[where]).read_bytes() == damaged
        assert {"manifest.json", "ledger/00000002.json"} <= set(done.moved)

    def test_other_shards_are_served_meanwhile(self, store: Path, source: Any, flip: Flip) -> None:
        """Rows of the dropped shard do not exist, all others do."""
        flip(shard_file(store, 2), byte=400)
        repair(store)
        if source.ids == "dense":
            rows = softlabels.open(store).batch([5, 5 + 199])
            np.testing.assert_array_equal(rows.logits(), source.logits()[[0, 199]])
            with pytest.raises(RowsNotCommittedError):
                softlabels.open(store).batch([5 + 128])

    def test_twice_is_once(self, store: Path, tree: Tree, flip: Flip) -> None:
        """A second repair finds nothing more to do."""
        flip(shard_file(store, 0), byte=400)
        repair(store)
        before = tree(store)
        again = repair(store)
        assert (again.dropped, again.moved) == ([], {})
        assert tree(store) == before

    def test_a_lost_receipt(self, source: Any, store: Path, tree: Tree) -> None:
        """A finished store without one of its receipts becomes unfinished."""
        before = tree(store)
        (store / "ledger" / "00000001.json").unlink()
        assert repair(store).dropped == [1]
        source.write(store)
        assert tree(store) == before

    def test_a_shard_that_a_writer_holds_is_left_to_it(self, store: Path, source: Any, flip: Flip) -> None:
        """Its receipt stays; the store is not published."""
        flip(shard_file(store, 0), byte=400)
        with Ledger(store, source.plan()).claim(0):
            done = repair(store)
        assert (done.dropped, done.busy, done.digest) == ([], [0], None)
        assert repair(store).dropped == [0]

    def test_strays_go(self, store: Path) -> None:
        """The store is whole again at once."""
        stray = shard_file(store, 0).parent / "extra"
        stray.write_bytes(b"?")
        done = repair(store)
        assert done.digest is not None
        assert not stray.exists()
        assert verify(store).sound


class TestSums:
    @pytest.mark.parametrize("damage", ["flip", "cut", "gone", "exchanged"])
    def test_they_follow_from_intact_rows(self, store: Path, tree: Tree, flip: Flip, damage: str) -> None:
        """Byte for byte as the receipt says: no row is computed again, and the store stays published."""
        before = tree(store)
        paths = [store / "sums" / f"{shard:08d}.u4" for shard in (1, 2)]
        if damage == "flip":
            flip(paths[0], byte=21)
        elif damage == "cut":
            paths[0].write_bytes(paths[0].read_bytes()[:10])
        elif damage == "gone":
            paths[0].unlink()
        else:
            one, two = (path.read_bytes() for path in paths)
            paths[0].write_bytes(two)
            paths[1].write_bytes(one)
        done = repair(store)
        assert (done.dropped, "manifest.json" in done.moved) == ([], False)
        assert set(done.rebuilt) <= {str(path.relative_to(store)) for path in paths}
        assert tree(store) == before

    def test_not_from_damaged_rows(self, store: Path, flip: Flip) -> None:
        """Rows and sums of one shard damaged: neither is made from the other."""
        flip(store / "sums" / "00000001.u4", byte=21)
        flip(shard_file(store, 1), byte=400)
        done = repair(store)
        assert (done.dropped, done.rebuilt) == ([1], [])


class TestDocuments:
    @pytest.mark.parametrize("damage", ["flip", "empty", "delete"])
    @pytest.mark.parametrize("name", ["plan.json", "manifest.json"])
    def test_one_follows_from_the_other(self, store: Path, tree: Tree, name: str, damage: str) -> None:
        """A plan follows from the manifest, a manifest from plan and receipts: both come back byte for byte."""
        before = tree(store)
        path = store / name
        if damage == "delete":
            path.unlink()
        else:
            raw = bytearray(path.read_bytes())
            raw[200] ^= 1
            path.write_bytes(raw if damage == "flip" else b"")
        assert repair(store).digest is not None
        assert tree(store) == before

    def test_both_lost(self, store: Path, source: Any, tree: Tree) -> None:
        """Nothing tells what the store holds, until a writer comes with the same plan: then the shards are kept."""
        before = tree(store)
        for name in ("plan.json", "manifest.json"):
            (store / name).write_text("{}")
        assert repair(store).plan_lost
        assert StoreWriter.create(store, source.plan()).missing_shards() == []
        assert repair(store).digest is not None
        assert tree(store) == before

    def test_both_lost_and_another_job(self, store: Path, source: Any) -> None:
        """Shards of one plan never become another's."""
        for name in ("plan.json", "manifest.json"):
            (store / name).unlink()
        with pytest.raises(StoreExistsError):
            StoreWriter.create(store, type(source)(ids=source.ids, container=source.container, teacher="other").plan())

    def test_the_plan_of_another_store(self, store: Path, source: Any, tmp_path: Path, tree: Tree) -> None:
        """Copied over this one's: the receipts tell which is right, so that no shard is lost to the stranger."""
        before = tree(store)
        type(source)(ids=source.ids, container=source.container, teacher="other").write(tmp_path / "other")
        shutil.copy(tmp_path / "other" / "plan.json", store / "plan.json")
        done = repair(store)
        assert (done.dropped, done.rebuilt) == ([], ["plan.json"])
        assert tree(store) == before

    def test_metadata_and_index(self, store: Path, tree: Tree, flip: Flip) -> None:
        """The format's own files and the id index are written again; the store stays published throughout."""
        before = tree(store)
        names = [name for name in before if name.startswith("index/") or name.endswith(("zarr.json", "store.h5"))]
        for number, name in enumerate(names):
            if number % 2:
                (store / name).unlink()
            else:
                flip(store / name, byte=(store / name).stat().st_size // 2)
        done = repair(store)
        assert sorted(done.rebuilt) == sorted(names)
        assert "manifest.json" not in done.moved
        assert tree(store) == before

    def test_a_damaged_index_and_a_damaged_shard(self, store: Path, source: Any, tree: Tree, flip: Flip) -> None:
        """The index needs every shard's ids: it is written when the store is published again."""
        before = tree(store)
        flip(shard_file(store, 1), byte=400)
        shutil.rmtree(store / "index", ignore_errors=True)
        assert repair(store).dropped == [1]
        source.write(store)
        assert tree(store) == before


class TestCommand:
    def test_it_lists_what_it_did(self, store: Path, flip: Flip, capsys: pytest.CaptureFixture[str]) -> None:
        """Faults, what was moved where, and what to do next; exit code 1 while shards are missing."""
        flip(shard_file(store, 2), byte=400)
        assert main(["repair", str(store)]) == 1
        out = capsys.readouterr().out
        assert "shard 2, " in out
        assert "damaged/ledger/00000002.json" in out
        assert f"softlabels resume {store}" in out

    def test_a_whole_store(self, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Exit code 0."""
        assert main(["repair", str(store)]) == 0
        assert "0 faults" in capsys.readouterr().out
