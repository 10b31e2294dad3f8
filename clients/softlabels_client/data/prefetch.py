"""Prefetching: a thread fetches batches into a bounded queue while the student trains."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, Generic, TypeVar

from softlabels.errors import RequestError
from softlabels.targets import EpochRows

T = TypeVar("T")

EPOCH_BATCHES, EPOCH_BYTES = 256, 32 << 20
"""Prefetch limits of an epoch stream: seconds of a slow link, and little memory."""

LOADER_BATCHES, LOADER_BYTES, REFILL_AT = 16, 64 << 20, 4
"""Prefetch limits of a loader. For a student with steps of 6 ms, fetching took 7% of its CPU time one batch at a time,
4.6% with eight (refilled at two) and 4.0% with sixteen, on a busy machine."""

_END: Final = object()


class Ahead(Generic[T]):
    """Iterator over the same items in the same order, fetched ahead by a thread.

    An error of fetching is raised in place of its item, after the items before it. Memory is bounded by the limits and
    the one item being fetched, however slow the consumer.

    Args:
        items: iterated, and closed if it has a `close`, by the thread only.
        most_items: most items waiting, ≥ 1.
        most_bytes: most bytes waiting, though always at least one item; None for no limit.
        size_of: returns the bytes of an item; needed for `most_bytes`.
        refill_at: once a limit is reached, pause until at most this many items are waiting; None resumes as soon as
            there is room. Fetching several in a row takes much less CPU time than one between every two training steps,
            which evict the CPU's caches.
    Raises:
        RequestError: a limit below 1; while iterating, in a process forked after iteration began.
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
            raise RequestError("the limits of prefetching must be at least one batch and one byte")
        self._queue: _Queue[T] = _Queue(most_items, most_bytes, size_of, refill_at)
        self._items: Iterable[T] | None = items
        self._process = 0
        self._finish: Callable[[], object] | None = None

    def __iter__(self) -> Ahead[T]:
        return self

    def __next__(self) -> T:
        """Return the next item; the first call starts the thread."""
        if self._items is not None:
            self._begin(self._items)
        if os.getpid() != self._process:
            raise RequestError(
                "prefetching uses a thread of the process that began it, and threads do not survive a fork: begin the "
                "epoch in the process that reads it"
            )
        return self._queue.take()

    def close(self) -> None:
        """Stop fetching and wait for the thread, which first completes the item it is fetching."""
        items, self._items = self._items, None
        if self._finish is not None:
            self._finish()
        elif items is not None:  # iteration has not begun, and cannot any more
            self._process = os.getpid()
            self._queue.stop()
            close_items(items)

    def __enter__(self) -> Ahead[T]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _begin(self, items: Iterable[T]) -> None:
        self._items, self._process = None, os.getpid()
        thread = threading.Thread(target=_fill, args=(self._queue, items), name="softlabels-fetch", daemon=True)
        # The thread refers to the queue and not to this object, so that an abandoned one is collected and closed.
        self._finish = weakref.finalize(self, _stop, self._queue, thread, self._process)
        thread.start()


def batches_ahead(batches: Iterable[T], *, size_of: Callable[[T], int]) -> Ahead[T]:
    """Return batches of a loader, prefetched several in a row, at most 16 batches and 64 MiB."""
    return Ahead(batches, most_items=LOADER_BATCHES, most_bytes=LOADER_BYTES, size_of=size_of, refill_at=REFILL_AT)


def epoch_ahead(rows: Iterable[EpochRows], *, batches: int = EPOCH_BATCHES) -> Ahead[EpochRows]:
    """Return the steps of an epoch, prefetched, at most `batches` of them and 32 MiB."""

    def size_of(step: EpochRows) -> int:
        return sum(array.nbytes for array in step.arrays.values())

    return Ahead(rows, most_items=batches, most_bytes=EPOCH_BYTES, size_of=size_of)


class _Queue(Generic[T]):
    """Items waiting for the consumer, and the error or end that follows them."""

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
        """Wait until another item may be fetched; False once the consumer has stopped."""
        with self._changed:
            if self._is_full():
                while not self._stopped and not self._has_room():
                    self._changed.wait()
            return not self._stopped

    def add(self, item: T) -> None:
        size = 0 if self._size_of is None else self._size_of(item)
        with self._changed:
            if not self._stopped:
                self._items.append((item, size))
                self._bytes += size
                self._changed.notify_all()

    def end(self, last: BaseException | object) -> None:
        """Record the error, or the end, that follows the last item."""
        with self._changed:
            self._last = last
            self._changed.notify_all()

    def take(self) -> T:
        """Return the next item, waiting for it. Raises StopIteration, or what fetching raised."""
        with self._changed:
            while not self._items and self._last is None and not self._stopped:
                self._changed.wait()
            if self._items:
                item, size = self._items.popleft()
                self._bytes -= size
                if self._has_room():  # else the thread would wake up for nothing
                    self._changed.notify_all()
                return item
            # An error is raised once; after it the iterator is at its end.
            last, self._last = self._last, _END
        if isinstance(last, BaseException):
            raise last
        raise StopIteration

    def stop(self) -> None:
        """Discard everything: the consumer has stopped."""
        with self._changed:
            self._stopped, self._bytes = True, 0
            self._items.clear()
            self._last = _END
            self._changed.notify_all()

    def _has_room(self) -> bool:
        return len(self._items) <= self._refill_at and not self._is_full()

    def _is_full(self) -> bool:
        too_many = len(self._items) >= self._most_items
        return too_many or (self._most_bytes is not None and bool(self._items) and self._bytes >= self._most_bytes)


def _fill(queue: _Queue[T], items: Iterable[T]) -> None:
    last: BaseException | object = _END
    try:
        iterator = iter(items)
        try:
            while queue.wait_for_room():
                item = next(iterator, _END)
                if item is _END:
                    break
                queue.add(item)  # type: ignore[arg-type]
                del item  # drop this reference: an item must not outlive its consumer
        finally:
            # In this thread: a generator that runs in one thread cannot be closed from another.
            close_items(iterator)
    except BaseException as error:  # noqa: BLE001  # re-raised in the consumer
        last = error
    queue.end(last)


def close_items(items: Iterable[object] | None) -> None:
    """Close a generator or a connection; plain iterators have nothing to close."""
    close = getattr(items, "close", None)
    if close is not None:
        close()


def _stop(queue: _Queue[T], thread: threading.Thread, process: int) -> None:
    # In a forked child the thread does not exist, and the queue's lock may stay locked for ever.
    if os.getpid() != process:
        return
    queue.stop()
    if thread is not threading.current_thread():  # garbage collection may run in that thread
        thread.join()
