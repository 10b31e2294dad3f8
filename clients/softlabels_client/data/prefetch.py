"""How does fetching hide behind training? A thread fetches ahead into a bounded queue while the student learns."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Final, Generic, TypeVar

from softlabels.epochs import EpochRows
from softlabels.errors import RequestError

T = TypeVar("T")

EPOCH_BATCHES, EPOCH_BYTES = 256, 32 << 20
"""Of an epoch that are fetched before they are asked for: seconds of a slow link, and little memory."""

LOADER_BATCHES, LOADER_BYTES, REFILL_AT = 16, 64 << 20, 4
"""Of a loader that are fetched before they are asked for. Of a student with steps of 6 ms, fetching took 7% of its
processor time one batch at a time, 4.6% eight (refilled at two) and 4.0% sixteen, on a busy machine."""

_END: Final = object()


class Ahead(Generic[T]):
    """The same items in the same order, fetched by a thread before they are asked for: an iterator.

    Whatever fetching raises comes out where that item would have, once those before it are used up. However slow the
    consumer, no more than the bounds allow is held, and one item that is being fetched.

    Args:
        items: fetched by the thread alone from now on, and closed by it where they have a `close`.
        most_items: fetched and not yet asked for, ≥ 1.
        most_bytes: of these together; one is always allowed. None for no such bound.
        size_of: bytes of an item; needed for `most_bytes`.
        refill_at: once the bounds are reached, fetching rests until no more items than this wait. Several in a row cost
            much less processor time than one at a time between a training's steps, which find nothing in the caches.
            None goes on as soon as there is room.
    Raises:
        RequestError: a bound below 1; when used: this was made in another process, before a fork.
    """

    def __init__(
        self,
        items: Iterable[T],
        *,
        most_items: int = 8,
        most_bytes: int | None = None,
        size_of: Callable[[T], int] | None = None,
        refill_at: int | None = None,
    ) -> None:
        if most_items < 1 or (most_bytes is not None and most_bytes < 1):
            raise RequestError("a queue of fetched batches holds at least one of them, and a byte")
        self._queue: _Queue[T] = _Queue(most_items, most_bytes, size_of, refill_at)
        self._items: Iterable[T] | None = items
        self._process = 0
        self._finish: Callable[[], object] | None = None

    def __iter__(self) -> Ahead[T]:
        return self

    def __next__(self) -> T:
        """The next item; the first call begins the fetching."""
        if self._items is not None:
            self._begin(self._items)
        if os.getpid() != self._process:
            raise RequestError(
                "this fetches ahead by a thread of the process that made it, and threads do not survive a fork: begin "
                "the epoch in the process that reads it"
            )
        return self._queue.take()

    def close(self) -> None:
        """Stop fetching and wait until the thread has ended, which is when what it is fetching is here or fails."""
        items, self._items = self._items, None
        if self._finish is not None:
            self._finish()
        elif items is not None:  # nothing was asked for, and nothing will be
            self._process = os.getpid()
            self._queue.stop()
            _let_go(items)

    def __enter__(self) -> Ahead[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, items: Iterable[T]) -> None:
        self._items, self._process = None, os.getpid()
        thread = threading.Thread(target=_fill, args=(self._queue, items), name="softlabels-fetch", daemon=True)
        # The thread knows the queue and not this object: whoever forgets to close it, closes it by letting go of it.
        self._finish = weakref.finalize(self, _stop, self._queue, thread, self._process)
        thread.start()


def batches_ahead(batches: Iterable[T], *, size_of: Callable[[T], int]) -> Ahead[T]:
    """A training's batches, fetched ahead several in a row: no more than 16, and no more than 64 MiB."""
    return Ahead(batches, most_items=LOADER_BATCHES, most_bytes=LOADER_BYTES, size_of=size_of, refill_at=REFILL_AT)


def epoch_ahead(rows: Iterable[EpochRows], *, batches: int = EPOCH_BATCHES) -> Ahead[EpochRows]:
    """An epoch's steps, fetched ahead: no more than so many batches, and no more than 32 MiB of rows."""
    return Ahead(rows, most_items=batches, most_bytes=EPOCH_BYTES, size_of=_row_bytes)


def _row_bytes(rows: EpochRows) -> int:
    return sum(array.nbytes for array in rows.arrays.values())


class _Queue(Generic[T]):
    """What is fetched and not yet asked for, in order, and the error or end that comes after it."""

    def __init__(
        self, most_items: int, most_bytes: int | None, size_of: Callable[[T], int] | None, refill_at: int | None
    ) -> None:
        self._most_items, self._most_bytes, self._size_of = most_items, most_bytes, size_of
        self._refill_at = most_items - 1 if refill_at is None else min(refill_at, most_items - 1)
        self._items: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._stopped = False
        self._last: BaseException | object | None = None

    def wait_for_room(self) -> bool:
        """Wait until another item may be fetched; False once nobody wants one."""
        with self._changed:
            if self._is_full():
                while not self._stopped and not self._has_room():
                    self._changed.wait()
            return not self._stopped

    def add(self, item: T) -> None:
        """Take in an item."""
        size = 0 if self._size_of is None else self._size_of(item)
        with self._changed:
            if not self._stopped:
                self._items.append((item, size))
                self._bytes += size
                self._changed.notify_all()

    def end(self, last: BaseException | object) -> None:
        """Nothing follows but this error, or the end."""
        with self._changed:
            self._last = last
            self._changed.notify_all()

    def take(self) -> T:
        """The next item, as soon as it is here. Raises StopIteration, or what fetching raised."""
        with self._changed:
            while not self._items and self._last is None and not self._stopped:
                self._changed.wait()
            if self._items:
                item, size = self._items.popleft()
                self._bytes -= size
                if self._has_room():  # else whoever fetches would wake up for nothing
                    self._changed.notify_all()
                return item
            last, self._last = self._last, _END
        if isinstance(last, BaseException):
            raise last
        raise StopIteration

    def stop(self) -> None:
        """Nobody wants anything any more."""
        with self._changed:
            self._stopped = True
            self._items.clear()
            self._bytes = 0
            self._last = _END
            self._changed.notify_all()

    def _has_room(self) -> bool:
        return len(self._items) <= self._refill_at and not self._is_full()

    def _is_full(self) -> bool:
        too_many = len(self._items) >= self._most_items
        return too_many or (self._most_bytes is not None and bool(self._items) and self._bytes >= self._most_bytes)


def _fill(queue: _Queue[T], items: Iterable[T]) -> None:
    """What the thread does."""
    last: BaseException | object = _END
    try:
        iterator = iter(items)
        try:
            while queue.wait_for_room():
                item = next(iterator, _END)
                if item is _END:
                    break
                queue.add(item)  # type: ignore[arg-type]
                del item  # held no longer than by whoever uses it
        finally:
            _let_go(iterator)
    except BaseException as error:  # noqa: BLE001  # raised again where the consumer asks
        last = error
    queue.end(last)


def _let_go(items: Iterable[object]) -> None:
    close = getattr(items, "close", None)
    if close is not None:
        close()


def _stop(queue: _Queue[T], thread: threading.Thread, process: int) -> None:
    if os.getpid() != process:
        return
    queue.stop()
    if thread is not threading.current_thread():  # which may be the one that happens to collect the garbage
        thread.join()
