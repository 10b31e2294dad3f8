"""Fetching ahead: the same items in order, within bounds, errors in place, threads that end."""

from __future__ import annotations

import gc
import multiprocessing
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from softlabels.errors import RequestError
from softlabels_client.data.prefetch import Ahead, batches_ahead


def fetchers() -> list[threading.Thread]:
    """The threads that fetch."""
    return [thread for thread in threading.enumerate() if thread.name == "softlabels-fetch"]


def wait_until(true: Any) -> None:
    """Wait for a thread, not longer than five seconds."""
    give_up = time.monotonic() + 5
    while not true() and time.monotonic() < give_up:
        time.sleep(0.005)
    assert true()


class Counting:
    """Items that know how many of them were fetched, and whether they were closed."""

    def __init__(self, count: int) -> None:
        self.fetched, self.closed, self._count = 0, False, count

    def __iter__(self) -> Counting:
        return self

    def __next__(self) -> bytes:
        if self.fetched == self._count:
            raise StopIteration
        self.fetched += 1
        return bytes(self.fetched)

    def close(self) -> None:
        """As generators and epochs have it."""
        self.closed = True


class TestItems:
    @pytest.mark.parametrize("most_items", [1, 3, 100])
    def test_the_same_in_the_same_order(self, most_items: int) -> None:
        """Also none at all; after the end it stays at its end."""
        ahead = Ahead(range(20), most_items=most_items)
        assert list(ahead) == list(range(20))
        assert list(ahead) == []
        assert list(Ahead([], most_items=most_items)) == []
        assert fetchers() == []

    def test_an_error_comes_in_its_place_and_once(self) -> None:
        """After the items before it; nothing follows it."""

        def failing() -> Iterator[int]:
            yield from (1, 2)
            raise LookupError("no more")

        ahead = Ahead(failing(), most_items=5)
        assert [next(ahead), next(ahead)] == [1, 2]
        with pytest.raises(LookupError, match="no more"):
            next(ahead)
        assert list(ahead) == []

    @pytest.mark.parametrize("bounds", [{"most_items": 0}, {"most_bytes": 0}])
    def test_a_queue_of_nothing(self, bounds: dict[str, int]) -> None:
        """Is a mistake."""
        with pytest.raises(RequestError):
            Ahead([], **bounds)


class TestBounds:
    def test_no_more_items_than_the_bound_wait(self) -> None:
        """However long the consumer takes; one more may be under way."""
        items = Counting(100)
        with Ahead(items, most_items=4) as ahead:
            assert items.fetched == 0
            next(ahead)
            wait_until(lambda: items.fetched == 5)
            time.sleep(0.05)
            assert items.fetched == 5

    def test_no_more_bytes_than_the_bound_wait(self) -> None:
        """Items of 1, 2, 3, … bytes: fetching stops with the one that reaches the bound."""
        items = Counting(100)
        with Ahead(items, most_items=50, most_bytes=9, size_of=len) as ahead:
            next(ahead)
            wait_until(lambda: items.fetched == 4)  # 2 + 3 + 4
            time.sleep(0.05)
            assert items.fetched == 4
            assert len(next(ahead)) == 2
            wait_until(lambda: items.fetched == 5)

    def test_an_item_larger_than_the_bound_passes(self) -> None:
        """One at a time."""
        assert [len(item) for item in Ahead(Counting(5), most_bytes=1, size_of=len)] == [1, 2, 3, 4, 5]


class TestEnds:
    def test_close_waits_for_the_thread_and_closes_the_source(self) -> None:
        """Nothing is fetched any more."""
        items = Counting(100)
        ahead = Ahead(items, most_items=2)
        next(ahead)
        ahead.close()
        assert fetchers() == []
        assert items.closed
        assert list(ahead) == []
        ahead.close()

    def test_closed_before_it_began(self) -> None:
        """No thread was there, and the source is closed all the same."""
        items = Counting(100)
        ahead = Ahead(items)
        ahead.close()
        assert items.closed
        assert list(ahead) == []

    def test_a_loop_broken_off_ends_the_thread(self) -> None:
        """Letting go of it is enough."""
        for item in Ahead(range(100), most_items=2):
            if item == 3:
                break
        gc.collect()
        wait_until(lambda: fetchers() == [])

    def test_a_forked_child_is_told(self) -> None:
        """It has no thread: an error instead of a wait without end. Its parent goes on."""
        ahead = Ahead(range(10), most_items=2)
        assert next(ahead) == 0
        child = multiprocessing.get_context("fork").Process(target=_refuses, args=(ahead,))
        child.start()
        child.join(30)
        assert child.exitcode == 0
        assert list(ahead) == list(range(1, 10))

    def test_one_not_begun_may_be_forked(self) -> None:
        """The thread is begun by whoever reads first."""
        child = multiprocessing.get_context("fork").Process(target=_reads, args=(Ahead(range(10)),))
        child.start()
        child.join(30)
        assert child.exitcode == 0


def _refuses(ahead: Ahead[int]) -> None:
    with pytest.raises(RequestError, match="fork"):
        next(ahead)
    ahead.close()


def _reads(ahead: Ahead[int]) -> None:
    assert list(ahead) == list(range(10))


class TestRefilling:
    def test_fetching_rests_until_few_wait(self) -> None:
        """Five in a row, then none until one is left, then five again; in order, to the end."""
        fetched: list[int] = []

        def items() -> Iterator[int]:
            for number in range(12):
                fetched.append(number)
                yield number

        with Ahead(items(), most_items=5, refill_at=1) as ahead:
            taken = [next(ahead)]
            for expected in (6, 6, 6):
                wait_until(lambda: len(fetched) >= 5)
                time.sleep(0.02)
                assert len(fetched) <= expected
                taken.append(next(ahead))
            taken.extend(ahead)
        assert taken == fetched == list(range(12))

    def test_a_training_holds_no_more_than_its_bounds(self) -> None:
        """Sixteen batches, or 64 MiB, and one that is being fetched."""
        fetched: list[int] = []

        def items() -> Iterator[int]:
            for number in range(40):
                fetched.append(number)
                yield number

        with batches_ahead(items(), size_of=lambda item: 1) as ahead:
            next(ahead)
            time.sleep(0.05)
            assert len(fetched) <= 18
        fetched.clear()
        with batches_ahead(items(), size_of=lambda item: 40 << 20) as ahead:
            next(ahead)
            time.sleep(0.05)
            assert len(fetched) <= 4
