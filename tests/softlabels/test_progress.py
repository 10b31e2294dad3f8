"""Progress: lines in a log, a bar on a terminal."""

from __future__ import annotations

import io
import threading

import pytest

from softlabels.progress import QUIET, PlainLines, Progress, duration, track


class Clock:
    """Time that moves when a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        """The time."""
        return self.now_s


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """It is."""
        return True


def lines_of(total: int, *, done: int = 0) -> tuple[PlainLines, Clock, io.StringIO]:
    """Plain lines with a clock and a stream of their own."""
    clock, stream = Clock(), io.StringIO()
    return PlainLines(total, "job", "rows", done=done, stream=stream, every_s=5.0, clock=clock), clock, stream


class TestPlainLines:
    def test_a_line_tells_how_far_how_fast_and_how_long(self) -> None:
        """The share, the rate and the time left."""
        lines, clock, stream = lines_of(1_000)
        clock.now_s += 10
        lines.advance(250)
        assert stream.getvalue() == "job: 250 of 1,000 rows (25%), 25 rows/s, 30 s left\n"

    def test_at_most_one_line_in_five_seconds(self) -> None:
        """A fast loop does not fill the log."""
        lines, clock, stream = lines_of(1_000)
        for _ in range(100):
            clock.now_s += 0.125
            lines.advance(1)
        assert len(stream.getvalue().splitlines()) == 2

    def test_what_an_earlier_run_did_is_not_in_the_rate(self) -> None:
        """After a resume the time left is of this run's own speed."""
        lines, clock, stream = lines_of(1_000, done=900)
        clock.now_s += 10
        lines.advance(50)
        assert stream.getvalue() == "job: 950 of 1,000 rows (95%), 5 rows/s, 10 s left\n"

    def test_a_note_stands_at_the_end(self) -> None:
        """From the next line on."""
        lines, clock, stream = lines_of(10)
        lines.note("epoch 2")
        clock.now_s += 10
        lines.advance(5)
        assert stream.getvalue().endswith(" · epoch 2\n")

    def test_threads_may_advance_together(self) -> None:
        """No count is lost."""
        lines, _, stream = lines_of(4_000)
        threads = [threading.Thread(target=lambda: [lines.advance() for _ in range(1_000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        lines.finish(completed=True)
        assert "job: 4,000 rows in 0 s" in stream.getvalue()

    def test_a_job_of_nothing_divides_by_nothing(self) -> None:
        """Zero units, zero seconds."""
        lines, clock, stream = lines_of(0)
        lines.finish(completed=True)
        clock.now_s += 10
        lines.advance(0)
        assert stream.getvalue() == "job: 0 rows in 0 s\njob: 0 of 0 rows\n"


class TestTrack:
    def test_a_log_gets_lines(self) -> None:
        """A stream that is no terminal."""
        stream = io.StringIO()
        with track(10, "job", "rows", stream=stream) as progress:
            progress.advance(10)
        assert stream.getvalue().startswith("job: 10 rows in 0 s")

    def test_an_error_inside_is_not_called_done(self) -> None:
        """The last line says where it stopped, and the error goes on."""
        stream = io.StringIO()

        def interrupted() -> None:
            with track(10, "job", "rows", stream=stream) as progress:
                progress.advance(4)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert stream.getvalue() == "job: stopped at 4 of 10 rows after 0 s\n"

    def test_a_terminal_gets_a_bar(self) -> None:
        """Drawn by rich, with the description and the note on it."""
        stream = Terminal()
        with track(10, "my job", "rows", stream=stream) as progress:
            progress.note("epoch 1")
            progress.advance(10)
        assert "my job" in stream.getvalue()
        assert "10/10" in stream.getvalue()
        assert "epoch 1" in stream.getvalue()

    def test_quiet_shows_nothing(self, capfd: pytest.CaptureFixture[str]) -> None:
        """For library code that nobody watches."""
        quiet: Progress = QUIET
        quiet.advance(3)
        quiet.note("x")
        assert capfd.readouterr() == ("", "")


class TestDuration:
    @pytest.mark.parametrize(
        ("expected", "seconds"),
        [("0 s", -1), ("8 s", 8.4), ("1 min 00 s", 59.6), ("2 min 05 s", 125), ("1 h 04 min", 3_850)],
    )
    def test_a_span_is_told_in_two_units_at_most(self, expected: str, seconds: float) -> None:
        """As people say it."""
        assert duration(seconds) == expected
