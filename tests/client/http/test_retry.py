"""When a request is sent again: pauses, Retry-After and deadlines."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softlabels_client.http.retry import Deadline, RetryPolicy, retry_after_s


class TestRetryPolicy:
    @given(failures=st.integers(1, 60))
    def test_pauses_double_up_to_a_bound_and_are_jittered(self, failures: int) -> None:
        """Between half and the whole of what doubling gives."""
        policy = RetryPolicy(first_pause_s=0.1, longest_pause_s=5.0)
        longest = min(0.1 * 2.0 ** (failures - 1), 5.0)
        assert longest / 2 <= policy.pause_s(failures) <= longest

    def test_two_clients_that_failed_together_do_not_come_back_together(self) -> None:
        """Pauses differ."""
        assert len({RetryPolicy().pause_s(3) for _ in range(20)}) > 10

    def test_the_servers_wish_is_the_least(self) -> None:
        """A server that asks for 30 s gets them."""
        assert RetryPolicy().pause_s(1, asked_s=30.0) == 30.0


class TestRetryAfter:
    @pytest.mark.parametrize(("text", "seconds"), [("0", 0.0), ("7", 7.0), (" 120 ", 120.0)])
    def test_seconds(self, text: str, seconds: float) -> None:
        """A whole number is seconds."""
        assert retry_after_s({"retry-after": text}) == seconds

    def test_a_date(self) -> None:
        """An HTTP date is a moment from now."""
        moment = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
        found = retry_after_s({"retry-after": moment})
        assert found is not None
        assert 85 < found <= 90

    def test_a_date_that_has_passed(self) -> None:
        """Then nothing has to be waited for."""
        assert retry_after_s({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0

    @pytest.mark.parametrize("text", ["", "soon", "-5", "1e400", "nan", "١٢", "Wed, 99 Foo 2015 07:28:00 GMT"])
    def test_junk_is_no_wish(self, text: str) -> None:
        """An unreadable header is passed over."""
        assert retry_after_s({"retry-after": text}) is None

    @given(st.text())
    def test_no_text_fails(self, text: str) -> None:
        """Whatever stands there, it is a number of seconds or none."""
        found = retry_after_s({"retry-after": text})
        assert found is None or found >= 0

    def test_none_asked(self) -> None:
        """Without the header there is no wish."""
        assert retry_after_s({}) is None


class TestDeadline:
    def test_time_left_falls_and_then_runs_out(self) -> None:
        """After the deadline asking is an error, which bounds every wait."""
        deadline = Deadline(0.05)
        assert 0 < deadline.left_s() <= 0.05
        assert deadline.allows(0.01)
        assert not deadline.allows(0.06)
        time.sleep(0.06)
        with pytest.raises(TimeoutError, match=r"0\.05 s"):
            deadline.left_s()
