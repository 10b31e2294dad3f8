"""CachedRows: a row source that stores on the trainer's disk what another source returned.

Epochs are looked up a window of steps at a time. If nearly everything is missing, as in a first epoch, one stream
brings it all, so a slow link never waits for a request. If some is missing, as when a store is larger than its cache,
only that is requested, one request per window, with the requests of the next windows in flight.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
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
from softlabels_client.cache.row_records import Words
from softlabels_client.cache.row_table import RowTable
from softlabels_client.data.prefetch import close_items, epoch_ahead

# Errors are logged as text: a handler that stores records would otherwise keep their frames, and with them the table.
LOGGER = logging.getLogger("softlabels.cache")

MOST_IDS = 8192
"""Ids per request for missing rows; servers accept 65,536 by default."""

_STREAM_FROM, _STREAM_TO = 0.9, 0.8
"""Fractions of missing rows from which a stream is opened, and below which it is closed. Cached rows in a stream are
sent in vain, which costs less than requests for the missing ones; two thresholds keep it from opening and closing."""

_WINDOW_BYTES = 4 << 20
"""Bytes of rows looked up at once: more than a link of 50 ms and 100 Mbit/s has in flight (600 KB)."""

_WINDOW_SAMPLES = 8192
_REQUESTS_IN_FLIGHT = 3


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
        self.manifest: Manifest = source.manifest
        self.digest: str = source.digest
        self._source = source
        self._folder = default_folder() if folder is None else Path(folder)
        self._most_bytes, self._read_only = most_bytes, read_only
        self._lookup = self._open()
        self._closed = False

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
        """Return the rows of these ids, in this order, requesting what is not cached; raises as the source."""
        lookup = self._current_lookup()
        result = None if lookup is None or spans is not None else lookup.lookup(ids, fields, views)
        if lookup is None or result is None:
            return self._source.fetch(ids, fields, views=views, spans=spans)
        lookup.fetch_missing([result])
        return {name: ids if name == IDS else result.arrays[name] for name in fields}

    def epoch(self, config: EpochConfig, fields: tuple[str, ...]) -> Iterator[EpochRows]:
        """Iterate over the rows of each step of an epoch, fetched ahead by a thread; raises as the source."""
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
        if self.manifest.layout.kind == "sequences" or not self.manifest.finished:
            return None
        folder = CacheFolder(self._folder, most_bytes=self._most_bytes, read_only=self._read_only)
        try:
            table = folder.open(self.manifest, self.digest)
        except OSError as error:
            why = f"cannot be used ({error})"
        else:
            if table is not None:
                return CacheLookup(table, self._source, read_only=self._read_only)
            why = "is read-only" if self._read_only else f"has no room for it within {self._most_bytes} bytes"
            why = f"has no rows of {self.manifest.name!r} and {why}"
        LOGGER.warning("the cache in %s %s: all rows come from the server", self._folder, why)
        return None

    def __getstate__(self) -> dict[str, Any]:
        # Open files and maps are not pickled: the process that unpickles opens the folder for itself.
        return {name: value for name, value in self.__dict__.items() if name not in ("_lookup", "_closed")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lookup=None, _closed=True)


@dataclass(frozen=True)
class LookupResult:
    """What the cache has of some rows: `cached` says which, [B]; the others have arbitrary content in `arrays`."""

    ids: IdArray
    views: NDArray[np.int64] | None
    keys: Words
    checks: Words
    arrays: dict[str, NDArray[Any]]
    cached: NDArray[np.bool_]


class CacheLookup:
    """Cached rows of one store version, in front of the source that they come from.

    A failing disk is logged once; from then on nothing is written to it, or read from it.
    """

    def __init__(self, table: RowTable, source: RowSource, *, read_only: bool) -> None:
        self._table, self._source = table, source
        self._reads, self._writes = True, not read_only
        self._has_warned = False

    def lookup(self, ids: IdArray, fields: tuple[str, ...], views: NDArray[np.int64] | None) -> LookupResult | None:
        """Return what is cached of these rows; None if only the source can answer, or refuse, the request."""
        keyed = self._table.keys.of(ids, views)
        names = tuple(name for name in fields if name != IDS)
        if keyed is None or not self._reads or any(name not in self._table.fields for name in names):
            return None
        try:
            arrays, cached, damaged = self._table.read(*keyed, names)
        except OSError as error:
            self._stop_reading(error)
            return None
        if damaged and not self._has_warned:
            self._has_warned = True
            LOGGER.warning(
                "%d rows of %r in the cache are damaged (checksum): the disk may be failing. They are requested again; "
                "this is logged once, and no damaged row is ever used",
                damaged,
                self._source.manifest.name,
            )
        # A request for ids alone needs nothing from the table.
        return LookupResult(ids, views, *keyed, arrays, cached if names else np.ones_like(cached))

    def lookup_step(self, step: StepBatch, fields: tuple[str, ...], view: int | None) -> LookupResult | None:
        """Return what is cached of a step of an epoch; None if the ids of its samples are not known."""
        try:
            ids = self._table.ids_at(step.positions) if self._reads else None
        except OSError as error:
            self._stop_reading(error)
            return None
        return None if ids is None else self.lookup(ids, fields, _views(view, len(step.positions)))

    def fetch_missing(self, results: Sequence[LookupResult]) -> None:
        """Fetch missing rows, each once, store them, and copy them into the results' arrays; raises as the source."""
        missing = [np.flatnonzero(~result.cached) for result in results]
        if not any(map(len, missing)):
            return

        def joined(name: str) -> Any:
            return np.concatenate([getattr(result, name)[rows] for result, rows in zip(results, missing, strict=True)])

        keys, distinct, inverse = np.unique(joined("keys"), return_index=True, return_inverse=True)
        views = None if results[0].views is None else joined("views")[distinct]
        fetched = self._fetched(joined("ids")[distinct], tuple(results[0].arrays), views)
        self._write(self._table.store, keys, joined("checks")[distinct], fetched)
        begin = 0
        for result, rows in zip(results, missing, strict=True):
            for name, array in result.arrays.items():
                array[rows] = fetched[name][inverse[begin : begin + len(rows)]]
            begin += len(rows)

    def store_step(self, step: StepBatch, rows: EpochRows, view: int | None, result: LookupResult | None) -> None:
        """Store the rows of a step, except for those that `result` says are cached."""
        keyed = self._table.keys.of(rows.ids, _views(view, len(rows.ids)))
        if keyed is None or not self._writes:
            return
        keys, checks = keyed
        arrays = {name: array for name, array in rows.arrays.items() if name != IDS}
        if result is not None and result.cached.any():
            missing = ~result.cached
            keys, checks = keys[missing], checks[missing]
            arrays = {name: array[missing] for name, array in arrays.items()}
        self._write(self._table.store, keys, checks, arrays)
        self._write(self._table.store_ids, step.positions, rows.ids)

    def _fetched(
        self, ids: IdArray, names: tuple[str, ...], views: NDArray[np.int64] | None
    ) -> Mapping[str, NDArray[Any]]:
        parts = [slice(begin, begin + MOST_IDS) for begin in range(0, len(ids), MOST_IDS)]
        fetched = [self._source.fetch(ids[p], names, views=None if views is None else views[p]) for p in parts]
        return fetched[0] if len(fetched) == 1 else {n: np.concatenate([part[n] for part in fetched]) for n in names}

    def _write(self, store: Callable[..., None], *rows: Any) -> None:
        """Call a method of the table that stores rows; after a first failure, never again."""
        if not self._writes:
            return
        try:
            store(*rows)
        except OSError as error:
            self._writes = False
            LOGGER.warning("no more rows are added to the cache, training continues: %s", str(error))

    def _stop_reading(self, error: OSError) -> None:
        if self._reads:
            self._reads = self._writes = False
            LOGGER.warning("the cache cannot be read any more, all rows come from the server: %s", str(error))


_Window = tuple[list[StepBatch], list[LookupResult], Future[None] | None]


def cached_epoch(
    lookup: CacheLookup, source: RowSource, config: EpochConfig, fields: tuple[str, ...]
) -> Iterator[EpochRows]:
    """Yield the rows of each step of an epoch once, in order, from the cache or the source; raises as the source."""
    names = tuple(dict.fromkeys((*fields, IDS)))
    view, cursor = config.view_of(source.manifest), config.cursor
    pending: deque[_Window] = deque()
    stream: Iterator[EpochRows] | None = None
    with ThreadPoolExecutor(_REQUESTS_IN_FLIGHT, thread_name_prefix="softlabels-gaps") as pool:
        try:
            for window in _windows(config, source, names):
                results = [lookup.lookup_step(step, names, view) for step in window]
                known = [result for result in results if result is not None]
                least = _STREAM_FROM if stream is None else _STREAM_TO
                if len(known) < len(results) or _missing_fraction(known) > least:
                    # Steps come in order: windows still in flight precede this one.
                    yield from _completed(pending, leave=0)
                    if stream is None:
                        stream = source.epoch(config.resumed_at(cursor), names)
                    for step, result in zip(window, results, strict=True):
                        rows = next(stream, None)
                        if rows is None:
                            raise WireError("the epoch ended before its last batch")
                        lookup.store_step(step, rows, view, result)
                        yield rows
                else:
                    close_items(stream)
                    stream = None
                    whole = all(bool(result.cached.all()) for result in known)
                    pending.append((window, known, None if whole else pool.submit(lookup.fetch_missing, known)))
                    # A window that is all cached, with none in flight before it, waits for nothing.
                    yield from _completed(pending, leave=0 if whole and len(pending) == 1 else _REQUESTS_IN_FLIGHT - 1)
                cursor = window[-1].cursor_after
            yield from _completed(pending, leave=0)
            # This also reads the end frame, which says that the stream was whole.
            if stream is not None and next(stream, None) is not None:
                raise WireError("the epoch continues after its last batch")
        finally:
            close_items(stream)
            # Before the pool's own exit, which waits for every request that was not cancelled.
            for *_, future in pending:
                if future is not None:
                    future.cancel()


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


def _missing_fraction(results: Sequence[LookupResult]) -> float:
    rows = sum(len(result.cached) for result in results)
    return 1 - sum(int(result.cached.sum()) for result in results) / rows if rows else 0.0


def _views(view: int | None, count: int) -> NDArray[np.int64] | None:
    return None if view is None else np.full(count, view, dtype=np.int64)
