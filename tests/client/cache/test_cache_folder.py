"""A cache's folder stays within its bound: old versions go first, those in use stay; `softlabels cache` shows it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from softlabels.cli import main
from softlabels.manifest import RowLayout
from softlabels.store import LocalRows
from softlabels.target_store import TargetStore
from softlabels_client.cache import CachedRows, CacheFolder, default_folder
from softlabels_client.cache.row_table import shape_within

Same = Callable[[Any, Any], None]


def filled(root: Path, folder: Path, **options: Any) -> TargetStore:
    """A store with all its rows in a cache."""
    store = TargetStore(CachedRows(LocalRows(root), folder=folder, **options), where="filled")
    list(store.epoch(seed=0, epoch=0, batch_size=40, **({"view": 0} if "views" in root.name else {})))
    return store


def names(folder: Path) -> set[str]:
    """The stores that a folder holds."""
    return {kept.name for kept in CacheFolder(folder).stores()}


def table_bytes(root: Path) -> int:
    """What a store's whole table takes."""
    shape = shape_within(LocalRows(root).manifest, 1 << 40)
    assert shape is not None
    return shape.size_bytes


def age(folder: Path, name: str, seconds: float) -> None:
    """Make a store's table look as if it was opened so long ago."""
    for kept in CacheFolder(folder).stores():
        if kept.name == name:
            moment = kept.last_opened_s - seconds
            os.utime(folder / "rows-v2" / kept.digest / "table.json", (moment, moment))


class TestBound:
    @pytest.mark.parametrize("kind", ["dense", "integers", "strings", "views", "named-views"])
    @pytest.mark.parametrize("most_bytes", [1_500, 6_000, 20_000, 1 << 30])
    def test_a_table_keeps_to_it(self, kind: str, most_bytes: int, stores: dict[str, Path], tmp_path: Path) -> None:
        """Files, to the last byte of what they may ever take; a table is as large as it can be."""
        manifest = LocalRows(stores[kind]).manifest
        shape = shape_within(manifest, most_bytes)
        filled(stores[kind], tmp_path, most_bytes=most_bytes).close()
        sizes = [p.stat().st_size for p in tmp_path.rglob("*") if p.name in ("rows", "index", "ids")]
        assert sum(sizes) == (0 if shape is None else shape.size_bytes) <= most_bytes
        if shape is not None and shape.slots < manifest.rows:
            assert shape.size_bytes > most_bytes - 200

    def test_a_store_far_larger_is_passed_through(
        self, stores: dict[str, Path], make_setting: Any, refuse_difference: Same, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Said once: a cache of a hundredth would be trouble for nothing."""
        setting = make_setting(stores["dense"], most_bytes=400)
        for _ in range(2):
            refuse_difference(setting.cached.batch([5, 6]), setting.near.batch([5, 6]))
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "no room for it" in caplog.text
        assert names(setting.folder) == set()

    def test_what_is_in_stays(self, stores: dict[str, Path], make_setting: Any) -> None:
        """Epochs in ever new orders find the same share: replaced rows would be gone when their turn comes."""
        setting = make_setting(stores["dense"], most_bytes=5_000)
        for epoch in range(4):
            setting.far.forget()
            list(setting.cached.epoch(seed=0, epoch=epoch, batch_size=10))
            asked = sum(setting.far.fetched)
            assert setting.far.epochs == (1 if epoch == 0 else 0)
        kept = CacheFolder(setting.folder).stores()[0].cached_rows
        assert asked == 120 - kept
        assert kept > 30


class TestVersions:
    def test_the_longest_unused_makes_room(self, stores: dict[str, Path], tmp_path: Path) -> None:
        """Whole versions go, never a part of one."""
        bound = sum(table_bytes(stores[kind]) for kind in ("dense", "strings", "integers")) - 1
        for kind in ("dense", "strings"):
            filled(stores[kind], tmp_path, most_bytes=bound).close()
        age(tmp_path, "dense", 10)
        age(tmp_path, "strings", 1000)
        filled(stores["integers"], tmp_path, most_bytes=bound).close()
        assert names(tmp_path) == {"dense", "integers"}

    def test_one_in_use_stays(self, stores: dict[str, Path], tmp_path: Path, refuse_difference: Same) -> None:
        """The newcomer takes what is left, and passes the rest through; it grows when there is room."""
        bound = table_bytes(stores["dense"]) + 10_000
        with filled(stores["dense"], tmp_path, most_bytes=bound):
            late = filled(stores["strings"], tmp_path, most_bytes=bound)
            assert names(tmp_path) == {"dense", "strings"}
            small = CacheFolder(tmp_path).stores()[0]
            assert small.cached_rows < 120
            late.close()
        filled(stores["strings"], tmp_path, most_bytes=bound).close()
        found = {kept.name: kept.cached_rows for kept in CacheFolder(tmp_path).stores()}
        assert found["strings"] > small.cached_rows

    def test_a_lower_bound_begins_anew(self, stores: dict[str, Path], tmp_path: Path) -> None:
        """A table that is too large by now goes; one that fits stays."""
        filled(stores["dense"], tmp_path).close()
        filled(stores["dense"], tmp_path, most_bytes=5_000).close()
        assert CacheFolder(tmp_path).stores()[0].size_bytes <= 5_000
        before = CacheFolder(tmp_path).stores()[0].cached_rows
        TargetStore(CachedRows(LocalRows(stores["dense"]), folder=tmp_path, most_bytes=5_100), where="x").close()
        assert CacheFolder(tmp_path).stores()[0].cached_rows == before

    def test_a_new_version_never_gets_old_rows(
        self, stores: dict[str, Path], other_version: Path, make_setting: Any, refuse_difference: Same
    ) -> None:
        """It has a table of its own; the old one is there until its room is needed."""
        setting = make_setting(stores["dense"])
        ids = setting.near.ids()
        setting.cached.batch(ids)
        later = make_setting(other_version)
        refuse_difference(later.cached.batch(ids), later.near.batch(ids))
        assert later.far.fetched == [120]
        refuse_difference(setting.cached.batch(ids), setting.near.batch(ids))
        assert [kept.name for kept in CacheFolder(setting.folder).stores()] == ["dense", "dense"]


class TestCommand:
    def test_list_and_clear(self, stores: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """What is kept, how much of it, and which is in use; a table in use stays."""
        open_one = filled(stores["dense"], tmp_path)
        filled(stores["views"], tmp_path).close()
        assert main(["cache", "list", "--folder", str(tmp_path)]) == 0
        listed = capsys.readouterr().out
        assert "dense" in listed
        assert "120 of 120" in listed
        assert "120 of 360" in listed
        assert "in use" in listed
        assert main(["cache", "clear", "--folder", str(tmp_path)]) == 0
        assert "dense" in capsys.readouterr().out
        assert names(tmp_path) == {"dense"}
        digest = open_one.digest
        open_one.close()
        assert main(["cache", "clear", "--folder", str(tmp_path), "--digest", "no-such"]) == 0
        assert names(tmp_path) == {"dense"}
        assert main(["cache", "clear", "--folder", str(tmp_path), "--digest", digest[:8]]) == 0
        assert names(tmp_path) == set()

    def test_no_cache(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Nothing to list, nothing to clear, and no folder made."""
        for word in ("list", "clear"):
            assert main(["cache", word, "--folder", str(tmp_path / "none")]) == 0
        assert not (tmp_path / "none").exists()
        assert str(tmp_path / "none") in capsys.readouterr().out

    def test_other_files_stay(self, stores: dict[str, Path], tmp_path: Path) -> None:
        """A folder may hold other things; they are neither counted nor removed."""
        (tmp_path / "precious").write_text("mine")
        (tmp_path / "rows-v2" / "precious").mkdir(parents=True)
        (tmp_path / "rows-v2" / "precious" / "file").write_text("mine")
        filled(stores["dense"], tmp_path).close()
        assert names(tmp_path) == {"dense"}
        assert main(["cache", "clear", "--folder", str(tmp_path)]) == 0
        assert (tmp_path / "precious").read_text() == "mine"
        assert (tmp_path / "rows-v2" / "precious" / "file").read_text() == "mine"


class TestDefaultFolder:
    def test_who_names_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """SOFTLABELS_CACHE, else the user's folder for caches."""
        monkeypatch.setenv("SOFTLABELS_CACHE", "/somewhere/else")
        assert default_folder() == Path("/somewhere/else")
        monkeypatch.delenv("SOFTLABELS_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert default_folder() == tmp_path / "softlabels"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert default_folder() == tmp_path / ".cache" / "softlabels"


class TestPlanning:
    def test_a_billion_samples(self, stores: dict[str, Path]) -> None:
        """How large a table is, is worked out and not tried."""
        manifest = LocalRows(stores["dense"]).manifest
        many = replace(manifest, layout=RowLayout(kind="single", samples=10**9, rows=10**9))
        shape = shape_within(many, 16 << 30)
        assert shape is not None
        assert 16 << 30 >= shape.size_bytes > (16 << 30) - 1000
        assert shape_within(many, 8 << 30) is None
