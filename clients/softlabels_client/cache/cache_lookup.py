"""Lookups in the cache: which of the requested rows are on disk, and how missing ones are fetched and stored."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.epochs import EpochRows
from softlabels.ids import IdArray
from softlabels.manifest import IDS
from softlabels.order import StepBatch
from softlabels.target_store import RowSource
from softlabels_client.cache.cache_folder import OpenTable
from softlabels_client.cache.checks import Words

LOGGER = logging.getLogger("softlabels.cache")

MOST_IDS = 8192
"""In one request for what is missing; servers take 65,536 unless told otherwise."""


@dataclass(frozen=True)
class Found:
    """What a cache has of some rows.

    Attributes:
        ids: [B] of the samples.
        views: [B] of them; None where the store keeps none.
        keys, checks: [B] what they are kept under.
        arrays: one a field, [B, ...]; of any content where a row is not here.
        here: [B] which are.
    """

    ids: IdArray
    views: NDArray[np.int64] | None
    keys: Words
    checks: Words
    arrays: dict[str, NDArray[Any]]
    here: NDArray[np.bool_]


class KeptRows:
    """The rows of one version of a store that are kept on this machine, in front of where they come from.

    A disk that fails is logged once; from then on nothing is written to it, or read from it.

    Args:
        opened: the table.
        far: where rows come from at first.
        read_only: none is added.
    """

    def __init__(self, opened: OpenTable, far: RowSource, *, read_only: bool) -> None:
        self._opened, self._table, self._far = opened, opened.table, far
        self._reads, self._writes = True, not read_only
        self._told_of_damage = False

    def look(self, ids: IdArray, fields: tuple[str, ...], views: NDArray[np.int64] | None) -> Found | None:
        """What is here of these rows; None for a question that only the store itself can answer, or refuse."""
        keyed = self._table.keys.of(ids, views)
        names = tuple(name for name in fields if name != IDS)
        if keyed is None or not self._reads or any(name not in self._table.shape.fields for name in names):
            return None
        try:
            arrays, here, spoilt = self._table.read(*keyed, names)
        except OSError as error:
            self._stop_reading(error)
            return None
        if spoilt and not self._told_of_damage:
            self._told_of_damage = True
            LOGGER.warning(
                "%d rows of %r in the cache are not what was kept (checksum): the disk may be failing. They are asked "
                "for again; this is said once, and no damaged row is ever used",
                spoilt,
                self._far.manifest.name,
            )
        # Where nothing is asked for but ids, those are all there is.
        return Found(ids, views, *keyed, arrays, here if names else np.ones_like(here))

    def look_at(self, step: StepBatch, fields: tuple[str, ...], view: int | None) -> Found | None:
        """What is here of an epoch's step; None where it is not known here which samples those are."""
        try:
            ids = self._table.ids_at(step.positions) if self._reads else None
        except OSError as error:
            self._stop_reading(error)
            return None
        return None if ids is None else self.look(ids, fields, _views(view, len(step.positions)))

    def fill(self, founds: Sequence[Found]) -> None:
        """Fetch what is missing in these, each row once, keep it, and put it into their arrays.

        Raises: as the far source does.
        """
        missing = [np.flatnonzero(~found.here) for found in founds]
        if not sum(map(len, missing)):
            return
        keys = np.concatenate([found.keys[rows] for found, rows in zip(founds, missing, strict=True)])
        _, distinct, inverse = np.unique(keys, return_index=True, return_inverse=True)
        parts: list[Any] = [found.ids[rows] for found, rows in zip(founds, missing, strict=True)]
        ids: IdArray = np.concatenate(parts)[distinct]
        checks = np.concatenate([found.checks[rows] for found, rows in zip(founds, missing, strict=True)])[distinct]
        views = None
        if founds[0].views is not None:
            views = np.concatenate(
                [f.views[rows] for f, rows in zip(founds, missing, strict=True) if f.views is not None]
            )
            views = views[distinct]
        fetched = self._fetched(ids, tuple(founds[0].arrays), views)
        self._keep(keys[distinct], checks, fetched)
        begin = 0
        for found, rows in zip(founds, missing, strict=True):
            for name, array in found.arrays.items():
                array[rows] = fetched[name][inverse[begin : begin + len(rows)]]
            begin += len(rows)

    def keep_step(self, step: StepBatch, rows: EpochRows, view: int | None, found: Found | None) -> None:
        """Keep a step's rows as they came, but for those of which `found` says that they are here."""
        keyed = self._table.keys.of(rows.ids, _views(view, len(rows.ids)))
        if keyed is None or not self._writes:
            return
        keys, checks = keyed
        arrays = {name: array for name, array in rows.arrays.items() if name != IDS}
        if found is not None and found.here.any():
            missing = ~found.here
            keys, checks = keys[missing], checks[missing]
            arrays = {name: array[missing] for name, array in arrays.items()}
        self._keep(keys, checks, arrays)
        try:
            self._table.keep_ids(step.positions, rows.ids)
        except OSError as error:
            self._stop_writing(error)

    def _fetched(
        self, ids: IdArray, names: tuple[str, ...], views: NDArray[np.int64] | None
    ) -> Mapping[str, NDArray[Any]]:
        parts = [slice(begin, begin + MOST_IDS) for begin in range(0, len(ids), MOST_IDS)]
        fetched = [self._far.fetch(ids[p], names, views=None if views is None else views[p]) for p in parts]
        if len(fetched) == 1:
            return fetched[0]
        return {name: np.concatenate([part[name] for part in fetched]) for name in names}

    def _keep(self, keys: Words, checks: Words, arrays: Mapping[str, NDArray[Any]]) -> None:
        if not self._writes:
            return
        try:
            self._table.keep(keys, checks, arrays)
        except OSError as error:
            self._stop_writing(error)

    def _stop_writing(self, error: OSError) -> None:
        if self._writes:
            self._writes = False
            LOGGER.warning("no more rows are kept in the cache, training goes on without: %s", str(error))

    def _stop_reading(self, error: OSError) -> None:
        if self._reads:
            self._reads = self._writes = False
            LOGGER.warning("the cache cannot be read any more, all rows come from the server: %s", str(error))


def missing_share(founds: Iterable[Found]) -> float:
    """The share of rows that are not here."""
    counts = [(len(found.here), int(found.here.sum())) for found in founds]
    rows, here = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    return 1 - here / rows if rows else 0.0


def _views(view: int | None, count: int) -> NDArray[np.int64] | None:
    return None if view is None else np.full(count, view, dtype=np.int64)
