"""Where does a gather run? In the event loop while it takes microseconds, in a thread where it may wait for a disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from starlette.concurrency import run_in_threadpool

MOST_LOOP_BYTES = 1 << 20
"""A reply of this size takes about 0.2 ms to gather from memory; a larger one would keep other clients waiting."""

SLOW_S = 0.01
"""A gather in the loop that took longer waited for something: a disk, or checksums of chunks first touched. A busy
machine alone takes the processor away for about half of this."""

REST_S = 1.0
"""How long gathers of a store stay out of the loop after a slow one: a slow store stalls it once a second at most."""

T = TypeVar("T")


class Pace:
    """How fast rows of one store come, as far as seen. A store just opened counts as slow: its chunks are unverified.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
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
        began = self._clock()
        try:
            return gather()
        finally:
            ended = self._clock()
            if ended - began > SLOW_S:
                self._threads_until = ended + REST_S
