"""Are items that are made ahead the same ones, in order, each once, with the errors where they belong?"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from softlabels_server.ahead import MadeAhead


class TestMadeAhead:
    """A thread makes the next item while this one is used."""

    def test_items_come_in_order_each_once(self) -> None:
        """Whether made ahead or not, and when that changes from item to item."""
        now_and_then = itertools.cycle([True, True, False])
        for worthwhile in (lambda: True, lambda: False, lambda: next(now_and_then)):
            ahead = MadeAhead(iter(range(100)), worthwhile)
            assert list(ahead) == list(range(100))
            ahead.close()

    def test_the_next_item_is_made_before_it_is_asked_for(self) -> None:
        """And no more than that one."""
        made: list[int] = []

        def items() -> Iterator[int]:
            for number in range(10):
                made.append(number)
                yield number

        ahead = MadeAhead(items(), lambda: True)
        assert next(ahead) == 0
        deadline_s = time.monotonic() + 5
        while len(made) < 2 and time.monotonic() < deadline_s:
            time.sleep(0.001)
        time.sleep(0.05)
        assert made == [0, 1]
        ahead.close()

    def test_an_error_comes_out_where_its_item_would_have(self) -> None:
        """The items before it are not lost."""

        def items() -> Iterator[int]:
            yield 0
            yield 1
            raise ValueError("the third")

        ahead = MadeAhead(items(), lambda: True)
        assert [next(ahead), next(ahead)] == [0, 1]
        with pytest.raises(ValueError, match="the third"):
            next(ahead)
        ahead.close()

    def test_its_thread_ends_when_it_is_closed(self) -> None:
        """Also with an item made that nobody asked for."""
        before = set(gathering())
        ahead = MadeAhead(iter(range(10)), lambda: True)
        next(ahead)
        (maker,) = set(gathering()) - before
        ahead.close()
        maker.join(timeout=5)
        assert not maker.is_alive()


def gathering() -> list[threading.Thread]:
    """Threads that make items ahead."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("softlabels-gather")]
