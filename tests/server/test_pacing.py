"""Where a gather runs."""

from __future__ import annotations

import asyncio
import threading

import pytest

from softlabels_server.pacing import MOST_LOOP_BYTES, REST_S, SLOW_S, Pace


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def runs_in_loop(pace: Pace, clock: Clock, *, takes_s: float = 0.0, reply_bytes: int = 1000) -> bool:
    """Whether a gather that takes so long runs in the thread of the event loop."""

    def gather() -> int:
        clock.now += takes_s
        return threading.get_ident()

    return asyncio.run(pace.run(gather, reply_bytes=reply_bytes)) == threading.get_ident()


class TestPace:
    def test_a_store_just_opened_counts_as_slow(self) -> None:
        """Its first second is spent in threads, then the loop takes over."""
        clock = Clock()
        pace = Pace(clock)
        assert not runs_in_loop(pace, clock)
        clock.now += REST_S
        assert runs_in_loop(pace, clock)

    def test_a_slow_gather_sends_the_next_ones_to_threads(self) -> None:
        """Until a second has passed: so the loop stalls once a second at most, however slow the disk."""
        clock = Clock()
        pace = Pace(clock)
        clock.now += REST_S
        assert runs_in_loop(pace, clock, takes_s=SLOW_S * 2)
        assert not runs_in_loop(pace, clock)
        clock.now += REST_S * 1.01
        assert runs_in_loop(pace, clock, takes_s=SLOW_S / 2)
        assert runs_in_loop(pace, clock)

    def test_a_large_reply_runs_in_a_thread(self) -> None:
        """However fast the store."""
        clock = Clock()
        pace = Pace(clock)
        clock.now += REST_S
        assert runs_in_loop(pace, clock, reply_bytes=MOST_LOOP_BYTES)
        assert not runs_in_loop(pace, clock, reply_bytes=MOST_LOOP_BYTES + 1)

    @pytest.mark.parametrize("later_s", [0.0, REST_S])
    def test_errors_come_through(self, later_s: float) -> None:
        """From the loop and from a thread."""
        clock = Clock()
        pace = Pace(clock)
        clock.now += later_s

        def fail() -> None:
            raise KeyError("row")

        with pytest.raises(KeyError, match="row"):
            asyncio.run(pace.run(fail, reply_bytes=1))
