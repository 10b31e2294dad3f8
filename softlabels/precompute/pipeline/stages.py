"""Stages of a pipeline: threads joined by bounded channels, all of which stop when one of them fails.

All channels of a run share one `StopSignal`: it keeps the first error of any stage, wakes every stage that waits, and
raises the error where the run was called.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class StoppedError(Exception):
    """The run is stopping; raised in stages that wait, and never seen outside the run."""


class StopSignal:
    """Tells the stages of a run to stop, and why.

    Args:
        parent: signal that also stops this one; stopping this one leaves the parent as it is.
    """

    def __init__(self, parent: StopSignal | None = None) -> None:
        self._parent = parent
        # One condition for a whole run: every change wakes all stages, and each checks its own predicate. With one
        # condition per channel, a stage that waits for an item would miss the stop.
        self.changed: threading.Condition = threading.Condition() if parent is None else parent.changed
        self._stopped = False
        self._error: BaseException | None = None

    def stop(self, error: BaseException | None = None) -> None:
        """Stop every stage; the first error is the one that `raise_error` raises."""
        with self.changed:
            if self._error is None:
                self._error = error
            self._stopped = True
            self.changed.notify_all()

    @property
    def stopped(self) -> bool:
        """Return whether this signal or a parent was stopped."""
        return self._stopped or (self._parent is not None and self._parent.stopped)

    def raise_error(self) -> None:
        """Raise the error that a stage failed with, if any."""
        if self._error is not None:
            raise self._error
        if self._parent is not None:
            self._parent.raise_error()

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready()`; the caller holds `changed`. Raises StoppedError: the run stops."""
        self.changed.wait_for(lambda: self.stopped or ready())
        # Even if `ready()` holds: once a run stops, what is still in its channels is dropped.
        if self.stopped:
            raise StoppedError


class Channel(Generic[Item]):
    """A queue of at most `size` items between two stages, so that memory stays bounded where one is slower."""

    def __init__(self, size: int, stop: StopSignal) -> None:
        self._size, self._stop = size, stop
        self._items: deque[Item] = deque()
        self._closed = False

    def put(self, item: Item) -> None:
        """Append an item; waits while the channel is full. Raises StoppedError."""
        with self._stop.changed:
            self._stop.wait_for(lambda: len(self._items) < self._size)
            self._items.append(item)
            self._stop.changed.notify_all()

    def get(self) -> Item | None:
        """Return the next item, or None once the channel is closed and empty; waits for either. Raises StoppedError."""
        with self._stop.changed:
            self._stop.wait_for(lambda: bool(self._items) or self._closed)
            if not self._items:
                return None
            item = self._items.popleft()
            self._stop.changed.notify_all()
            return item

    def close(self) -> None:
        """Mark the end of the items."""
        with self._stop.changed:
            self._closed = True
            self._stop.changed.notify_all()


class Slots:
    """A semaphore that a stop signal interrupts: how much a run may hold at a time."""

    def __init__(self, count: int, stop: StopSignal) -> None:
        self._free, self._stop = count, stop

    def acquire(self, stop: StopSignal) -> None:
        """Take a slot; waits until one is free. Raises StoppedError: `stop` was stopped."""
        # `stop` may be a child of the slots' own signal: they share one condition, so `release` ends this wait too.
        with stop.changed:
            stop.wait_for(lambda: self._free > 0)
            self._free -= 1

    def try_acquire(self) -> bool:
        """Take a slot if one is free; return whether one was."""
        with self._stop.changed:
            taken = self._free > 0
            self._free -= taken
            return taken

    def release(self) -> None:
        """Free a slot."""
        with self._stop.changed:
            self._free += 1
            self._stop.changed.notify_all()


class Stage:
    """One thread of a run; an error in it stops the run.

    A daemon thread, so that a second Ctrl-C ends the process even where a transfer set hangs and never returns.
    """

    def __init__(self, name: str, work: Callable[[], None], stop: StopSignal) -> None:
        self._work, self._stop = work, stop
        self._thread = threading.Thread(target=self._run, name=f"softlabels-{name}", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until the thread has ended; return False where it still runs after `timeout_s`."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._work()
        except StoppedError:
            # Another stage set the signal, with its error if it failed: this one has none of its own.
            return
        except BaseException as error:  # noqa: BLE001  # raised again where the run was called
            self._stop.stop(error)
