"""Where a gather runs: in the event loop or in a thread."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from softlabels_server.fast_path.executor_policy import (
    MAX_LOOP_BYTES,
    SLOW_GATHER_S,
    THREADS_ONLY_S,
    ExecutorPolicy,
    disk_read_count,
)


class Clock:
    """Seconds that pass when told to, and what happened in them."""

    def __init__(self) -> None:
        self.now, self.worked_s, self.reads = 100.0, 5.0, 7

    def __call__(self) -> float:
        return self.now

    def policy(self) -> ExecutorPolicy:
        """Return a policy that uses this clock."""
        return ExecutorPolicy(self, lambda: self.worked_s, lambda: self.reads)


def runs_in_loop(
    policy: ExecutorPolicy,
    clock: Clock,
    *,
    takes_s: float = 0.0,
    works_s: float = 0.0,
    reads: int = 0,
    reply_bytes: int = 1000,
) -> bool:
    """Whether a gather that takes so long, so much of it working, runs in the thread of the event loop."""

    def gather() -> int:
        clock.now += takes_s
        clock.worked_s += works_s
        clock.reads += reads
        return threading.get_ident()

    return asyncio.run(policy.run(gather, reply_bytes=reply_bytes)) == threading.get_ident()


class TestPolicy:
    def test_a_store_just_opened_counts_as_slow(self) -> None:
        """Its first second is spent in threads, then the loop takes over."""
        clock = Clock()
        policy = clock.policy()
        assert not runs_in_loop(policy, clock)
        clock.now += THREADS_ONLY_S
        assert runs_in_loop(policy, clock)

    @pytest.mark.parametrize(
        ("works_s", "reads"),
        [pytest.param(SLOW_GATHER_S * 2, 0, id="checksums"), pytest.param(0.0, 3, id="a disk")],
    )
    def test_a_slow_gather_sends_the_next_ones_to_threads(self, works_s: float, reads: int) -> None:
        """Until a second has passed: so the loop stalls once a second at most, however slow the disk."""
        clock = Clock()
        policy = clock.policy()
        clock.now += THREADS_ONLY_S
        assert runs_in_loop(policy, clock, takes_s=SLOW_GATHER_S * 2, works_s=works_s, reads=reads)
        assert not runs_in_loop(policy, clock)
        clock.now += THREADS_ONLY_S * 1.01
        assert runs_in_loop(policy, clock, takes_s=SLOW_GATHER_S / 2, works_s=works_s / 4, reads=reads)
        assert runs_in_loop(policy, clock)

    def test_a_busy_machine_is_no_slow_store(self) -> None:
        """A gather that only waited for the CPU would wait for it in a thread as well, and pay for the thread."""
        clock = Clock()
        policy = clock.policy()
        clock.now += THREADS_ONLY_S
        assert runs_in_loop(policy, clock, takes_s=SLOW_GATHER_S * 5, works_s=SLOW_GATHER_S / 10)
        assert runs_in_loop(policy, clock)

    def test_reads_from_a_disk_are_counted(self, tmp_path: Path) -> None:
        """By the system; those of a file that is in memory are not."""
        path = tmp_path / "file"
        path.write_bytes(bytes(1 << 20))
        before = disk_read_count()
        assert len(path.read_bytes()) == 1 << 20
        assert isinstance(before, int)
        assert disk_read_count() >= before >= 0

    def test_a_large_reply_runs_in_a_thread(self) -> None:
        """However fast the store."""
        clock = Clock()
        policy = clock.policy()
        clock.now += THREADS_ONLY_S
        assert runs_in_loop(policy, clock, reply_bytes=MAX_LOOP_BYTES)
        assert not runs_in_loop(policy, clock, reply_bytes=MAX_LOOP_BYTES + 1)

    @pytest.mark.parametrize("later_s", [0.0, THREADS_ONLY_S])
    def test_errors_come_through(self, later_s: float) -> None:
        """From the loop and from a thread."""
        clock = Clock()
        policy = clock.policy()
        clock.now += later_s

        def fail() -> None:
            raise KeyError("row")

        with pytest.raises(KeyError, match="row"):
            asyncio.run(policy.run(fail, reply_bytes=1))
