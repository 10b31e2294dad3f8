"""How does a long job show how far it is? One context manager: a bar on a terminal, plain lines elsewhere.

    with track(60_000, "precompute", "samples") as progress:
        for batch in batches:
            ...
            progress.advance(len(batch))

Only the standard library is needed; `rich` draws the bar where it is installed and stderr is a terminal. Elsewhere (a
log file, a CI job) a plain line appears at most once in `LINE_EVERY_S` seconds: the log stays short and shows life.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

LINE_EVERY_S = 5.0
"""Seconds between two plain lines: a five-minute job leaves about 60 in a log."""


class Progress(Protocol):
    """What a long loop tells of itself; safe to call from any thread."""

    def advance(self, amount: int = 1) -> None:
        """`amount` more units are done."""

    def note(self, text: str) -> None:
        """A few words shown beside the figures from now on ("epoch 3 of 20, loss 0.12")."""


class _Quiet:
    """Shows nothing: what library code is given when nobody watches."""

    def advance(self, amount: int = 1) -> None:
        """Nothing to show."""

    def note(self, text: str) -> None:
        """Nothing to show."""


QUIET: Progress = _Quiet()


class PlainLines:
    """Progress as lines of text, at most one in `every_s` seconds and one at the end.

    Args:
        total: units in the whole job.
        description: what runs, first on each line.
        unit: what is counted, in the plural ("samples").
        done: units that were done before this run; the rate leaves them out.
        stream: where lines go.
        every_s: least seconds between lines.
        clock: seconds that only rise.
    """

    def __init__(
        self,
        total: int,
        description: str,
        unit: str,
        *,
        done: int = 0,
        stream: TextIO | None = None,
        every_s: float = LINE_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._description, self._unit = total, description, unit
        self._done_before, self._done = done, done
        self._stream = sys.stderr if stream is None else stream
        self._every_s, self._clock = every_s, clock
        self._started_s = self._shown_s = clock()
        self._note = ""
        self._lock = threading.Lock()

    def advance(self, amount: int = 1) -> None:
        """Count `amount` units; show a line where the last one is old enough."""
        with self._lock:
            self._done += amount
            now_s = self._clock()
            if now_s - self._shown_s >= self._every_s:
                self._shown_s = now_s
                self._write(self._running(now_s))

    def note(self, text: str) -> None:
        """Show `text` on the lines to come."""
        with self._lock:
            self._note = text

    def finish(self, *, completed: bool) -> None:
        """Write the last line: what was done, in what time, or how far it came."""
        with self._lock:
            now_s = self._clock()
            spent = duration(now_s - self._started_s)
            if completed:
                self._write(f"{self._done:,} {self._unit} in {spent}{self._rate(now_s)}")
            else:
                self._write(f"stopped at {self._done:,} of {self._total:,} {self._unit} after {spent}")

    def _running(self, now_s: float) -> str:
        share = f" ({100 * self._done / self._total:.0f}%)" if self._total else ""
        line = f"{self._done:,} of {self._total:,} {self._unit}{share}{self._rate(now_s)}"
        fresh, left = self._done - self._done_before, self._total - self._done
        if fresh > 0 and left > 0:
            line += f", {duration(left * (now_s - self._started_s) / fresh)} left"
        return line

    def _rate(self, now_s: float) -> str:
        fresh, spent_s = self._done - self._done_before, now_s - self._started_s
        return f", {fresh / spent_s:,.0f} {self._unit}/s" if fresh > 0 and spent_s > 0 else ""

    def _write(self, text: str) -> None:
        note = f" · {self._note}" if self._note else ""
        print(f"{self._description}: {text}{note}", file=self._stream, flush=True)


class _RichBar:
    """Progress as one bar drawn by rich, which is safe to call from any thread."""

    def __init__(self, bar: RichProgress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def advance(self, amount: int = 1) -> None:
        """Move the bar on."""
        self._bar.advance(self._task, amount)

    def note(self, text: str) -> None:
        """Show `text` at the bar's end."""
        self._bar.update(self._task, note=text)


@contextmanager
def track(
    total: int, description: str, unit: str, *, done: int = 0, stream: TextIO | None = None
) -> Iterator[Progress]:
    """Show the progress of what runs inside the `with` block.

    Args:
        total: units in the whole job.
        description: a few words that say what runs.
        unit: what is counted, in the plural.
        done: units that an earlier run did; the bar starts there, rate and time left are of this run.
        stream: where to show it; stderr unless told otherwise, so that stdout stays free for results.
    Yields:
        a `Progress` to advance.
    """
    target = sys.stderr if stream is None else stream
    rich_bar = _rich_bar(target, unit) if target.isatty() else None
    if rich_bar is not None:
        with rich_bar:
            yield _RichBar(rich_bar, rich_bar.add_task(description, total=total, completed=done, note=""))
        return
    lines = PlainLines(total, description, unit, done=done, stream=target)
    completed = False
    try:
        yield lines
        completed = True
    finally:
        lines.finish(completed=completed)


def duration(seconds: float) -> str:
    """A time span for people: "8 s", "2 min 05 s", "1 h 04 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _rich_bar(stream: TextIO, unit: str) -> RichProgress | None:
    """A rich progress bar on `stream`, or None where rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            Task,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text
    except ImportError:
        return None

    class RateColumn(ProgressColumn):
        """Units a second, measured over the last seconds of this run."""

        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:,.0f} {unit}/s", style="progress.data.speed")

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        RateColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
        console=Console(file=stream),
    )
