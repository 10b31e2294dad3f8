"""How are a far store's rows read twice and sent once? A row source that keeps here what another one gave."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.encodings import Encoding
from softlabels.epochs import EpochRows
from softlabels.errors import RequestError, WireError
from softlabels.ids import IdArray
from softlabels.manifest import IDS, Manifest
from softlabels.order import EpochConfig, StepBatch
from softlabels.target_store import RowSource
from softlabels_client.cache.cache_folder import DEFAULT_BYTES, CacheFolder, default_folder
from softlabels_client.cache.cache_lookup import LOGGER, Found, KeptRows, missing_share
from softlabels_client.data.prefetch import epoch_ahead


class CachedRows:
    """Rows of another source, kept in a folder on this machine under the digest of the store's version.

    A row is sent once: later it comes from the disk, where its checksum is verified each time. What is spoilt, torn or
    not there is asked for again; a full or broken disk ends the keeping and not the training, and is logged once to
    `softlabels.cache`. Stores of single rows and of views are kept; sequences, and stores that are unfinished, are
    passed through. Safe in threads, between processes and after fork; pickles.

    Args:
        far: where rows come from at first.
        folder: where they are kept; $SOFTLABELS_CACHE or ~/.cache/softlabels when left out.
        most_bytes: of the whole folder. A store that is larger fills it once, and what is there then stays.
        read_only: rows that are there are used, and none is added.
    Raises:
        RequestError: a bound below 1.
    """

    def __init__(
        self,
        far: RowSource,
        *,
        folder: str | Path | None = None,
        most_bytes: int = DEFAULT_BYTES,
        read_only: bool = False,
    ) -> None:
        if most_bytes < 1:
            raise RequestError(f"a cache of {most_bytes} bytes keeps nothing: give it more, or leave the cache out")
        self._far = far
        self._folder = default_folder() if folder is None else Path(folder)
        self._most_bytes, self._read_only = most_bytes, read_only
        self._kept = self._opened()
        self._closed = False

    @property
    def manifest(self) -> Manifest:
        """What the store says of itself."""
        return self._far.manifest

    @property
    def digest(self) -> str:
        """The version of the store; rows of no other come from the cache."""
        return self._far.digest

    @property
    def encoding(self) -> Encoding:
        """How the rows are decoded; what the encoding learnt is fetched each time that the store is opened."""
        return self._far.encoding

    def fetch(
        self,
        ids: IdArray,
        fields: tuple[str, ...],
        *,
        views: NDArray[np.int64] | None = None,
        spans: NDArray[np.int64] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Rows of these ids, in the order asked: from the disk, and by one request what is missing there.

        Raises: as the other source does.
        """
        kept = self._shelf()
        found = None if kept is None or spans is not None else kept.look(ids, fields, views)
        if kept is None or found is None:
            return self._far.fetch(ids, fields, views=views, spans=spans)
        kept.fill([found])
        return {name: ids if name == IDS else found.arrays[name] for name in fields}

    def epoch(self, config: EpochConfig, fields: tuple[str, ...]) -> Iterator[EpochRows]:
        """The rows of each step of an epoch, fetched ahead by a thread: from the disk, or by one stream.

        Raises, when it is read: as the other source does.
        """
        kept = self._shelf()
        return epoch_ahead(
            self._far.epoch(config, fields) if kept is None else kept_epoch(kept, self._far, config, fields)
        )

    def close(self) -> None:
        """Let go of files and connections; a later batch opens them again."""
        self._kept, self._closed = None, True
        self._far.close()

    def _shelf(self) -> KeptRows | None:
        if self._closed:
            self._kept, self._closed = self._opened(), False
        return self._kept

    def _opened(self) -> KeptRows | None:
        """What is kept of this store; None where nothing can be."""
        manifest = self._far.manifest
        if manifest.layout.kind == "sequences" or not manifest.finished:
            return None
        folder = CacheFolder(self._folder, most_bytes=self._most_bytes, read_only=self._read_only)
        try:
            opened = folder.open(manifest, self._far.digest)
        except OSError as error:
            LOGGER.warning(
                "the cache in %s cannot be used, all rows come from the server: %s", self._folder, str(error)
            )
            return None
        if opened is None:
            LOGGER.warning(
                "the cache in %s holds nothing of %r and %s: all rows come from the server",
                self._folder,
                manifest.name,
                "is read-only" if self._read_only else f"has no room for it within {self._most_bytes} bytes",
            )
            return None
        return KeptRows(opened, self._far, read_only=self._read_only)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_kept", "_closed")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _kept=None, _closed=True)


_STREAM_FROM, _STREAM_TO = 0.9, 0.8
"""Shares of missing rows at which a stream is begun, and below which it is left: the others in it are sent for nothing,
which costs less than the questions would."""

_WINDOW_BYTES = 4 << 20
"""Of rows that are looked up at once: far more than a link of 50 ms and 100 Mbit/s has under way (600 KB)."""

_WINDOW_SAMPLES = 8192
_UNDER_WAY = 3
"""Requests for missing rows at a time."""

_Filling = tuple[list[StepBatch], list[Found], Future[None] | None]


def kept_epoch(kept: KeptRows, far: RowSource, config: EpochConfig, fields: tuple[str, ...]) -> Iterator[EpochRows]:
    """The rows of each step of an epoch, in order, each once, wherever they come from.

    Raises, when it is read: as the far source does.
    """
    names = tuple(dict.fromkeys((*fields, IDS)))
    view, cursor = config.view_of(far.manifest), config.cursor
    filling: deque[_Filling] = deque()
    stream: _Stream | None = None
    with ThreadPoolExecutor(_UNDER_WAY, thread_name_prefix="softlabels-gaps") as pool:
        try:
            for window in _windows(config, far, names):
                founds = [kept.look_at(step, names, view) for step in window]
                known = [found for found in founds if found is not None]
                least = _STREAM_FROM if stream is None else _STREAM_TO
                if len(known) < len(founds) or missing_share(known) > least:
                    yield from _filled(filling, leave=0)
                    stream = stream or _Stream(far.epoch(config.resumed_at(cursor), names))
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


def _windows(config: EpochConfig, far: RowSource, names: tuple[str, ...]) -> Iterator[list[StepBatch]]:
    """The epoch's steps, as many at a time as are looked up at once."""
    arrays = far.manifest.arrays
    row_bytes = sum(arrays[name].row_bytes for name in names if name in arrays)
    samples = min(_WINDOW_SAMPLES, _WINDOW_BYTES // max(1, row_bytes))
    steps = iter(config.batches(far.manifest, far.digest))
    while window := list(islice(steps, max(1, samples // config.batch_size))):
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
