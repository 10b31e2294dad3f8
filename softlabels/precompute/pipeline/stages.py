"""How do the stages of a run hand work to each other, and how do all of them stop when one fails?

Stages are threads. What one hands to the next goes through a `Channel` with little room, so that a fast stage waits for
a slow one and memory stays bounded. All channels of a run share one `Halt`: the first error that a stage meets is kept,
every stage that waits is woken, and the error is raised where the run was called.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class HaltedError(Exception):
    """The run is stopping: raised in stages that wait, and never seen outside the run."""


class Halt:
    """Whether a run is to stop, and why.

    Args:
        parent: a halt that stops this one as well, but not the other way round.
    """

    def __init__(self, parent: Halt | None = None) -> None:
        self._parent = parent
        self.changed: threading.Condition = threading.Condition() if parent is None else parent.changed
        self._stopped = False
        self._error: BaseException | None = None

    def stop(self, error: BaseException | None = None) -> None:
        """Stop all who wait; the first error is the one that is told."""
        with self.changed:
            if self._error is None:
                self._error = error
            self._stopped = True
            self.changed.notify_all()

    @property
    def stopped(self) -> bool:
        """Whether this halt, or one above it, was stopped."""
        return self._stopped or (self._parent is not None and self._parent.stopped)

    def raise_error(self) -> None:
        """Raise the error that a stage met, if there is one."""
        if self._error is not None:
            raise self._error
        if self._parent is not None:
            self._parent.raise_error()

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready()`; the caller holds `changed`. Raises HaltedError: the run stops."""
        self.changed.wait_for(lambda: self.stopped or ready())
        if self.stopped:
            raise HaltedError


class Channel(Generic[Item]):
    """A queue of at most `room` items between two stages."""

    def __init__(self, room: int, halt: Halt) -> None:
        self._room, self._halt = room, halt
        self._items: deque[Item] = deque()
        self._closed = False

    def put(self, item: Item) -> None:
        """Hand an item over; waits for room. Raises HaltedError."""
        with self._halt.changed:
            self._halt.wait_for(lambda: len(self._items) < self._room)
            self._items.append(item)
            self._halt.changed.notify_all()

    def get(self) -> Item | None:
        """The next item, None when the giver is done; waits for either. Raises HaltedError."""
        with self._halt.changed:
            self._halt.wait_for(lambda: bool(self._items) or self._closed)
            if not self._items:
                return None
            item = self._items.popleft()
            self._halt.changed.notify_all()
            return item

    def close(self) -> None:
        """Say that nothing more comes."""
        with self._halt.changed:
            self._closed = True
            self._halt.changed.notify_all()


class Slots:
    """How much a run may hold at a time."""

    def __init__(self, count: int, halt: Halt) -> None:
        self._free, self._halt = count, halt

    def take(self, halt: Halt) -> None:
        """Take one; waits until one is free. Raises HaltedError: `halt` was stopped."""
        with halt.changed:
            halt.wait_for(lambda: self._free > 0)
            self._free -= 1

    def take_now(self) -> bool:
        """Take one if one is free."""
        with self._halt.changed:
            taken = self._free > 0
            self._free -= taken
            return taken

    def give_back(self) -> None:
        """Let another one have it."""
        with self._halt.changed:
            self._free += 1
            self._halt.changed.notify_all()


class Stage:
    """One thread of a run; an error in it stops the run.

    A daemon, so that a second Ctrl-C ends the process even where the work (a transfer set that hangs) never returns.
    """

    def __init__(self, name: str, work: Callable[[], None], halt: Halt) -> None:
        self._work, self._halt = work, halt
        self._thread = threading.Thread(target=self._run, name=f"softlabels-{name}", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until the thread is done; False where it still runs after `timeout_s`."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._work()
        except HaltedError:
            return
        except BaseException as error:  # noqa: BLE001  # raised again where the run was called
            self._halt.stop(error)
