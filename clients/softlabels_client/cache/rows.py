"""How are rows of a far store read twice and sent once? A row source that keeps on this machine what another one gave."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.encodings import Encoding
from softlabels.epochs import EpochPlan, EpochRows
from softlabels.errors import RequestError
from softlabels.ids import IdArray
from softlabels.manifest import Manifest
from softlabels.opening import IDS, RowSource
from softlabels_client.cache.epochs import kept_epoch
from softlabels_client.cache.folder import DEFAULT_BYTES, CacheFolder, OpenTable, default_folder
from softlabels_client.cache.kept import KeptRows
from softlabels_client.prefetch import Ahead

_LOG = logging.getLogger("softlabels.cache")

AHEAD_BYTES = 32 << 20
"""Rows of an epoch that are fetched before they are asked for: seconds of a slow link, and little memory."""

AHEAD_BATCHES = 256


class CachedRows:
    """Rows of another source, kept in a folder on this machine under the digest of the store's version.

    A row is sent once: later it comes from the disk, where its checksum is verified each time. What is spoilt, torn or
    not there is asked for again; a full or broken disk ends the keeping and not the training, and is logged once to
    `softlabels.cache`. Stores of single rows and of views are kept; sequences, and stores that are unfinished, are
    passed through. Safe in threads, between processes and after fork; pickles.

    Args:
        far: where rows come from at first.
        folder: where they are kept; $SOFTLABELS_CACHE or ~/.cache/softlabels when left out.
        most_bytes: of the whole folder. What a store does not fit into is filled once and then stays as it is.
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
            raise RequestError(f"cache_bytes is {most_bytes}: a cache of nothing keeps nothing; leave the cache out")
        self._far = far
        self._place = default_folder() if folder is None else Path(folder)
        self._most_bytes, self._read_only = most_bytes, read_only
        self._said: set[str] = set()
        self._reset()

    @property
    def manifest(self) -> Manifest:
        """What the store says of itself."""
        return self._far.manifest

    @property
    def digest(self) -> str:
        """The version of the store; rows of no other are served from the cache."""
        return self._far.digest

    @property
    def encoding(self) -> Encoding:
        """How the rows are decoded; what the encoding learnt is fetched anew each time that a store is opened."""
        return self._far.encoding

    def fetch(
        self,
        ids: IdArray,
        fields: tuple[str, ...],
        *,
        views: NDArray[np.int64] | None = None,
        spans: NDArray[np.int64] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Rows of these ids: from the disk, and what is missing there by one request. As the other source gives them.

        Raises: as the other source does, for what is asked of it.
        """
        kept = self._kept()
        if kept is None or spans is not None:
            return self._far.fetch(ids, fields, views=views, spans=spans)
        found = kept.look(ids, fields, views)
        if found is None:
            return self._far.fetch(ids, fields, views=views)
        kept.fill(found)
        return {name: ids if name == IDS else found.arrays[name] for name in fields}

    def epoch(self, plan: EpochPlan, fields: tuple[str, ...]) -> Iterator[EpochRows]:
        """The rows of each step of an epoch; a thread fetches ahead, from the disk or by one stream. As `fetch`."""
        kept = self._kept()
        if kept is None:
            rows = self._far.epoch(plan, fields)
        else:
            rows = kept_epoch(kept, self._far, plan, fields)
        return Ahead(rows, most_items=AHEAD_BATCHES, most_bytes=AHEAD_BYTES, size_of=bytes_of)

    def close(self) -> None:
        """Let go of files and connections; a later batch opens them again."""
        self._reset()
        self._far.close()

    def _kept(self) -> KeptRows | None:
        """What is kept of this store; None where nothing can be."""
        if self._process != os.getpid() and not self._tried:
            self._process = os.getpid()
        if not self._tried:
            self._tried = True
            self._open = self._opened()
        if self._open is None:
            return None
        return KeptRows(self._open.table, self._far, self._say, read_only=self._read_only or self._gave_up)

    def _opened(self) -> OpenTable | None:
        raise NotImplementedError


def bytes_of(rows: EpochRows) -> int:
    """What a step's rows take in memory."""
    return sum(array.nbytes for array in rows.arrays.values())
