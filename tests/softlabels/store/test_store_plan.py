"""Where a store can be created: in an empty folder, one that a killed writer left, or one whose plan was lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softlabels.errors import ManifestError, StoreExistsError
from softlabels.store import StoreWriter

Tree = Callable[[Path], dict[str, str]]


class TestCreate:
    def test_a_missing_folder_is_made(self, source: Any, tmp_path: Path) -> None:
        """With its parents."""
        assert StoreWriter.create(tmp_path / "a" / "b", source.plan()).missing_shards() == [0, 1, 2, 3]

    def test_other_files_are_refused(self, source: Any, tmp_path: Path) -> None:
        """At any depth."""
        (tmp_path / "thesis" / "chapters").mkdir(parents=True)
        StoreWriter.create(tmp_path / "empty", source.plan())
        (tmp_path / "thesis" / "chapters" / "1.tex").write_text("mine")
        with pytest.raises(StoreExistsError):
            StoreWriter.create(tmp_path / "thesis", source.plan())

    def test_files_of_a_killed_writer_are_accepted(self, source: Any, tmp_path: Path) -> None:
        """Locks, a half-written plan, the job and what `repair` took out."""
        for name in ("locks/store.lock", "plan.json.part", "job.json", "damaged/plan.json", "staging/x.part"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("{}")
        source.write(tmp_path)

    def test_another_plan_is_refused(self, source: Any, store: Path) -> None:
        """The message says where they differ."""
        other = type(source)(ids=source.ids, container=source.container, teacher="hum")
        with pytest.raises(StoreExistsError, match="teachers"):
            StoreWriter.create(store, other.plan())

    def test_tables_must_be_those_of_the_plan(self, source: Any, tmp_path: Path) -> None:
        """A plan that lists files needs their contents."""
        with pytest.raises(ManifestError):
            StoreWriter.create_with_files(tmp_path, source.plan(), {"index/offsets.npy": b"?"})


class TestLostPlan:
    def test_shards_are_kept_for_the_same_plan(self, source: Any, store: Path, tree: Tree) -> None:
        """Weeks of work do not depend on one small file."""
        before = tree(store)
        for name in ("plan.json", "manifest.json"):
            (store / name).unlink()
        source.write(store)
        assert tree(store) == before

    def test_damaged_receipts_are_ignored(self, source: Any, store: Path) -> None:
        """As long as one is valid; `repair` drops the others when there is a plan again."""
        for name in ("plan.json", "manifest.json"):
            (store / name).unlink()
        (store / "ledger" / "00000002.json").write_text("{}")
        assert StoreWriter.create(store, source.plan()).missing_shards() == []

    def test_shards_of_another_plan_are_refused(self, source: Any, store: Path) -> None:
        """Also when some of them are damaged."""
        for name in ("plan.json", "manifest.json"):
            (store / name).unlink()
        (store / "ledger" / "00000000.json").write_text("{}")
        other = type(source)(ids=source.ids, container=source.container, teacher="hum")
        with pytest.raises(StoreExistsError):
            StoreWriter.create(store, other.plan())
