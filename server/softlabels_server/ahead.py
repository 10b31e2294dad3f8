"""How does gathering hide behind writing? The next piece is made in a thread of its own while one is on its way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")

_END: Final = object()


class MadeAhead(Generic[T]):
    """The same items in the same order; at most one is made before it is asked for.

    NumPy's gather and the socket's write both let go of the interpreter, so that two threads do both at once. May be
    read from several threads, one after the other.

    Args:
        items: made by a thread of this object's own, or by whoever asks; never by both at a time.
        worthwhile: asked after each item, whether to begin the next one.
    """

    def __init__(self, items: Iterator[T], worthwhile: Callable[[], bool]) -> None:
        self._items, self._worthwhile = items, worthwhile
        self._upcoming: Future[Any] | None = None
        # Starts its thread with the first item that is begun ahead: for slow readers, never.
        self._maker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="softlabels-gather")

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        """The next item; raises what making it raised."""
        upcoming, self._upcoming = self._upcoming, None
        found: Any = next(self._items, _END) if upcoming is None else upcoming.result()
        if found is _END:
            raise StopIteration
        if self._worthwhile():
            self._upcoming = self._maker.submit(next, self._items, _END)
        item: T = found
        return item

    def close(self) -> None:
        """Let the thread end; what it is making is thrown away."""
        self._maker.shutdown(wait=False)
