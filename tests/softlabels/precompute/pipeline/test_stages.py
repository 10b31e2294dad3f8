"""Stages: channels keep order and bounds, and one signal stops all of them."""

from __future__ import annotations

import threading
import time

import pytest

from softlabels.precompute.pipeline.stages import Channel, Slots, Stage, StoppedError, StopSignal

PATIENCE_S = 20.0


class TestChannel:
    def test_items_come_in_order_and_then_the_end(self) -> None:
        """What was put in before the channel was closed still comes out."""
        channel: Channel[int] = Channel(3, StopSignal())
        for number in (1, 2, 3):
            channel.put(number)
        channel.close()
        assert [channel.get() for _ in range(4)] == [1, 2, 3, None]

    def test_put_waits_while_the_channel_is_full(self) -> None:
        """At most `size` items wait at a time."""
        stop, given = StopSignal(), list[int]()
        channel: Channel[int] = Channel(2, stop)

        def give() -> None:
            for number in range(5):
                channel.put(number)
                given.append(number)

        stage = Stage("giver", give, stop)
        time.sleep(0.05)
        assert len(given) == 2
        assert [channel.get() for _ in range(5)] == [0, 1, 2, 3, 4]
        assert stage.join(PATIENCE_S)


class TestStopSignal:
    def test_an_error_stops_every_stage_and_is_raised(self) -> None:
        """Stages waiting for items, for space and for slots all stop; the first error is the one raised."""
        stop = StopSignal()
        empty: Channel[int] = Channel(1, stop)
        full: Channel[int] = Channel(1, stop)
        full.put(0)
        slots = Slots(0, stop)
        waiting = [
            Stage("taker", lambda: _forever(empty.get), stop),
            Stage("giver", lambda: full.put(1), stop),
            Stage("holder", lambda: slots.acquire(stop), stop),
        ]
        time.sleep(0.05)
        failing = Stage("failing", lambda: _raise(OSError("no room")), stop)
        assert all(stage.join(PATIENCE_S) for stage in (*waiting, failing))
        stop.stop(ValueError("later"))
        with pytest.raises(OSError, match="no room"):
            stop.raise_error()
        with pytest.raises(StoppedError):
            empty.get()

    def test_a_part_of_a_run_stops_alone(self) -> None:
        """Stopping a child leaves its parent running; stopping the parent stops the child and tells its error."""
        parent = StopSignal()
        child, other = StopSignal(parent), StopSignal(parent)
        child.stop()
        assert (parent.stopped, child.stopped, other.stopped) == (False, True, False)
        parent.stop(OSError("all"))
        assert other.stopped
        with pytest.raises(OSError, match="all"):
            other.raise_error()

    def test_stages_are_daemon_threads(self) -> None:
        """A transfer set that hangs does not keep the process from ending."""
        release = threading.Event()
        stage = Stage("hanging", lambda: _forever(release.wait), StopSignal())
        assert not stage.join(0.01)
        assert all(thread.daemon for thread in threading.enumerate() if thread.name == "softlabels-hanging")
        release.set()
        assert stage.join(PATIENCE_S)


def _forever(wait: object) -> None:
    assert callable(wait)
    wait()


def _raise(error: Exception) -> None:
    raise error
