"""What does a stream lose when its server is killed in the middle of it, at any moment?"""

from __future__ import annotations

import os
import random
import re
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softlabels
from softlabels.target_store import TargetStore
from softlabels_client import HttpRows, RetryPolicy

RETRY = RetryPolicy(attempts=1_000, attempts_at_first=1_000, first_pause_s=0.02, longest_pause_s=0.2)
"""Until the server is there again, however busy the machine."""


class Killer:
    """Kills a server at random moments while streams are read, and starts it again on the same port.

    Args:
        serve: starts servers.
        arguments: of the server.
        seed: of the moments.
    """

    def __init__(self, serve: Any, *arguments: object, seed: int) -> None:
        self._serve, self._arguments, self._random = serve, arguments, random.Random(seed)
        self.served = serve(*arguments, "--access-log")
        self.kills = 0
        self.logs: list[Path] = [self.served.log]
        self._timer: threading.Timer | None = None

    def kill_soon(self) -> None:
        """Within the next hundredths of a second, wherever the stream is then."""
        self._timer = threading.Timer(self._random.uniform(0, 0.06), self._kill)
        self._timer.start()

    def start_again(self) -> None:
        """Once it is dead."""
        assert self._timer is not None
        self._timer.join()
        self.served.popen.wait(timeout=30)
        self.served = self._serve(*self._arguments, "--access-log", "--port", self.served.port)
        self.logs.append(self.served.log)

    def cursors(self) -> list[int]:
        """Where streams began, in the order that the servers saw them."""
        text = "".join(log.read_text() for log in self.logs)
        return [int(found) for found in re.findall(r"GET /v1/stores/large/epochs/\S*cursor=(\d+)", text)]

    def _kill(self) -> None:
        # The first process before its workers, or it would start them again.
        parent = self.served.popen.pid
        for pid in [parent, *workers_of(parent)]:
            os.kill(pid, signal.SIGKILL)
        self.kills += 1


@pytest.mark.parametrize(
    ("kills", "workers"),
    [
        pytest.param(2, 1, id="twice"),
        pytest.param(40, 1, id="forty-times", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
        pytest.param(10, 2, id="two-workers", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_a_stream_goes_on_when_its_server_comes_back(serve: Any, soak_stores: Path, kills: int, workers: int) -> None:
    """kill -9 in mid-stream and a restart on the same port: every row comes, once, and is the row that it says."""
    near = softlabels.open(soak_stores / "large")
    expected = near.batch(np.arange(20_000)).encoded["targets"]
    killer = Killer(serve, "--workers", workers, seed=kills)
    url = f"{killer.served.url}/large"
    moments = random.Random(kills + 1)
    with TargetStore(HttpRows(url, timeout_s=60, retry=RETRY), where=url) as store:
        epoch = 0
        while killer.kills < kills:
            seen: list[int] = []
            # 313 batches of 128 KB, of which the kernel's buffers hold a few dozen.
            fatal = moments.randrange(200)
            for number, targets in enumerate(store.epoch(seed=1, epoch=epoch, batch_size=64)):
                if number == fatal:
                    killer.kill_soon()
                    restart = threading.Timer(0.0, killer.start_again)
                    restart.start()
                np.testing.assert_array_equal(targets.encoded["targets"], expected[targets.ids])
                seen += targets.ids.tolist()
            restart.join()
            assert sorted(seen) == list(range(20_000)), "an epoch lost a row or had one twice"
            epoch += 1
    begun_within = [cursor for cursor in killer.cursors() if cursor > 0]
    print(f"{killer.kills} kills, {len(begun_within)} streams gone on with, at {begun_within}")
    assert len(begun_within) >= kills / 2, "too few of the kills came in mid-stream"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="workers are looked up in /proc")
def test_a_stream_outlives_its_workers(serve: Any) -> None:
    """All of them are killed at once: connections wait at their parent's socket for those that are started again."""
    served = serve("--workers", 2)
    url = f"{served.url}/large"
    with TargetStore(HttpRows(url, timeout_s=60, retry=RETRY), where=url) as store:
        seen: list[int] = []
        for number, targets in enumerate(store.epoch(seed=1, epoch=0, batch_size=64)):
            if number == 20:
                for pid in workers_of(served.popen.pid):
                    os.kill(pid, signal.SIGKILL)
            seen += targets.ids.tolist()
    assert sorted(seen) == list(range(20_000))
    assert served.log.read_text().count("is started again") == 2


def workers_of(pid: int) -> list[int]:
    """Processes that this one started and that serve."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text(encoding="utf-8").rpartition(")")[2].split()[1])
            if parent == pid and b"spawn_main" in (status.parent / "cmdline").read_bytes():
                found.append(int(status.parent.name))
        except OSError:
            continue  # gone since it was listed
    return found
