"""How are a far store's rows read twice and sent once? A row source that keeps here what another one gave."""

from __future__ import annotations

from collections.abc import Iterator
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
from softlabels_client.cache.folder import DEFAULT_BYTES, CacheFolder, default_folder
from softlabels_client.cache.kept import LOGGER, KeptRows
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

    def epoch(self, plan: EpochPlan, fields: tuple[str, ...]) -> Iterator[EpochRows]:
        """The rows of each step of an epoch, fetched ahead by a thread: from the disk, or by one stream.

        Raises, when it is read: as the other source does.
        """
        kept = self._shelf()
        return epoch_ahead(self._far.epoch(plan, fields) if kept is None else kept_epoch(kept, self._far, plan, fields))

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
