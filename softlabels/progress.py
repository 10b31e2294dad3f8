"""Progress of long jobs: a bar on a terminal, plain lines elsewhere.

    with track(60_000, "precompute", "samples") as progress:
        for batch in batches:
            ...
            progress.advance(len(batch))

The bar is drawn by rich. In a log file or a CI job a plain line appears at most once in `LINE_EVERY_S` seconds.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TextIO, TypeAlias

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

LINE_EVERY_S = 5.0
"""Seconds between two plain lines: a five-minute job leaves about 60 in a log."""


class Progress:
    """What a long loop reports; safe to call from any thread. This class shows nothing."""

    def advance(self, amount: int = 1) -> None:
        """Report that `amount` more units are done."""

    def note(self, text: str) -> None:
        """Show a few words beside the figures from now on, for example "epoch 3 of 20, loss 0.12"."""


QUIET = Progress()

ShowProgress: TypeAlias = Callable[..., AbstractContextManager[Progress]]
"""`track`, or a replacement: called with total, description and unit."""


def silent(total: int, description: str, unit: str) -> AbstractContextManager[Progress]:
    """Show no progress; a replacement for `track`."""
    return nullcontext(QUIET)


class PlainLines(Progress):
    """Progress as lines of text, at most one in `every_s` seconds and one at the end; arguments as in `track`."""

    def __init__(
        self,
        total: int,
        description: str,
        unit: str,
        *,
        done: int = 0,
        stream: TextIO,
        every_s: float = LINE_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._description, self._unit = total, description, unit
        self._done_before, self._done = done, done
        self._stream, self._every_s, self._clock = stream, every_s, clock
        self._started_s = self._shown_s = clock()
        self._note = ""
        self._lock = threading.Lock()

    def advance(self, amount: int = 1) -> None:
        """Count `amount` units; write a line if the last one is old enough."""
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
        """Write the last line: what was done in what time, or where it stopped."""
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


class _Bar(Progress):
    def __init__(self, bar: RichProgress, **task: Any) -> None:
        self._bar, self._task = bar, bar.add_task(**task, note="")

    def advance(self, amount: int = 1) -> None:
        self._bar.advance(self._task, amount)

    def note(self, text: str) -> None:
        self._bar.update(self._task, note=text)


@contextmanager
def track(
    total: int, description: str, unit: str, *, done: int = 0, stream: TextIO | None = None
) -> Iterator[Progress]:
    """Show the progress of what runs inside the `with` block.

    Args:
        total: units in the whole job.
        description: name of the job, a few words.
        unit: what is counted, in the plural ("samples").
        done: units of an earlier run; the bar starts there, rate and time left are of this run.
        stream: where to show it; None for stderr, so that stdout stays free for results.
    """
    target = sys.stderr if stream is None else stream
    if target.isatty():
        with _rich_bar(target, unit) as bar:
            yield _Bar(bar, description=description, total=total, completed=done)
        return
    lines = PlainLines(total, description, unit, done=done, stream=target)
    completed = False
    try:
        yield lines
        completed = True
    finally:
        lines.finish(completed=completed)


def duration(seconds: float) -> str:
    """Return a time span in at most two units: "8 s", "2 min 05 s", "1 h 04 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _rich_bar(stream: TextIO, unit: str) -> RichProgress:
    # Imported here: rich takes 50 ms, which only a terminal needs.
    from rich import progress as columns
    from rich.console import Console

    class RateColumn(columns.ProgressColumn):
        def render(self, task: columns.Task) -> str:
            speed = task.finished_speed or task.speed
            return "" if speed is None else f"{speed:,.0f} {unit}/s"

    return columns.Progress(
        columns.TextColumn("{task.description}"),
        columns.BarColumn(bar_width=28),
        columns.MofNCompleteColumn(),
        RateColumn(),
        columns.TimeElapsedColumn(),
        columns.TextColumn("left"),
        columns.TimeRemainingColumn(),
        columns.TextColumn("{task.fields[note]}", style="dim"),
        console=Console(file=stream),
    )
