"""Where does a gather run? In the event loop while it takes microseconds, in a thread where it may wait for a disk."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeVar

from starlette.concurrency import run_in_threadpool

MOST_LOOP_BYTES = 1 << 20
"""A reply of this size takes about 0.2 ms to gather from memory; a larger one would keep other clients waiting."""

SLOW_S = 0.01
"""A gather in the loop that took longer waited for a disk, or worked out checksums of chunks first touched; or others
had the processor meanwhile, which no thread would change."""

REST_S = 1.0
"""How long gathers of a store stay out of the loop after a slow one: a slow store stalls it once a second at most."""

T = TypeVar("T")


def read_count() -> int:
    """Pages and blocks that this process has read from disks so far; where nobody counts, more each time."""
    if sys.platform == "win32":
        return time.monotonic_ns()
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_majflt + usage.ru_inblock


class Pace:
    """How fast rows of one store come, as far as seen. A store just opened counts as slow: its chunks are unverified.

    Args:
        clock: monotonic seconds.
        worked_s: seconds that this thread has had the processor.
        disk_reads: a number that rises when this process reads from a disk.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        worked_s: Callable[[], float] = time.thread_time,
        disk_reads: Callable[[], int] = read_count,
    ) -> None:
        self._clock, self._worked_s, self._disk_reads = clock, worked_s, disk_reads
        self._reads_seen = disk_reads()
        self._threads_until = clock() + REST_S

    async def run(self, gather: Callable[[], T], *, reply_bytes: int) -> T:
        """What `gather` returns, run where it holds nobody up.

        Handing a gather to a thread costs about as much as a gather of 512 KB itself (130 µs on 2 cores), and the
        interpreter's lock lets the thread wait for the loop; so it is done only where it pays.

        Args:
            gather: the blocking work.
            reply_bytes: how many bytes it will copy.
        """
        if not self.fits_the_loop(reply_bytes):
            return await run_in_threadpool(gather)
        return self.run_here(gather)

    def fits_the_loop(self, reply_bytes: int) -> bool:
        """Whether a gather of this size may run in the event loop now."""
        return reply_bytes <= MOST_LOOP_BYTES and self._clock() >= self._threads_until

    def run_here(self, gather: Callable[[], T]) -> T:
        """What `gather` returns, run in the event loop; how long it took decides where the next ones run."""
        began, worked_before_s = self._clock(), self._worked_s()
        try:
            return gather()
        finally:
            ended = self._clock()
            if ended - began > SLOW_S and self._has_itself_to_blame(worked_before_s):
                self._threads_until = ended + REST_S

    def _has_itself_to_blame(self, worked_before_s: float) -> bool:
        """Whether a slow gather worked for long or waited for a disk, rather than for the processor."""
        # Reads of other threads since the last slow gather count too: one look now is cheaper than one a gather.
        before, self._reads_seen = self._reads_seen, self._disk_reads()
        return self._reads_seen > before or self._worked_s() - worked_before_s > SLOW_S
