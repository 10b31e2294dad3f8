"""A cache in front of a store gives what the store gives, asks for a row once, and survives what happens to disks."""

from __future__ import annotations

import logging
import multiprocessing
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softlabels
from softlabels.errors import BadIdsError, RequestError, UnknownFieldError, UnknownIdError
from softlabels.store import LocalRows
from softlabels.target_store import TargetStore
from softlabels_client import HttpRows
from softlabels_client.cache import CachedRows, CacheFolder

Same = Callable[[Any, Any], None]
KINDS = ("dense", "integers", "strings", "views", "named-views")


def some_ids(store: TargetStore, *places: int) -> Any:
    """The ids of the samples at these places of the store."""
    return store.ids()[list(places)]


def views_of(store: TargetStore, count: int) -> dict[str, Any]:
    """Which views to ask for, where a store keeps any."""
    kept = store.manifest.layout.views
    return {} if kept == 1 else {"views": np.arange(count) % kept, "view_parameters": True}


@pytest.mark.parametrize("kind", KINDS)
class TestBatches:
    def test_only_missing_rows_are_asked_for(
        self, kind: str, stores: dict[str, Path], make_setting: Any, refuse_difference: Same
    ) -> None:
        """In the order asked, repeated or not; what came once comes from the disk."""
        setting = make_setting(stores[kind])
        first = some_ids(setting.near, 3, 8, 3, 100, 119)
        second = some_ids(setting.near, 8, 0, 119, 0)
        same_views = {} if "views" not in kind else {"views": 1, "view_parameters": True}
        refuse_difference(setting.cached.batch(first, **same_views), setting.near.batch(first, **same_views))
        refuse_difference(setting.cached.batch(second, **same_views), setting.near.batch(second, **same_views))
        assert setting.far.fetched == [4, 1]
        refuse_difference(setting.cached.batch(first, **same_views), setting.near.batch(first, **same_views))
        assert setting.far.fetched == [4, 1]

    def test_a_field_asked_for_later_is_added(
        self, kind: str, stores: dict[str, Path], make_setting: Any, refuse_difference: Same
    ) -> None:
        """Fingerprints are fetched when they are first wanted, and the rows beside them stay."""
        setting = make_setting(stores[kind])
        ids = some_ids(setting.near, 5, 6, 7)
        keys = views_of(setting.near, 3)
        setting.cached.batch(ids, labels=False, **keys)
        for _ in range(2):
            found = setting.cached.batch(ids, fingerprints=True, **keys)
            refuse_difference(found, setting.near.batch(ids, fingerprints=True, **keys))
            refuse_difference(setting.cached.batch(ids, **keys), setting.near.batch(ids, **keys))
        assert setting.far.fetched == [3, 3]

    def test_it_is_there_when_opened_again(
        self, kind: str, stores: dict[str, Path], make_setting: Any, refuse_difference: Same
    ) -> None:
        """By another process too: everything is on the disk."""
        setting = make_setting(stores[kind])
        ids = some_ids(setting.near, *range(20))
        keys = views_of(setting.near, 20)
        setting.cached.batch(ids, **keys)
        setting.cached.close()
        setting.far.forget()
        refuse_difference(setting.again().batch(ids, **keys), setting.near.batch(ids, **keys))
        refuse_difference(setting.cached.batch(ids, **keys), setting.near.batch(ids, **keys))
        assert setting.far.fetched == []


class TestViews:
    def test_a_target_of_one_view_never_serves_another(
        self, stores: dict[str, Path], make_setting: Any, refuse_difference: Same
    ) -> None:
        """The view is part of what a row is kept under."""
        for kind in ("views", "named-views"):
            setting = make_setting(stores[kind])
            ids = some_ids(setting.near, 4, 5)
            for views in ([0, 1], [1, 0], [2, 2], [0, 2]):
                refuse_difference(setting.cached.batch(ids, views=views), setting.near.batch(ids, views=views))


class TestRefusals:
    @pytest.mark.parametrize(
        ("asked", "error"),
        [
            ({"ids": [5, 1000]}, UnknownIdError),
            ({"ids": [4]}, UnknownIdError),
            ({"ids": ["a"]}, BadIdsError),
            ({"ids": [5], "views": 0}, RequestError),
            ({"ids": [5], "spans": [(0, 1)]}, RequestError),
            ({"ids": [5], "view_parameters": True}, UnknownFieldError),
        ],
    )
    def test_what_the_store_refuses_is_refused(
        self, asked: dict[str, Any], error: type[Exception], stores: dict[str, Path], make_setting: Any
    ) -> None:
        """With the store's own error, whatever is in the cache."""
        setting = make_setting(stores["dense"])
        setting.cached.batch([5, 6])
        with pytest.raises(error):
            setting.cached.batch(**asked)

    @pytest.mark.parametrize("views", [None, [3], [-1]])
    def test_a_view_that_is_not_kept(self, views: list[int] | None, stores: dict[str, Path], make_setting: Any) -> None:
        """Or none at all."""
        with pytest.raises(RequestError, match="view"):
            make_setting(stores["views"]).cached.batch([5], views=views)

    def test_an_id_longer_than_any_of_the_store(self, stores: dict[str, Path], make_setting: Any) -> None:
        """It is the store that says that it knows no such sample."""
        with pytest.raises((UnknownIdError, BadIdsError)):
            make_setting(stores["strings"]).cached.batch(["x" * 100])

    def test_a_bound_of_nothing(self, stores: dict[str, Path]) -> None:
        """Is a mistake."""
        with pytest.raises(RequestError, match="holds no row"):
            CachedRows(LocalRows(stores["dense"]), most_bytes=0)


class TestReadOnly:
    def test_nothing_is_written(
        self, stores: dict[str, Path], make_setting: Any, refuse_difference: Same, tmp_path: Path
    ) -> None:
        """What is there is used; the rest comes from the server each time, and no file changes."""
        setting = make_setting(stores["strings"])
        ids = some_ids(setting.near, *range(30))
        setting.cached.batch(ids[:10])
        setting.cached.close()
        before = {path: path.read_bytes() for path in setting.folder.rglob("*") if path.is_file()}
        setting.far.forget()
        shared = setting.again(read_only=True)
        for _ in range(2):
            refuse_difference(shared.batch(ids), setting.near.batch(ids))
            list(shared.epoch(seed=0, epoch=0, batch_size=50))
        assert setting.far.fetched == [20, 20]
        assert {path: path.read_bytes() for path in setting.folder.rglob("*") if path.is_file()} == before

    def test_a_cache_that_is_not_there(
        self, stores: dict[str, Path], make_setting: Any, caplog: pytest.LogCaptureFixture, refuse_difference: Same
    ) -> None:
        """All rows come from the server, which is said once; no folder appears."""
        setting = make_setting(stores["dense"], read_only=True)
        refuse_difference(setting.cached.batch([5, 6]), setting.near.batch([5, 6]))
        assert not setting.folder.exists()
        assert "read-only" in caplog.text


def fill_from_another_process(root: Path, folder: Path, begin: int) -> None:
    """Fill a cache with a part of a store's samples, in batches."""
    store = TargetStore(CachedRows(LocalRows(root), folder=folder), where="child")
    ids = store.ids()
    for first in range(begin, begin + 80, 10):
        store.batch(ids[first : first + 10])


UNFINISHED = """
import sys
from pathlib import Path
from softlabels.target_store import TargetStore
from softlabels.store import LocalRows
from softlabels_client.cache import CachedRows

store = TargetStore(CachedRows(LocalRows(Path(sys.argv[1])), folder=sys.argv[2]), where="unfinished")
store.batch(store.ids()[:40])
epoch = store.epoch(seed=0, epoch=0, batch_size=4)
print(sum(len(next(epoch)) for _ in range(10)))
"""


class TestSharing:
    @pytest.mark.parametrize("kind", ["dense", "strings"])
    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_processes_fill_one_cache(
        self, kind: str, method: str, stores: dict[str, Path], make_setting: Any, refuse_difference: Same
    ) -> None:
        """Overlapping parts, at the same time: every row is there afterwards, once, and right."""
        setting = make_setting(stores[kind])
        context = multiprocessing.get_context(method)
        parts = [
            context.Process(target=fill_from_another_process, args=(stores[kind], setting.folder, begin))
            for begin in (0, 40)
        ]
        for part in parts:
            part.start()
        for part in parts:
            part.join(60)
            assert part.exitcode == 0
        ids = setting.near.ids()
        refuse_difference(setting.cached.batch(ids), setting.near.batch(ids))
        assert setting.far.fetched == []
        assert CacheFolder(setting.folder).stores()[0].cached_rows == 120

    def test_threads_fill_one_cache(self, stores: dict[str, Path], make_setting: Any, refuse_difference: Same) -> None:
        """Through one object."""
        setting = make_setting(stores["strings"])
        ids = setting.near.ids()
        orders = [np.random.default_rng(seed).permutation(120) for seed in range(4)]

        def read(order: Any) -> None:
            for first in range(0, 120, 10):
                part = ids[order[first : first + 10]]
                refuse_difference(setting.cached.batch(part), setting.near.batch(part))

        threads = [threading.Thread(target=read, args=(order,)) for order in orders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        setting.far.forget()
        refuse_difference(setting.cached.batch(ids), setting.near.batch(ids))
        assert setting.far.fetched == []

    def test_a_forked_child_goes_on_with_it(
        self, stores: dict[str, Path], make_setting: Any, refuse_difference: Same
    ) -> None:
        """What the child adds, the parent finds."""
        setting = make_setting(stores["dense"])
        setting.cached.batch([5, 6])
        child = multiprocessing.get_context("fork").Process(target=setting.cached.batch, args=([7, 8],))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        refuse_difference(setting.cached.batch([5, 6, 7, 8]), setting.near.batch([5, 6, 7, 8]))
        assert setting.far.fetched == [2]

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_a_child_forked_while_a_thread_writes_holds_nothing_up(
        self, stores: dict[str, Path], make_setting: Any, refuse_difference: Same
    ) -> None:
        """It has copies of whatever was open and locked at that moment, and the parent goes on all the same."""
        setting = make_setting(stores["dense"])
        ids = setting.near.ids()
        done = threading.Event()

        def write() -> None:
            while not done.is_set():
                for first in range(0, 120, 4):
                    setting.cached.batch(ids[first : first + 4])
                setting.cached.close()
                CacheFolder(setting.folder).clear()

        writer = threading.Thread(target=write)
        writer.start()
        children = [multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)) for _ in range(30)]
        try:
            for child in children:
                child.start()
            done.set()
            writer.join(20)
            assert not writer.is_alive(), "a lock is held by a child that knows nothing of it"
            refuse_difference(setting.cached.batch(ids), setting.near.batch(ids))
        finally:
            for child in children:
                child.kill()
                child.join()

    def test_a_process_that_ends_in_the_middle_of_an_epoch(self, stores: dict[str, Path], tmp_path: Path) -> None:
        """Ends at once and without complaint, its thread too."""
        done = subprocess.run(
            [sys.executable, "-c", UNFINISHED, str(stores["strings"]), str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "40\n", "")

    def test_it_pickles(self, served_store: str, tmp_path: Path) -> None:
        """As data sets do on their way to a worker; the server is not asked again."""
        rows = CachedRows(HttpRows(served_store), folder=tmp_path)
        ids = np.arange(9)
        expected = rows.fetch(ids, ("targets",))["targets"]
        copy = pickle.loads(pickle.dumps(rows))
        np.testing.assert_array_equal(copy.fetch(ids, ("targets",))["targets"], expected)
        copy.close()
        rows.close()


class TestOpening:
    def test_open_takes_a_cache(self, served_store: str, tiny_store: Path, tmp_path: Path) -> None:
        """A folder, or True for the one that the environment names."""
        near = softlabels.open(tiny_store)
        with softlabels.open(served_store, cache=tmp_path / "kept", cache_bytes=1 << 20) as store:
            np.testing.assert_array_equal(store.batch([4, 9]).logits(), near.batch([4, 9]).logits())
        assert CacheFolder(tmp_path / "kept").stores()[0].cached_rows == 2

    def test_the_environment_names_the_folder(
        self, served_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """SOFTLABELS_CACHE, where True is all that the caller says."""
        monkeypatch.setenv("SOFTLABELS_CACHE", str(tmp_path / "named"))
        with softlabels.open(served_store, cache=True) as store:
            store.batch([1])
        assert CacheFolder(tmp_path / "named").stores()[0].name == "tiny"

    def test_a_bound_without_a_cache(self, served_store: str) -> None:
        """Is a mistake."""
        with pytest.raises(RequestError, match="cache=True"):
            softlabels.open(served_store, cache_bytes=100)

    def test_a_folder_that_cannot_be(self, served_store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Said once; the rows come from the server."""
        (tmp_path / "file").write_text("")
        with softlabels.open(served_store, cache=tmp_path / "file") as store:
            assert len(store.batch([1, 2])) == 2
            assert len(store.batch([1, 2])) == 2
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "cannot be used" in caplog.text


class TestWhatIsPassedThrough:
    def test_sequences(self, stores: dict[str, Path], make_setting: Any, caplog: pytest.LogCaptureFixture) -> None:
        """A store of sequences is asked every time; no folder appears, and nothing is said."""
        setting = make_setting(stores["sequences"])
        for _ in range(2):
            for asked in ({}, {"spans": [(0, 1), (1, 3)]}):
                found, expected = (store.batch([3, 4], **asked) for store in (setting.cached, setting.near))
                np.testing.assert_array_equal(found.logits(), expected.logits())
                np.testing.assert_array_equal(found.row_offsets, expected.row_offsets)
            steps = list(setting.cached.epoch(seed=0, epoch=0, batch_size=50))
            assert sum(map(len, steps)) == 120
        assert setting.far.fetched == [2, 2, 2, 2]
        assert setting.far.epochs == 2
        assert not setting.folder.exists()
        assert caplog.text == ""
