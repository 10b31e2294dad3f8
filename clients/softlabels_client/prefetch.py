"""How does fetching hide behind training? A thread fetches the next batch while the student learns from this one."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

T = TypeVar("T")

_END: Final = object()


def one_ahead(batches: Iterable[T]) -> Generator[T, None, None]:
    """The same batches in the same order, each fetched while the one before is used.

    At most one batch waits. Whatever fetching raises comes out where that batch would have.
    """
    iterator = iter(batches)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="softlabels-fetch") as fetcher:
        upcoming = fetcher.submit(next, iterator, _END)
        while (batch := upcoming.result()) is not _END:
            upcoming = fetcher.submit(next, iterator, _END)
            yield batch  # type: ignore[misc]
