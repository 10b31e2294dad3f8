"""How does an epoch go through a cache? From the disk what is there, by one long stream what all is missing.

A window of steps is looked up at a time. Where nearly everything is missing, as in a first epoch, one stream brings it
all: a far link never waits for a question. Where some is missing, as when a store is larger than its cache, only that
is asked for, a window's rows by one request, with the next windows' requests under way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from softlabels.epochs import EpochPlan, EpochRows
from softlabels.errors import WireError
from softlabels.opening import IDS, RowSource
from softlabels.order import StepBatch
from softlabels_client.cache.kept import Found, KeptRows, missing_share

_STREAM_FROM, _STREAM_TO = 0.9, 0.8
"""Shares of missing rows at which a stream is begun, and below which it is left: the others in it are sent for nothing,
which costs less than the questions would."""

_WINDOW_BYTES = 4 << 20
"""Of rows that are looked up at once: far more than a link of 50 ms and 100 Mbit/s has under way (600 KB)."""

_WINDOW_SAMPLES = 8192
_UNDER_WAY = 3
"""Requests for missing rows at a time."""

_Filling = tuple[list[StepBatch], list[Found], Future[None] | None]


def kept_epoch(kept: KeptRows, far: RowSource, plan: EpochPlan, fields: tuple[str, ...]) -> Iterator[EpochRows]:
    """The rows of each step of an epoch, in order, each once, wherever they come from.

    Raises, when it is read: as the far source does.
    """
    names = tuple(dict.fromkeys((*fields, IDS)))
    view, cursor = plan.view_of(far.manifest), plan.cursor
    filling: deque[_Filling] = deque()
    stream: _Stream | None = None
    with ThreadPoolExecutor(_UNDER_WAY, thread_name_prefix="softlabels-gaps") as pool:
        try:
            for window in _windows(plan, far, names):
                founds = [kept.look_at(step, names, view) for step in window]
                known = [found for found in founds if found is not None]
                least = _STREAM_FROM if stream is None else _STREAM_TO
                if len(known) < len(founds) or missing_share(known) > least:
                    yield from _filled(filling, leave=0)
                    stream = stream or _Stream(far.epoch(plan.going_on_at(cursor), names))
                    for step, found in zip(window, founds, strict=True):
                        rows = stream.next()
                        kept.keep_step(step, rows, view, found)
                        yield rows
                else:
                    if stream is not None:
                        stream.close()
                        stream = None
                    whole = all(bool(found.here.all()) for found in known)
                    filling.append((window, known, None if whole else pool.submit(kept.fill, known)))
                    yield from _filled(filling, leave=0 if whole and len(filling) == 1 else _UNDER_WAY - 1)
                cursor = window[-1].cursor_after
            yield from _filled(filling, leave=0)
            if stream is not None:
                stream.read_end()
        finally:
            if stream is not None:
                stream.close()
            for *_, future in filling:
                if future is not None:
                    future.cancel()


class _Stream:
    """The rest of an epoch as the far source sends it."""

    def __init__(self, rows: Iterator[EpochRows]) -> None:
        self._rows = rows

    def next(self) -> EpochRows:
        """The next step's rows."""
        try:
            return next(self._rows)
        except StopIteration as end:
            raise WireError("the epoch came to an end before its last batch") from end

    def read_end(self) -> None:
        """Read what says that this was all."""
        if next(self._rows, None) is not None:
            raise WireError("the epoch goes on after its last batch")

    def close(self) -> None:
        """Let go of the connection."""
        close = getattr(self._rows, "close", None)
        if close is not None:
            close()


def _windows(plan: EpochPlan, far: RowSource, names: tuple[str, ...]) -> Iterator[list[StepBatch]]:
    """The epoch's steps, as many at a time as are looked up at once."""
    arrays = far.manifest.arrays
    row_bytes = sum(arrays[name].row_bytes for name in names if name in arrays)
    samples = min(_WINDOW_SAMPLES, _WINDOW_BYTES // max(1, row_bytes))
    steps = iter(plan.batches(far.manifest, far.digest))
    while window := list(islice(steps, max(1, samples // plan.batch_size))):
        yield window


def _filled(filling: deque[_Filling], *, leave: int) -> Iterator[EpochRows]:
    """The rows of the oldest windows, once what they lacked is here; the youngest are left under way."""
    while len(filling) > leave:
        window, founds, future = filling.popleft()
        if future is not None:
            future.result()
        for step, found in zip(window, founds, strict=True):
            yield EpochRows(
                ids=found.ids,
                arrays={**found.arrays, IDS: found.ids},
                repeated=step.repeated,
                cursor_after=step.cursor_after,
            )
