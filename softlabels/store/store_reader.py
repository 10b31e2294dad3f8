"""How a store on disk is read: ids to rows, rows only where the ledger says so, chunks verified at first touch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.encodings import Encoding
from softlabels.epochs import EpochRows
from softlabels.errors import (
    ManifestError,
    RequestError,
    RowsNotCommittedError,
    UnknownFieldError,
)
from softlabels.ids import IdArray, from_fixed_bytes
from softlabels.manifest import FINGERPRINTS, IDS, ROW_OFFSETS, Manifest
from softlabels.order import EpochConfig
from softlabels.store.array_reader import ArrayReader
from softlabels.store.encoding_files import load_encoding
from softlabels.store.sample_index import SequenceIndex, make_index
from softlabels.store.store_documents import load_manifest, plan_digest, store_digest


class LocalRows:
    """The rows of a store in a folder. Opening takes constant time and memory, whatever the number of rows.

    Safe under threads and after fork; pickling re-opens.

    Args:
        root: the store's folder.
        manifest: what the store holds, where the caller knows; read from the folder when left out.
    Raises:
        UnknownStoreError: there is no store. ManifestError, FormatVersionError: it cannot be believed or understood.
    """

    def __init__(self, root: Path, *, manifest: Manifest | None = None) -> None:
        self._root = Path(root)
        self._manifest = load_manifest(self._root) if manifest is None else manifest
        self._index = make_index(self._root, self._manifest) if self._manifest.finished else None
        self._sequences = SequenceIndex(self._root, self._manifest)
        self._arrays = ArrayReader(self._root, self._manifest, plan_sha256=plan_digest(self._manifest))
        self._digest = store_digest(self._manifest)
        self._encoding: Encoding | None = None

    @property
    def manifest(self) -> Manifest:
        """What the store says of itself; of an unfinished one, its plan."""
        return self._manifest

    @property
    def encoding(self) -> Encoding:
        """How the rows are decoded, with what the encoding learnt for this store."""
        if self._encoding is None:
            self._encoding = load_encoding(self._root, self._manifest)
        return self._encoding

    @property
    def digest(self) -> str:
        """The version of the store; of an unfinished one, of its plan, since committed rows never change."""
        return self._digest

    def fetch(
        self,
        ids: IdArray,
        fields: tuple[str, ...],
        *,
        views: NDArray[np.int64] | None = None,
        spans: NDArray[np.int64] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Rows of these ids, in the order asked; ids may repeat.

        Args:
            ids: [B].
            views: [B] which view of each sample; needed where the store keeps views, refused elsewhere.
            spans: [B, 2] first row and the one after the last of each sample, for sequences; None for whole samples.
        Returns:
            One array a field, [B, ...]; of sequences the ranges joined, and `row_offsets` [B + 1] where each begins.
        Raises:
            UnknownIdError, BadIdsError, UnknownFieldError, RequestError, RowsNotCommittedError, ChecksumError,
            TruncatedError.
        """
        positions = self.positions_of(ids)
        layout = self._manifest.layout
        if layout.kind == "sequences":
            _refuse(views is not None, f"{self._manifest.name!r} keeps sequences, not views: ask for spans")
            return self._fetch_sequences(positions, fields, spans)
        _refuse(spans is not None, f"{self._manifest.name!r} keeps no sequences: it has no spans to ask for")
        rows = positions
        if layout.kind == "views":
            rows = positions * layout.views + checked_views(views, len(ids), self._manifest)
        else:
            _refuse(views is not None, f"{self._manifest.name!r} keeps one row a sample: it has no views to ask for")
        return self.fetch_rows(rows, fields, ids=ids)

    def row_counts(self, ids: IdArray) -> NDArray[np.int64]:
        """How many rows each of these samples has, [B]: what a batch of sequences will hold, before it is read."""
        return self.row_counts_at(self.positions_of(ids))

    def row_counts_at(self, positions_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many rows each of the samples at these positions has, [B]."""
        if self._manifest.layout.kind != "sequences":
            return np.full(len(positions_B), self._manifest.layout.views, dtype=np.int64)
        return self._sequences.lengths(positions_B)

    def positions_of(self, ids: IdArray) -> NDArray[np.int64]:
        """Positions of these ids in the transfer set."""
        if self._index is None:
            if self._manifest.ids.dense_start is None and self._manifest.layout.kind != "sequences":
                raise RowsNotCommittedError(
                    f"{self._manifest.name!r} is unfinished and its ids are not dense: they can be looked up when it "
                    "is finished; run `softlabels resume`"
                )
            self._index = make_index(self._root, self._manifest)
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
        """Rows by number; with `ids`, checked to be theirs where the ids were looked up. Raises as `fetch` does."""
        self._refuse_unknown(fields)
        found = {field: self._arrays.gather(field, rows_B) for field in fields}
        if ids is not None and self._manifest.ids.dense_start is None:
            kept_ids = found[IDS] if IDS in found else self._arrays.gather(IDS, rows_B)
            self._refuse_other_ids(_as_ids(kept_ids), ids)
        if IDS in found:
            found[IDS] = _as_ids(found[IDS])
        return found

    def at_positions(
        self, positions_B: NDArray[np.int64], fields: tuple[str, ...], *, view: int | None = None
    ) -> dict[str, NDArray[Any]]:
        """Rows of the samples at these positions of a finished store, as `fetch` gives them; `ids` may be asked for.

        Args:
            positions_B: [B], each inside the store.
            fields: one array each.
            view: of every sample, where the store keeps views.
        """
        layout = self._manifest.layout
        if layout.kind != "sequences":
            return self.fetch_rows(positions_B if view is None else positions_B * layout.views + view, fields)
        found = self._fetch_sequences(positions_B, tuple(field for field in fields if field != IDS), None)
        if IDS in fields:
            assert self._index is not None, "the store is finished"
            found[IDS] = self._index.ids_at(positions_B)
        return found

    def word_sum_at(self, positions_B: NDArray[np.int64], field: str, *, view: int | None = None) -> int | None:
        """The sum of the 64-bit words of rows that `at_positions` gave, modulo 2⁶⁴, without reading them again.

        As they were when they were verified, so that bytes which change later no longer add up to it.

        Returns:
            None where no sums are kept: of short rows, rows of no whole words, compressed stores and sequences.
        """
        layout = self._manifest.layout
        if layout.kind == "sequences":
            return None
        return self._arrays.word_sum(field, positions_B if view is None else positions_B * layout.views + view)

    def epoch(self, config: EpochConfig, fields: tuple[str, ...]) -> Iterator[EpochRows]:
        """The rows of each step of an epoch. Raises, when it is read, as `fetch` does."""
        view = config.view_of(self._manifest)
        wanted = tuple(dict.fromkeys((*fields, IDS)))
        for step in config.batches(self._manifest, self._digest):
            arrays = self.at_positions(step.positions, wanted, view=view)
            ids: Any = arrays[IDS]
            yield EpochRows(ids=ids, arrays=arrays, repeated=step.repeated, cursor_after=step.cursor_after)

    def _refuse_unknown(self, fields: tuple[str, ...]) -> None:
        for field in fields:
            if field not in self._manifest.arrays:
                kept = ", ".join(self._manifest.arrays)
                raise UnknownFieldError(f"{self._manifest.name!r} keeps no {field!r}; it keeps {kept}", field=field)

    def close(self) -> None:
        """Let go of the mapped files; views that were handed out keep theirs."""
        self._arrays.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self._root,))

    def _refuse_other_ids(self, kept: IdArray, asked: IdArray) -> None:
        if not np.array_equal(kept, asked):
            raise ManifestError(
                f"the id index of {self._manifest.name!r} leads to other samples' rows: run `softlabels repair`"
            )


def checked_views(views: NDArray[np.int64] | None, count: int, manifest: Manifest) -> NDArray[np.int64]:
    """Views that a store of views can be asked for, one a sample.

    Raises:
        RequestError: none named, another number of them than ids, or one that the store does not keep.
    """
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


def _refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise RequestError(message)


def _as_ids(kept: NDArray[Any]) -> IdArray:
    return from_fixed_bytes(kept) if kept.ndim == 2 else kept
