"""A served store that is renamed away, copied over or cut: each row is of the version whose digest it came with."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softlabels
from softlabels.errors import SoftLabelsError
from softlabels_server import StoreFolder
from tests.server.conftest import ROWS, Rows, make_rows, write_store

SEEDS = (1, 2)

EXPECTED = {"store-changed", "unknown-store", "checksum-mismatch", "truncated", "bad-manifest"}
"""What a reader is told while files are exchanged under it. Any other code would be misleading."""


@pytest.fixture
def versions(tmp_path: Path) -> dict[str, Rows]:
    """Two runs of one job on different data, in `version-1` and `version-2`; their rows by digest."""
    found = {}
    for seed in SEEDS:
        rows = make_rows(seed)
        manifest = write_store(tmp_path / f"version-{seed}", rows, name="s")
        found[manifest.digest] = rows
    assert len(found) == len(SEEDS)
    (tmp_path / "served").mkdir()
    shutil.copytree(tmp_path / "version-1", tmp_path / "served" / "s")
    return found


def read(url: str, versions: dict[str, Rows], until: Callable[[], bool]) -> Counter[str]:
    """Read batches and epochs again and again; return how many rows were right, and how often which error came."""
    rng = np.random.default_rng()
    found: Counter[str] = Counter()
    while not until():
        try:
            with softlabels.open(url) as store:
                expected = versions[store.digest].logits_BC
                for _ in range(20):
                    ids = rng.integers(0, ROWS, size=16)
                    np.testing.assert_array_equal(store.batch(ids).logits(), expected[ids])
                    found["right"] += 1
                for batch in store.epoch(seed=int(rng.integers(1000)), epoch=0, batch_size=10):
                    np.testing.assert_array_equal(batch.logits(), expected[batch.ids])
                    found["right"] += 1
        except SoftLabelsError as error:
            if error.code not in EXPECTED:
                raise
            found[error.code] += 1
    return found


def read_while(url: str, versions: dict[str, Rows], change: Callable[[], None]) -> Counter[str]:
    """Read in two threads while `change` runs, and a little longer."""
    stopped: list[bool] = []
    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read, url, versions, lambda: bool(stopped)) for _ in range(2)]
        try:
            change()
            time.sleep(0.5)
        finally:
            stopped.append(True)
        return sum((reader.result() for reader in readers), Counter())


class TestReplaced:
    def test_renamed_away(self, versions: dict[str, Rows], tmp_path: Path, start: Any) -> None:
        """Both versions take turns under one name."""
        server = start(tmp_path / "served", "--port", "0")
        url = f"{server.address()}/s"

        def exchange() -> None:
            served, copy = tmp_path / "served" / "s", tmp_path / "copy"
            for turn in range(30):
                shutil.copytree(tmp_path / f"version-{SEEDS[turn % 2]}", copy)
                served.rename(tmp_path / "old")
                copy.rename(served)
                shutil.rmtree(tmp_path / "old")
                time.sleep(0.03)

        found = read_while(url, versions, exchange)
        assert found["right"] > 50, found
        assert server.end() == 0, server.printed

    def test_copied_over(self, versions: dict[str, Rows], tmp_path: Path, start: Any) -> None:
        """As `cp -r new/. store/` does: files are cut and written again in place. The server answers to the end."""
        server = start(tmp_path / "served", "--port", "0")
        url = f"{server.address()}/s"

        def copy_over() -> None:
            for turn in range(30):
                shutil.copytree(tmp_path / f"version-{SEEDS[turn % 2]}", tmp_path / "served" / "s", dirs_exist_ok=True)
                time.sleep(0.02)

        found = read_while(url, versions, copy_over)
        assert found["right"] > 20, found
        # What lies there now is a whole version: it is served.
        with softlabels.open(url) as store:
            logits = store.batch(np.arange(ROWS)).logits()
        np.testing.assert_array_equal(logits, versions[store.digest].logits_BC)
        assert server.end() == 0, server.printed

    def test_cut(self, versions: dict[str, Rows], tmp_path: Path, start: Any) -> None:
        """Mapped files that are truncated under the server: an error for their rows, and no end of the process."""
        server = start(tmp_path / "served", "--port", "0")
        url = f"{server.address()}/s"
        everything = np.arange(ROWS)
        time.sleep(1.1)  # from now on the event loop itself reads the store
        with softlabels.open(url) as store:
            for _ in range(3):
                store.batch(everything)
            for folder, _, names in os.walk(tmp_path / "served" / "s" / "targets"):
                for name in names:
                    os.truncate(Path(folder) / name, 16)
            for _ in range(5):
                with pytest.raises(SoftLabelsError) as raised:
                    store.batch(everything)
                assert raised.value.code in ("truncated", "checksum-mismatch")
        assert server.end() == 0, server.printed


class TestInPlace:
    def test_a_manifest_written_over_with_its_size_and_time_kept(
        self, versions: dict[str, Rows], tmp_path: Path
    ) -> None:
        """Another version, although its file looks as before."""
        folder = StoreFolder(tmp_path / "served")
        old = folder.get("s")
        path = tmp_path / "served" / "s" / "manifest.json"
        status = path.stat()
        shutil.copytree(tmp_path / "version-2", tmp_path / "served" / "s", dirs_exist_ok=True)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert path.stat().st_size == status.st_size
        assert path.stat().st_mtime_ns == status.st_mtime_ns
        assert folder.opened("s") is None
        new = folder.get("s")
        assert new.digest != old.digest
        found = new.rows.fetch(np.arange(ROWS), ("targets",))["targets"]
        np.testing.assert_array_equal(found, versions[new.digest].logits_BC)
