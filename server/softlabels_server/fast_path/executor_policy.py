"""Executor policy: gathers run in the event loop while they take microseconds, in a thread while a disk is slow."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeVar

from starlette.concurrency import run_in_threadpool

MAX_LOOP_BYTES = 1 << 20
"""Largest reply gathered in the loop: from memory it takes about 0.2 ms; a larger one would delay other clients."""

SLOW_GATHER_S = 0.01
"""A gather in the loop that took longer waited for a disk, or verified checksums of chunks read for the first time, or
other processes had the CPU, which a thread would not change."""

THREADS_ONLY_S = 1.0
"""How long gathers of a store stay in threads after a slow one: a slow store blocks the loop at most once a second."""

T = TypeVar("T")


def disk_read_count() -> int:
    """Return how often this process has read from disks; a new number at each call where the system does not count."""
    if sys.platform == "win32":
        return time.monotonic_ns()
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_majflt + usage.ru_inblock


class ExecutorPolicy:
    """Decides where gathers of one store run, by how long recent ones took.

    A store just opened counts as slow, since its chunks are not verified yet. Tests pass their own clock (seconds),
    CPU time of the calling thread and number that rises with reads from disks.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        cpu_time_s: Callable[[], float] = time.thread_time,
        disk_reads: Callable[[], int] = disk_read_count,
    ) -> None:
        self._clock, self._cpu_time_s, self._disk_reads = clock, cpu_time_s, disk_reads
        self._reads_seen = disk_reads()
        self._threads_until = clock() + THREADS_ONLY_S

    async def run(self, gather: Callable[[], T], *, reply_bytes: int) -> T:
        """Return the result of a blocking function that copies `reply_bytes`, run in the loop or in a thread."""
        # Passing a gather to a thread costs about as much as a gather of 512 KB itself (130 µs on 2 cores), and the
        # thread then competes with the loop for the interpreter lock.
        return self.run_in_loop(gather) if self.may_run_in_loop(reply_bytes) else await run_in_threadpool(gather)

    def may_run_in_loop(self, reply_bytes: int) -> bool:
        """Return whether a gather of this size may run in the event loop now."""
        return reply_bytes <= MAX_LOOP_BYTES and self._clock() >= self._threads_until

    def run_in_loop(self, gather: Callable[[], T]) -> T:
        """Return the result of `gather`, run in the event loop; its duration decides where the next ones run."""
        began, cpu_before_s = self._clock(), self._cpu_time_s()
        try:
            return gather()
        finally:
            ended = self._clock()
            if ended - began > SLOW_GATHER_S and self._worked_or_read(cpu_before_s):
                self._threads_until = ended + THREADS_ONLY_S

    def _worked_or_read(self, cpu_before_s: float) -> bool:
        """Return whether a slow gather computed for long or waited for a disk, rather than for the CPU."""
        # Reads of other threads since the last slow gather count too: asking once here is cheaper than at each gather.
        before, self._reads_seen = self._reads_seen, self._disk_reads()
        return self._reads_seen > before or self._cpu_time_s() - cpu_before_s > SLOW_GATHER_S
