"""CachedRows: a row source that keeps on the trainer's disk what another source returned.

Epochs are looked up a window of steps at a time. If nearly everything is missing, as in a first epoch, one stream
brings it all, so a slow link never waits for a request. If some is missing, as when a store is larger than its cache,
only that is requested, one request per window, with the requests of the next windows in flight.
"""

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
from softlabels.errors import RequestError, WireError
from softlabels.ids import IdArray
from softlabels.manifest import IDS, Manifest
from softlabels.order import EpochConfig, StepBatch
from softlabels.target_store import RowSource
from softlabels.targets import EpochRows
from softlabels_client.cache.cache_folder import DEFAULT_BYTES, CacheFolder, default_folder
from softlabels_client.cache.cache_lookup import LOGGER, CacheLookup, LookupResult, missing_fraction
from softlabels_client.data.prefetch import epoch_ahead


class CachedRows:
    """Rows of another source, cached in a folder under the digest of the store's version.

    A row is fetched once; later it comes from the disk, and its checksum is verified at every read. Missing and damaged
    rows are fetched again; a full or failing disk stops caching, not training, and is logged once to
    `softlabels.cache`. Stores of single rows and of views are cached; sequences and unfinished stores are passed
    through. Safe in threads, between processes and after fork; pickles.

    Args:
        source: where rows come from at first.
        folder: cache folder; $SOFTLABELS_CACHE or ~/.cache/softlabels when left out.
        most_bytes: size limit of the whole folder. A larger store fills it once, and those rows stay.
        read_only: use cached rows and add none.
    Raises:
        RequestError: a size limit below 1.
    """

    def __init__(
        self,
        source: RowSource,
        *,
        folder: str | Path | None = None,
        most_bytes: int = DEFAULT_BYTES,
        read_only: bool = False,
    ) -> None:
        if most_bytes < 1:
            raise RequestError(
                f"a cache of {most_bytes} bytes holds no row: increase cache_bytes, or leave the cache out"
            )
        self._source = source
        self._folder = default_folder() if folder is None else Path(folder)
        self._most_bytes, self._read_only = most_bytes, read_only
        self._lookup = self._open()
        self._closed = False

    @property
    def manifest(self) -> Manifest:
        """Manifest of the store."""
        return self._source.manifest

    @property
    def digest(self) -> str:
        """Digest of the store's version; rows of no other version come from the cache."""
        return self._source.digest

    @property
    def encoding(self) -> Encoding:
        """Encoding of the rows; its constants are fetched each time the store is opened."""
        return self._source.encoding

    def fetch(
        self,
        ids: IdArray,
        fields: tuple[str, ...],
        *,
        views: NDArray[np.int64] | None = None,
        spans: NDArray[np.int64] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Return the rows of these ids, in this order; what is not cached is fetched by one request.

        Raises: as the source.
        """
        lookup = self._current_lookup()
        result = None if lookup is None or spans is not None else lookup.lookup(ids, fields, views)
        if lookup is None or result is None:
            return self._source.fetch(ids, fields, views=views, spans=spans)
        lookup.fetch_missing([result])
        return {name: ids if name == IDS else result.arrays[name] for name in fields}

    def epoch(self, config: EpochConfig, fields: tuple[str, ...]) -> Iterator[EpochRows]:
        """Iterate over the rows of each step of an epoch, fetched ahead by a thread.

        Raises, while iterating: as the source.
        """
        lookup = self._current_lookup()
        return epoch_ahead(
            self._source.epoch(config, fields) if lookup is None else cached_epoch(lookup, self._source, config, fields)
        )

    def close(self) -> None:
        """Close files and connections; a later batch opens them again."""
        self._lookup, self._closed = None, True
        self._source.close()

    def _current_lookup(self) -> CacheLookup | None:
        if self._closed:
            self._lookup, self._closed = self._open(), False
        return self._lookup

    def _open(self) -> CacheLookup | None:
        """Open the cache of this store; None if nothing can be cached."""
        manifest = self._source.manifest
        if manifest.layout.kind == "sequences" or not manifest.finished:
            return None
        folder = CacheFolder(self._folder, most_bytes=self._most_bytes, read_only=self._read_only)
        try:
            opened = folder.open(manifest, self._source.digest)
        except OSError as error:
            LOGGER.warning(
                "the cache in %s cannot be used, all rows come from the server: %s", self._folder, str(error)
            )
            return None
        if opened is None:
            LOGGER.warning(
                "the cache in %s has no rows of %r and %s: all rows come from the server",
                self._folder,
                manifest.name,
                "is read-only" if self._read_only else f"has no room for it within {self._most_bytes} bytes",
            )
            return None
        return CacheLookup(opened, self._source, read_only=self._read_only)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lookup", "_closed")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lookup=None, _closed=True)


_STREAM_FROM, _STREAM_TO = 0.9, 0.8
"""Fractions of missing rows from which a stream is opened, and below which it is closed. Cached rows in a stream are
sent in vain, which costs less than requests for the missing ones."""

_WINDOW_BYTES = 4 << 20
"""Rows looked up at once: source more than a link of 50 ms and 100 Mbit/s has in flight (600 KB)."""

_WINDOW_SAMPLES = 8192
_REQUESTS_IN_FLIGHT = 3
"""Requests for missing rows at a time."""

_Window = tuple[list[StepBatch], list[LookupResult], Future[None] | None]


def cached_epoch(
    lookup: CacheLookup, source: RowSource, config: EpochConfig, fields: tuple[str, ...]
) -> Iterator[EpochRows]:
    """Yield the rows of each step of an epoch, in order, each once, wherever they come from.

    Raises, while iterating: as the source.
    """
    names = tuple(dict.fromkeys((*fields, IDS)))
    view, cursor = config.view_of(source.manifest), config.cursor
    pending: deque[_Window] = deque()
    stream: _Stream | None = None
    with ThreadPoolExecutor(_REQUESTS_IN_FLIGHT, thread_name_prefix="softlabels-gaps") as pool:
        try:
            for window in _windows(config, source, names):
                results = [lookup.lookup_step(step, names, view) for step in window]
                known = [result for result in results if result is not None]
                least = _STREAM_FROM if stream is None else _STREAM_TO
                if len(known) < len(results) or missing_fraction(known) > least:
                    yield from _completed(pending, leave=0)
                    stream = stream or _Stream(source.epoch(config.resumed_at(cursor), names))
                    for step, result in zip(window, results, strict=True):
                        rows = stream.next()
                        lookup.store_step(step, rows, view, result)
                        yield rows
                else:
                    if stream is not None:
                        stream.close()
                        stream = None
                    whole = all(bool(result.cached.all()) for result in known)
                    pending.append((window, known, None if whole else pool.submit(lookup.fetch_missing, known)))
                    yield from _completed(pending, leave=0 if whole and len(pending) == 1 else _REQUESTS_IN_FLIGHT - 1)
                cursor = window[-1].cursor_after
            yield from _completed(pending, leave=0)
            if stream is not None:
                stream.read_end()
        finally:
            if stream is not None:
                stream.close()
            for *_, future in pending:
                if future is not None:
                    future.cancel()


class _Stream:
    """The rest of an epoch as the source streams it."""

    def __init__(self, rows: Iterator[EpochRows]) -> None:
        self._rows = rows

    def next(self) -> EpochRows:
        """Return the rows of the next step."""
        try:
            return next(self._rows)
        except StopIteration as end:
            raise WireError("the epoch ended before its last batch") from end

    def read_end(self) -> None:
        """Read the end frame. Raises WireError if more rows follow."""
        if next(self._rows, None) is not None:
            raise WireError("the epoch continues after its last batch")

    def close(self) -> None:
        """Close the connection."""
        close = getattr(self._rows, "close", None)
        if close is not None:
            close()


def _windows(config: EpochConfig, source: RowSource, names: tuple[str, ...]) -> Iterator[list[StepBatch]]:
    """Yield the epoch's steps, as many at a time as are looked up at once."""
    arrays = source.manifest.arrays
    row_bytes = sum(arrays[name].row_bytes for name in names if name in arrays)
    samples = min(_WINDOW_SAMPLES, _WINDOW_BYTES // max(1, row_bytes))
    steps = iter(config.batches(source.manifest, source.digest))
    while window := list(islice(steps, max(1, samples // config.batch_size))):
        yield window


def _completed(pending: deque[_Window], *, leave: int) -> Iterator[EpochRows]:
    """Yield the rows of the oldest windows once they are complete; leave the `leave` newest in flight."""
    while len(pending) > leave:
        window, results, future = pending.popleft()
        if future is not None:
            future.result()
        for step, result in zip(window, results, strict=True):
            yield EpochRows(
                ids=result.ids,
                arrays={**result.arrays, IDS: result.ids},
                repeated=step.repeated,
                cursor_after=step.cursor_after,
            )
