"""Store reader: rows of a store on disk by sample id, from committed shards, each chunk verified when first read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.encodings import Encoding
from softlabels.errors import ManifestError, RequestError, RowsNotCommittedError, UnknownFieldError
from softlabels.ids import IdArray
from softlabels.manifest import FINGERPRINTS, IDS, ROW_OFFSETS, Manifest
from softlabels.order import EpochConfig
from softlabels.store.array_reader import ArrayReader
from softlabels.store.sample_index import SequenceIndex, ids_of_rows, make_index
from softlabels.store.store_documents import load_encoding, load_manifest, plan_digest, store_digest
from softlabels.targets import EpochRows


class LocalRows:
    """The rows of a store in a folder. Opening takes constant time and memory, whatever the number of rows.

    Safe under threads and after fork; unpickling opens the store again.

    Args:
        root: the store's folder.
        manifest: the store's manifest or plan; read from the folder when left out.
    Attributes:
        digest: digest of this version of the store; of an unfinished one, of its plan, since committed rows never
            change.
    Raises:
        UnknownStoreError: there is no store. ManifestError, FormatVersionError: its manifest is invalid or too new.
    """

    def __init__(self, root: Path, *, manifest: Manifest | None = None) -> None:
        self._root = Path(root)
        self.manifest = load_manifest(self._root) if manifest is None else manifest
        self._index = make_index(self._root, self.manifest) if self.manifest.finished else None
        self._sequences = SequenceIndex(self._root, self.manifest)
        self._arrays = ArrayReader(self._root, self.manifest, plan_sha256=plan_digest(self.manifest))
        self.digest = store_digest(self.manifest)

    @cached_property
    def encoding(self) -> Encoding:
        """The encoding of the rows, with its learnt arrays."""
        return load_encoding(self._root, self.manifest)

    def fetch(
        self,
        ids: IdArray,
        fields: tuple[str, ...],
        *,
        views: NDArray[np.int64] | None = None,
        spans: NDArray[np.int64] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Return rows of these ids, see `softlabels.target_store.RowSource.fetch`.

        Raises:
            UnknownIdError, BadIdsError, UnknownFieldError, RequestError, RowsNotCommittedError, ChecksumError,
            TruncatedError.
        """
        positions = self.positions_of(ids)
        layout = self.manifest.layout
        if layout.kind == "sequences":
            _check(views is None, f"{self.manifest.name!r} keeps sequences, not views: ask for spans")
            return self._fetch_sequences(positions, fields, spans)
        _check(spans is None, f"{self.manifest.name!r} keeps no sequences: it has no spans to ask for")
        rows = positions
        if layout.kind == "views":
            rows = positions * layout.views + _checked_views(views, len(ids), self.manifest)
        else:
            _check(views is None, f"{self.manifest.name!r} keeps one row a sample: it has no views to ask for")
        return self.fetch_rows(rows, fields, ids=ids)

    def row_counts(self, ids: IdArray) -> NDArray[np.int64]:
        """Return how many rows each of these samples has, [B], without reading them."""
        return self.row_counts_at(self.positions_of(ids))

    def row_counts_at(self, positions_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many rows each of the samples at these positions has, [B]."""
        if self.manifest.layout.kind != "sequences":
            return np.full(len(positions_B), self.manifest.layout.views, dtype=np.int64)
        return self._sequences.lengths(positions_B)

    def positions_of(self, ids: IdArray) -> NDArray[np.int64]:
        """Return the positions of these ids in the transfer set.

        Raises:
            UnknownIdError, BadIdsError. RowsNotCommittedError: an unfinished store has no index of such ids yet.
        """
        if self._index is None:
            if self.manifest.ids.dense_start is None and self.manifest.layout.kind != "sequences":
                raise RowsNotCommittedError(
                    f"{self.manifest.name!r} is unfinished and its ids are not dense: they can be looked up when it "
                    "is finished; run `softlabels resume`"
                )
            self._index = make_index(self._root, self.manifest)
        return self._index.positions(ids)

    def _fetch_sequences(
        self, positions: NDArray[np.int64], fields: tuple[str, ...], spans: NDArray[np.int64] | None
    ) -> dict[str, NDArray[Any]]:
        rows, row_offsets = self._sequences.rows(positions, spans)
        found = self.fetch_rows(rows, tuple(field for field in fields if field != FINGERPRINTS))
        if FINGERPRINTS in fields:
            found[FINGERPRINTS] = self._sequences.fingerprints(positions)
        found[ROW_OFFSETS] = row_offsets
        return found

    def fetch_rows(
        self, rows_B: NDArray[np.int64], fields: tuple[str, ...], *, ids: IdArray | None = None
    ) -> dict[str, NDArray[Any]]:
        """Return rows by number; raise as `fetch` does, and ManifestError unless they have these ids, [B]."""
        for field in fields:
            if field not in self.manifest.arrays:
                kept = ", ".join(self.manifest.arrays)
                raise UnknownFieldError(f"{self.manifest.name!r} keeps no {field!r}; it keeps {kept}", field=field)
        found = {field: self._arrays.gather(field, rows_B) for field in fields}
        if ids is not None and self.manifest.ids.dense_start is None:
            # The index is not verified on opening; a flipped bit in it could lead to other rows, which carry their ids.
            kept_ids = found[IDS] if IDS in found else self._arrays.gather(IDS, rows_B)
            if not np.array_equal(ids_of_rows(kept_ids), ids):
                raise ManifestError(
                    f"the id index of {self.manifest.name!r} points to rows of other samples: run `softlabels repair`"
                )
        if IDS in found:
            found[IDS] = ids_of_rows(found[IDS])
        return found

    def at_positions(
        self, positions_B: NDArray[np.int64], fields: tuple[str, ...], *, view: int | None = None
    ) -> dict[str, NDArray[Any]]:
        """Return rows of the samples at these positions of a finished store, all of one view, as `fetch` does."""
        layout = self.manifest.layout
        if layout.kind != "sequences":
            return self.fetch_rows(positions_B if view is None else positions_B * layout.views + view, fields)
        found = self._fetch_sequences(positions_B, tuple(field for field in fields if field != IDS), None)
        if IDS in fields:
            assert self._index is not None, "the store is finished"
            found[IDS] = self._index.ids_at(positions_B)
        return found

    def word_sum_at(self, positions_B: NDArray[np.int64], field: str, *, view: int | None = None) -> int | None:
        """Return the sum of the 64-bit words of rows that `at_positions` returned, modulo 2⁶⁴, without another read.

        It is of the bytes as they were verified, so that a receiver notices bytes that changed later.

        Returns:
            None where sums are not kept: short rows, rows that are not whole words, compressed stores, sequences.
        """
        layout = self.manifest.layout
        if layout.kind == "sequences":
            return None
        return self._arrays.word_sum(field, positions_B if view is None else positions_B * layout.views + view)

    def epoch(self, config: EpochConfig, fields: tuple[str, ...]) -> Iterator[EpochRows]:
        """Yield the rows of each step of an epoch; raises as `fetch` does."""
        view = config.view_of(self.manifest)
        wanted = tuple(dict.fromkeys((*fields, IDS)))
        for step in config.batches(self.manifest, self.digest):
            arrays = self.at_positions(step.positions, wanted, view=view)
            ids: Any = arrays[IDS]
            yield EpochRows(ids=ids, arrays=arrays, repeated=step.repeated, cursor_after=step.cursor_after)

    def close(self) -> None:
        """Release the mapped files; arrays that views still refer to stay mapped."""
        self._arrays.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self._root,))


def _checked_views(views: NDArray[np.int64] | None, count: int, manifest: Manifest) -> NDArray[np.int64]:
    """Return the views asked for; raise RequestError unless there is one per sample, and the store keeps it."""
    kept = manifest.layout.views
    if views is None:
        raise RequestError(
            f"{manifest.name!r} keeps {kept} views a sample: say which one each input shows; a target of one view "
            "never serves another"
        )
    if views.shape != (count,):
        raise RequestError(f"{count} ids need {count} views, not {views.shape}")
    outside = (views < 0) | (views >= kept)
    if outside.any():
        raise RequestError(f"{manifest.name!r} keeps views 0 to {kept - 1}, not {views[outside][:5].tolist()}")
    return views


def _check(valid: bool, message: str) -> None:
    if not valid:
        raise RequestError(message)
