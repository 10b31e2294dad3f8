"""Channels between stages: order, room, an end, and one halt for all."""

from __future__ import annotations

import threading
import time

import pytest

from softlabels.precompute.pipeline.stages import Channel, Halt, HaltedError, Slots, Stage

PATIENCE_S = 20.0


class TestChannel:
    def test_items_come_in_order_and_then_the_end(self) -> None:
        """What was put in before the channel was closed still comes out."""
        channel: Channel[int] = Channel(3, Halt())
        for number in (1, 2, 3):
            channel.put(number)
        channel.close()
        assert [channel.get() for _ in range(4)] == [1, 2, 3, None]

    def test_a_full_channel_makes_the_giver_wait(self) -> None:
        """At most `room` items wait at a time."""
        halt, given = Halt(), list[int]()
        channel: Channel[int] = Channel(2, halt)

        def give() -> None:
            for number in range(5):
                channel.put(number)
                given.append(number)

        stage = Stage("giver", give, halt)
        time.sleep(0.05)
        assert len(given) == 2
        assert [channel.get() for _ in range(5)] == [0, 1, 2, 3, 4]
        assert stage.join(PATIENCE_S)


class TestHalt:
    def test_an_error_wakes_everybody_and_is_told(self) -> None:
        """Stages that wait for items, for room and for slots all stop; the first error is the one raised."""
        halt = Halt()
        empty: Channel[int] = Channel(1, halt)
        full: Channel[int] = Channel(1, halt)
        full.put(0)
        slots = Slots(0, halt)
        waiting = [
            Stage("taker", lambda: _forever(empty.get), halt),
            Stage("giver", lambda: full.put(1), halt),
            Stage("holder", lambda: slots.take(halt), halt),
        ]
        time.sleep(0.05)
        failing = Stage("failing", lambda: _raise(OSError("no room")), halt)
        assert all(stage.join(PATIENCE_S) for stage in (*waiting, failing))
        halt.stop(ValueError("later"))
        with pytest.raises(OSError, match="no room"):
            halt.raise_error()
        with pytest.raises(HaltedError):
            empty.get()

    def test_a_part_of_a_run_stops_alone(self) -> None:
        """Stopping a child leaves its parent running; stopping the parent stops the child and tells its error."""
        parent = Halt()
        child, other = Halt(parent), Halt(parent)
        child.stop()
        assert (parent.stopped, child.stopped, other.stopped) == (False, True, False)
        parent.stop(OSError("all"))
        assert other.stopped
        with pytest.raises(OSError, match="all"):
            other.raise_error()

    def test_stages_are_no_reason_to_stay_alive(self) -> None:
        """A transfer set that hangs does not keep the process from ending."""
        release = threading.Event()
        stage = Stage("hanging", lambda: _forever(release.wait), Halt())
        assert not stage.join(0.01)
        assert all(thread.daemon for thread in threading.enumerate() if thread.name == "softlabels-hanging")
        release.set()
        assert stage.join(PATIENCE_S)


def _forever(wait: object) -> None:
    assert callable(wait)
    wait()


def _raise(error: Exception) -> None:
    raise error
