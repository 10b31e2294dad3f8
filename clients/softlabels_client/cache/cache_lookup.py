"""Lookups in the cache: which of the requested rows are on disk, and how missing ones are fetched and stored."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.ids import IdArray
from softlabels.manifest import IDS
from softlabels.order import StepBatch
from softlabels.target_store import RowSource
from softlabels.targets import EpochRows
from softlabels_client.cache.cache_folder import OpenTable
from softlabels_client.cache.row_records import Words

LOGGER = logging.getLogger("softlabels.cache")

MOST_IDS = 8192
"""Ids per request for missing rows; servers accept 65,536 by default."""


@dataclass(frozen=True)
class LookupResult:
    """What the cache has of some rows.

    Attributes:
        ids: [B] sample ids.
        views: [B] view of each sample; None if the store keeps none.
        keys, checks: [B] lookup keys.
        arrays: one per field, [B, ...]; arbitrary content for rows that are not cached.
        cached: [B] whether each row is.
    """

    ids: IdArray
    views: NDArray[np.int64] | None
    keys: Words
    checks: Words
    arrays: dict[str, NDArray[Any]]
    cached: NDArray[np.bool_]


class CacheLookup:
    """Cached rows of one store version, in front of the source that they come from.

    A failing disk is logged once; from then on nothing is written to it, or read from it.

    Args:
        opened: the table.
        source: row source for what is missing.
        read_only: add no rows.
    """

    def __init__(self, opened: OpenTable, source: RowSource, *, read_only: bool) -> None:
        self._opened, self._table, self._source = opened, opened.table, source
        self._reads, self._writes = True, not read_only
        self._has_warned = False

    def lookup(self, ids: IdArray, fields: tuple[str, ...], views: NDArray[np.int64] | None) -> LookupResult | None:
        """Return what is cached of these rows; None if only the source can answer, or refuse, the request."""
        keyed = self._table.keys.of(ids, views)
        names = tuple(name for name in fields if name != IDS)
        if keyed is None or not self._reads or any(name not in self._table.shape.fields for name in names):
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
        """Fetch missing rows, each once, store them, and copy them into the results' arrays.

        Raises: as the source.
        """
        missing = [np.flatnonzero(~result.cached) for result in results]
        if not sum(map(len, missing)):
            return
        keys = np.concatenate([result.keys[rows] for result, rows in zip(results, missing, strict=True)])
        _, distinct, inverse = np.unique(keys, return_index=True, return_inverse=True)
        parts: list[Any] = [result.ids[rows] for result, rows in zip(results, missing, strict=True)]
        ids: IdArray = np.concatenate(parts)[distinct]
        checks = np.concatenate([result.checks[rows] for result, rows in zip(results, missing, strict=True)])[distinct]
        views = None
        if results[0].views is not None:
            views = np.concatenate(
                [f.views[rows] for f, rows in zip(results, missing, strict=True) if f.views is not None]
            )
            views = views[distinct]
        fetched = self._fetched(ids, tuple(results[0].arrays), views)
        self._store(keys[distinct], checks, fetched)
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
        self._store(keys, checks, arrays)
        try:
            self._table.store_ids(step.positions, rows.ids)
        except OSError as error:
            self._stop_writing(error)

    def _fetched(
        self, ids: IdArray, names: tuple[str, ...], views: NDArray[np.int64] | None
    ) -> Mapping[str, NDArray[Any]]:
        parts = [slice(begin, begin + MOST_IDS) for begin in range(0, len(ids), MOST_IDS)]
        fetched = [self._source.fetch(ids[p], names, views=None if views is None else views[p]) for p in parts]
        if len(fetched) == 1:
            return fetched[0]
        return {name: np.concatenate([part[name] for part in fetched]) for name in names}

    def _store(self, keys: Words, checks: Words, arrays: Mapping[str, NDArray[Any]]) -> None:
        if not self._writes:
            return
        try:
            self._table.store(keys, checks, arrays)
        except OSError as error:
            self._stop_writing(error)

    def _stop_writing(self, error: OSError) -> None:
        if self._writes:
            self._writes = False
            LOGGER.warning("no more rows are added to the cache, training continues: %s", str(error))

    def _stop_reading(self, error: OSError) -> None:
        if self._reads:
            self._reads = self._writes = False
            LOGGER.warning("the cache cannot be read any more, all rows come from the server: %s", str(error))


def missing_fraction(results: Iterable[LookupResult]) -> float:
    """Return the fraction of rows that are not cached."""
    counts = [(len(result.cached), int(result.cached.sum())) for result in results]
    rows, cached = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    return 1 - cached / rows if rows else 0.0


def _views(view: int | None, count: int) -> NDArray[np.int64] | None:
    return None if view is None else np.full(count, view, dtype=np.int64)
