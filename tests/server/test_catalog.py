"""Which folders are stores, what they are called, and what is kept out."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from softlabels.errors import DamageError, ManifestError, StoreChangedError, UnknownStoreError
from softlabels_server import StoreFolder
from softlabels_server.catalog import BrokenStore


class TestFinding:
    def test_stores_directly_below_the_folder(self, stores: Any, write: Any, rows_of: Any, tmp_path: Path) -> None:
        """Not deeper ones, not files, not folders that are no store, not names that no URL segment may have."""
        write(tmp_path / "here", rows_of())
        write(tmp_path / "deeper" / "below", rows_of())
        write(tmp_path / "has space", rows_of(), name="spaced")
        write(tmp_path / ".hidden", rows_of(), name="hidden")
        (tmp_path / "file").write_text("manifest.json")
        (tmp_path / "empty").mkdir()
        assert StoreFolder(tmp_path).names() == ["here"]

    def test_the_folder_names_the_store(self, write: Any, rows_of: Any, tmp_path: Path) -> None:
        """A copy under another name is another store, whatever its manifest calls it."""
        write(tmp_path / "copy-2", rows_of(), name="mnist")
        store = StoreFolder(tmp_path).get("copy-2")
        assert (store.name, store.manifest.name) == ("copy-2", "mnist")

    def test_the_folder_may_be_a_store_itself(self, write: Any, rows_of: Any, tmp_path: Path) -> None:
        """It is called as it would be from its parent, and what lies in it is no store."""
        write(tmp_path / "mnist", rows_of())
        folder = StoreFolder(tmp_path / "mnist")
        assert folder.names() == ["mnist"]
        assert folder.get("mnist").digest == StoreFolder(tmp_path).get("mnist").digest
        with pytest.raises(UnknownStoreError):
            folder.get("targets")

    def test_a_store_in_a_folder_that_no_url_can_name(self, write: Any, rows_of: Any, tmp_path: Path) -> None:
        """Served by itself it is called what its maker called it."""
        write(tmp_path / "my store", rows_of(), name="mine")
        assert StoreFolder(tmp_path / "my store").names() == ["mine"]

    def test_no_such_folder(self, tmp_path: Path) -> None:
        """Said at once, and also of a file."""
        with pytest.raises(UnknownStoreError, match="no folder"):
            StoreFolder(tmp_path / "nowhere")
        (tmp_path / "file").write_text("")
        with pytest.raises(UnknownStoreError, match="not a folder"):
            StoreFolder(tmp_path / "file")


class TestLinks:
    def test_a_link_within_the_folder_is_followed(self, write: Any, rows_of: Any, tmp_path: Path) -> None:
        """`latest` may point at its neighbour."""
        write(tmp_path / "v1", rows_of())
        (tmp_path / "latest").symlink_to("v1")
        folder = StoreFolder(tmp_path)
        assert folder.names() == ["latest", "v1"]
        assert folder.get("latest").digest == folder.get("v1").digest

    def test_a_link_out_of_the_folder_is_not(self, write: Any, rows_of: Any, tmp_path: Path) -> None:
        """A link in the folder must not publish what is outside of it."""
        write(tmp_path / "private" / "secret", rows_of())
        (tmp_path / "public").mkdir()
        (tmp_path / "public" / "secret").symlink_to(tmp_path / "private" / "secret")
        folder = StoreFolder(tmp_path / "public")
        assert folder.names() == []
        with pytest.raises(UnknownStoreError):
            folder.get("secret")

    def test_the_root_may_be_a_link(self, write: Any, rows_of: Any, tmp_path: Path) -> None:
        """The operator named it."""
        write(tmp_path / "real" / "x", rows_of())
        (tmp_path / "link").symlink_to("real")
        assert StoreFolder(tmp_path / "link").names() == ["x"]


class TestOpening:
    def test_an_open_store_is_kept(self, stores: Any) -> None:
        """`opened` knows only what `get` has opened, and gives the same object."""
        folder = StoreFolder(stores.root)
        assert folder.opened("dense") is None
        store = folder.get("dense")
        assert folder.opened("dense") is store
        assert folder.get("dense") is store

    def test_a_replaced_store_is_opened_again(self, write: Any, rows_of: Any, tmp_path: Path) -> None:
        """Another manifest file is another version; what was read from the old one stays readable."""
        write(tmp_path / "x", rows_of(1))
        folder = StoreFolder(tmp_path)
        old = folder.get("x")
        os.rename(tmp_path / "x", tmp_path / "old")
        write(tmp_path / "x", rows_of(2))
        assert folder.opened("x") is None
        new = folder.get("x")
        assert new.digest != old.digest
        assert old.rows.fetch(rows_of().ids[:2], ("targets",))["targets"].shape == (2, 7)

    def test_a_store_written_over_in_place_is_opened_again(self, write: Any, rows_of: Any, tmp_path: Path) -> None:
        """Also where size and times of the files are kept: the time of the last change cannot be set."""
        write(tmp_path / "x" / "s", rows_of(1))
        write(tmp_path / "new" / "s", rows_of(2))
        folder = StoreFolder(tmp_path / "x")
        old = folder.get("s")
        for path in sorted((tmp_path / "new" / "s").rglob("*")):
            there = tmp_path / "x" / "s" / path.relative_to(tmp_path / "new" / "s")
            if path.is_file() and there.exists():
                before = there.stat()
                there.write_bytes(path.read_bytes())
                os.utime(there, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert folder.opened("s") is None
        assert folder.get("s").digest != old.digest
        with pytest.raises(StoreChangedError):
            old.rows.fetch(rows_of().ids[:2], ("targets",))

    def test_threads_open_a_store_once(self, stores: Any) -> None:
        """All get the same object."""
        folder = StoreFolder(stores.root)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: folder.get("dense"), range(32)))
        assert len({id(store) for store in found}) == 1

    def test_a_store_that_cannot_be_opened_is_no_missing_store(self, write: Any, rows_of: Any, tmp_path: Path) -> None:
        """It is listed with its error, and asking for it raises that error again and again."""
        write(tmp_path / "bad", rows_of())
        (tmp_path / "bad" / "manifest.json").write_text("{")
        folder = StoreFolder(tmp_path)
        (entry,) = folder
        assert isinstance(entry, BrokenStore)
        assert isinstance(entry.error, ManifestError)
        for _ in range(2):
            with pytest.raises(ManifestError):
                folder.get("bad")

    def test_what_cannot_be_looked_into_is_listed_too(self, write: Any, rows_of: Any, tmp_path: Path) -> None:
        """A link that leads to itself may have been a store; the others are served as before."""
        write(tmp_path / "good", rows_of())
        (tmp_path / "loop").symlink_to("loop")
        good, loop = StoreFolder(tmp_path)
        assert good.name == "good"
        assert isinstance(loop, BrokenStore)
        assert isinstance(loop.error, ManifestError)

    def test_a_folder_that_went_away(self, tmp_path: Path) -> None:
        """Is no folder without stores."""
        (tmp_path / "root").mkdir()
        folder = StoreFolder(tmp_path / "root")
        (tmp_path / "root").rmdir()
        with pytest.raises(DamageError, match="cannot be listed"):
            folder.names()

    def test_a_near_miss_gets_a_hint(self, stores: Any) -> None:
        """The message names the store that was probably meant."""
        with pytest.raises(UnknownStoreError, match="did you mean 'sparse'"):
            StoreFolder(stores.root).get("spare")
