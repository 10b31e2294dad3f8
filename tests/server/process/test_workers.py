"""Supervisor of several workers: one port, restarts, and how they end."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import urllib3

from softlabels.errors import WorkerDiedError
from softlabels_server import Settings
from softlabels_server.process.server import listen
from softlabels_server.process.workers import WorkerSupervisor

START_S = 60.0
"""Far more than a start takes: the machine may be busy."""

Start = Callable[..., Any]
Get = Callable[..., Any]


def children_of(pid: int) -> list[int]:
    """Processes that this one started and that serve, those of its bookkeeping left out."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone since it was listed
            parent = int(status.read_text(encoding="utf-8").rpartition(")")[2].split()[1])
            command = (status.parent / "cmdline").read_bytes()
            if parent == pid and b"spawn_main" in command:
                found.append(int(status.parent.name))
    return sorted(found)


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it holds; the machine may be busy."""
    give_up = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < give_up, "it did not come to that"
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
class TestWorkers:
    def test_they_share_one_port_and_one_line(self, start: Start, stores: Any, get: Get) -> None:
        """The address is announced once, when all of them answer, and leads to each of them."""
        process = start(stores.root, "--port", 0, "--workers", 2, "--access-log")
        address = process.address()
        assert len(children_of(process.popen.pid)) == 2
        for _ in range(20):
            assert get(f"{address}/health").json()["stores"] == 7
        assert process.end() == 0
        assert process.printed.count("softlabels: serving") == 1
        assert process.printed.count("softlabels: stopped") == 1
        assert process.printed.count("GET /health HTTP/1.1") == 20

    def test_one_that_dies_is_started_again(self, start: Start, stores: Any, get: Get) -> None:
        """With a line that says so; the port answers all the while."""
        process = start(stores.root, "--port", 0, "--workers", 2)
        address = process.address()
        before = children_of(process.popen.pid)
        os.kill(before[1], signal.SIGKILL)
        wait_for(lambda: "was ended by SIGKILL and is started again" in process.printed)
        assert get(f"{address}/health").status == 200
        wait_for(lambda: len(children_of(process.popen.pid)) == 2)
        after = children_of(process.popen.pid)
        assert before[0] in after
        assert before[1] not in after
        os.kill(before[0], signal.SIGKILL)
        assert get(f"{address}/health").status == 200
        assert process.end() == 0

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_all_stop_when_told_to(self, start: Start, stores: Any, number: signal.Signals) -> None:
        """Told as a terminal or a service manager does, all at once: exit code 0 and no traceback."""
        process = start(stores.root, "--port", 0, "--workers", 2)
        address = process.address()
        workers = children_of(process.popen.pid)
        with urllib3.PoolManager() as pool:
            assert pool.request("GET", f"{address}/health").status == 200
            for pid in workers:
                os.kill(pid, number)
            assert process.end(number) == 0
        assert not any(map(is_running, workers))
        assert process.printed.endswith("softlabels: stopped\n")
        assert "Traceback" not in process.printed
        assert "started again" not in process.printed

    def test_they_do_not_outlive_a_killed_parent(self, start: Start, stores: Any) -> None:
        """Nobody is left to hold the port."""
        process = start(stores.root, "--port", 0, "--workers", 2)
        address = process.address()
        workers = children_of(process.popen.pid)
        process.end(signal.SIGKILL)
        wait_for(lambda: not any(map(is_running, workers)))
        second = start(stores.root, "--port", address.rpartition(":")[2])
        assert second.address() == address

    def test_each_notices_a_replaced_store(
        self, start: Start, tmp_path: Path, write: Callable[..., Any], rows_of: Callable[..., Any], get: Get
    ) -> None:
        """The version that lies on disk is the one that every worker serves."""
        root = tmp_path / "stores"
        write(root / "one", rows_of(0))
        address = start(root, "--port", 0, "--workers", 2).address()
        first = {get(f"{address}/v1/stores/one").headers["etag"] for _ in range(12)}
        write(root / "two", rows_of(1), name="one")
        (root / "one").rename(tmp_path / "old")
        (root / "two").rename(root / "one")
        second = {get(f"{address}/v1/stores/one").headers["etag"] for _ in range(12)}
        assert len(first) == len(second) == 1
        assert first != second

    def test_workers_that_cannot_start_are_an_error(self, stores: Any, tmp_path: Path) -> None:
        """And not tried for ever: the folder went away before they looked."""
        root = tmp_path / "gone"
        settings = Settings(port=0, workers=2)
        with listen(settings) as listener:
            workers = WorkerSupervisor(
                root, settings, listener, announce=lambda: pytest.fail("it serves"), say=pytest.fail
            )
            with pytest.raises(WorkerDiedError, match=r"worker \d of 2 ended with exit code 1"):
                workers.run()
        assert children_of(os.getpid()) == []
