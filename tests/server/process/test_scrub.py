"""The background check: damage that nobody asked for is found, told and refused by name, by every process."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import urllib3

from softlabels.errors import ChecksumError, RequestError
from softlabels.store.ledger import Ledger
from softlabels.store.store_documents import load_manifest
from softlabels_server import Settings, StoreFolder
from softlabels_server.catalog import ScrubState
from softlabels_server.process.scrub import Scrubber
from tests.server.conftest import SHARD, make_rows, write_store

FIELDS = ("targets",)


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def file_of_shard(root: Path, shard: int) -> Path:
    """A file of a shard that its receipt lists."""
    receipt = Ledger(root, load_manifest(root)).read(shard)
    assert receipt is not None
    return root / max(receipt.files)


def wait_for(ready: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    give_up = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < give_up, "it did not happen"
        time.sleep(0.05)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with two stores of four shards."""
    write_store(tmp_path / "served" / "a", make_rows(1))
    write_store(tmp_path / "served" / "b", make_rows(2))
    return tmp_path / "served"


class TestRounds:
    def check(self, stores: StoreFolder, before: list[ScrubState]) -> ScrubState:
        """The state after one more round."""
        scrubber = self.scrubber = getattr(self, "scrubber", None) or Scrubber(stores, 0.01, before.append)
        scrubber.check_all(time.monotonic())
        stores.note_scrub(before[-1])
        return before[-1]

    def test_an_intact_folder(self, root: Path) -> None:
        """Every byte of every file is read, and nothing is refused."""
        stores, states = StoreFolder(root), list[ScrubState]()
        state = self.check(stores, states)
        assert (state.rounds, state.damage) == (1, ())
        assert state.read_bytes == state.total_bytes > 8 * 100 * 7 * 4
        assert state.finished_s is not None

    def test_a_damaged_shard_is_refused_until_it_is_read_intact(self, root: Path) -> None:
        """By name, also in a store that is already open; all other rows are served."""
        stores, states = StoreFolder(root), list[ScrubState]()
        rows = stores.get("a").rows
        everything = np.arange(100)
        rows.fetch(everything, FIELDS)
        path = file_of_shard(root / "a", 1)
        intact = path.read_bytes()
        flip(path)
        (damage,) = self.check(stores, states).damage
        assert (damage.store, damage.shard) == ("a", 1)
        assert path.name in damage.message
        for ids in (everything, np.array([SHARD])):
            with pytest.raises(ChecksumError, match="shard 1 of store 'a' is refused since the background check"):
                rows.fetch(ids, FIELDS)
        rows.fetch(np.array([0, SHARD - 1, 2 * SHARD]), FIELDS)
        stores.get("b").rows.fetch(everything, FIELDS)
        path.write_bytes(intact)
        assert self.check(stores, states).damage == ()
        rows.fetch(everything, FIELDS)

    def test_a_damaged_receipt_and_a_file_that_is_gone(self, root: Path) -> None:
        """Each refuses its shard; neither is forgotten in the next round."""
        stores, states = StoreFolder(root), list[ScrubState]()
        flip(root / "a" / "ledger" / "00000000.json")
        file_of_shard(root / "b", 3).unlink()
        for _ in range(2):
            found = self.check(stores, states).damage
            assert {(damage.store, damage.shard) for damage in found} == {("a", 0), ("b", 3)}

    def test_a_replaced_store_is_not_refused(self, root: Path, tmp_path: Path) -> None:
        """The damage was another version's."""
        stores, states = StoreFolder(root), list[ScrubState]()
        flip(file_of_shard(root / "a", 2))
        assert len(self.check(stores, states).damage) == 1
        (root / "a").rename(tmp_path / "old")
        write_store(root / "a", make_rows(1))
        stores.get("a").rows.fetch(np.arange(100), FIELDS)
        assert self.check(stores, states).damage == ()

    def test_the_rate_is_bounded(self, root: Path) -> None:
        """A round takes nearly its interval, however fast the disk."""
        scrubber = Scrubber(StoreFolder(root), 2.0, lambda state: None)
        began = time.monotonic()
        scrubber.check_all(began)
        assert 1.0 < time.monotonic() - began


class TestSetting:
    def test_it_is_a_number_and_a_unit(self) -> None:
        """As people write it."""
        found = [Settings(scrub=text).scrub_interval_s for text in ("30s", "5m", "24h", "7d")]
        assert found == [30.0, 300.0, 86_400.0, 604_800.0]
        assert Settings().scrub_interval_s is None
        for text in ("", "0h", "24", "h", "1.5h", "24 h", "-1h", "24h\n"):
            with pytest.raises(RequestError, match="scrub"):
                Settings(scrub=text)


class TestServing:
    @pytest.mark.parametrize("workers", [1, 2])
    def test_damage_is_in_the_log_and_in_health_and_refused(
        self, root: Path, start: Any, get: Any, workers: int
    ) -> None:
        """By every worker, whichever found it."""
        server = start(root, "--port", "0", "--scrub", "1s", "--workers", str(workers))
        address = server.address()

        def health() -> Any:
            return get(f"{address}/health").json().get("scrub")

        wait_for(lambda: health() is not None and health()["rounds"] > 0)
        assert health()["damaged"] == 0
        flip(file_of_shard(root / "b", 2))
        for _ in range(workers):  # a worker is told a moment after another
            wait_for(lambda: all(health()["damaged"] == 1 for _ in range(10)))
        wait_for(lambda: "scrub: shard 2 of store 'b' is refused" in server.printed)
        for _ in range(10):
            with urllib3.PoolManager() as pool:
                reply = pool.request("POST", f"{address}/v1/stores/b/batch", json={"ids": [2 * SHARD]}, retries=False)
            assert (reply.status, reply.json()["code"]) == (500, "checksum-mismatch")
            assert "shard 2 of store 'b' is refused" in reply.json()["detail"]
        assert server.end() == 0
