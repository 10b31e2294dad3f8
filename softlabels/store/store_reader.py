"""Store reader: rows of a store on disk by sample id, from committed shards, each chunk verified when first read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from softlabels.encodings import Encoding
from softlabels.errors import (
    ManifestError,
    RequestError,
    RowsNotCommittedError,
    StoreChangedError,
    UnknownFieldError,
)
from softlabels.ids import IdArray
from softlabels.manifest import FINGERPRINTS, IDS, ROW_OFFSETS, Manifest, store_digest
from softlabels.mapping_guard import file_watch
from softlabels.order import EpochConfig
from softlabels.store.array_reader import ArrayReader
from softlabels.store.sample_index import SequenceIndex, ids_of_rows, make_index
from softlabels.store.snapshot import Snapshot, of_one_version
from softlabels.store.store_documents import load_encoding
from softlabels.targets import EpochRows

Verify: TypeAlias = Literal["first-read", "every-read"]
"""How often rows are compared with what was written, see `LocalRows`."""


class SelectedRows(NamedTuple):
    """Numbers of the R rows of B samples, positions [B], `row_offsets` [B + 1] of sequences, ids the rows must have."""

    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    row_offsets: NDArray[np.int64] | None = None
    ids: IdArray | None = None


class LocalRows:
    """The rows of a store in a folder. Opening takes constant time and memory, whatever the number of rows.

    All rows are of the version that was opened, also if the folder is renamed, or another store takes its place: what
    can no longer be read of this version is an error. Safe under threads and after fork; unpickling opens it again.

    Args:
        root: the store's folder.
        manifest: the store's manifest or plan; read from the folder when left out.
        verify: "first-read" verifies each chunk when one of its rows is first read, and again after its file was
            written to, as far as the operating system reports it. "every-read" also compares each row that is returned
            with the checksum that was kept when it was written, and so notices what a disk or a network file system
            changes in silence.
        digest: digest that the store must have; None for any.
    Attributes:
        digest: digest of this version of the store; of an unfinished one, of its plan, since committed rows never
            change.
    Raises:
        UnknownStoreError: there is no store. ManifestError, FormatVersionError: its manifest is invalid or too new.
        StoreChangedError: it has another digest.
    """

    def __init__(
        self,
        root: Path,
        *,
        manifest: Manifest | None = None,
        verify: Verify = "first-read",
        digest: str | None = None,
    ) -> None:
        if verify not in get_args(Verify):
            raise RequestError(f"verify must be one of {', '.join(get_args(Verify))}, not {verify!r}")
        self._snapshot = Snapshot(root, manifest)
        self.manifest, self._verify = self._snapshot.manifest, verify
        self.digest = store_digest(self.manifest)
        if digest not in (None, self.digest):
            raise StoreChangedError(
                f"the store at {root} has digest {self.digest[:12]}, not {str(digest)[:12]} as before: it was replaced "
                "meanwhile; open it again"
            )
        folder = self._snapshot.folder
        self._open_index = partial(make_index, folder, self.manifest)
        self._index = self._open_index() if self.manifest.finished else None
        self._sequences = SequenceIndex(folder, self.manifest)
        self._arrays = ArrayReader(self._snapshot)

    @cached_property
    @of_one_version
    def encoding(self) -> Encoding:
        """The encoding of the rows, with its learnt arrays."""
        return load_encoding(self._snapshot.folder, self.manifest)

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
        return self.read(self.select(ids, views=views, spans=spans), fields)

    def every_read(self) -> LocalRows:
        """Return a reader of the same open files that compares each row it returns with what was written."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, _verify="every-read")
        return other

    @of_one_version
    def select(
        self, ids: IdArray, *, views: NDArray[np.int64] | None = None, spans: NDArray[np.int64] | None = None
    ) -> SelectedRows:
        """Return the rows of these ids, whose arrays `read` returns and whose sums `row_sums`. Raises as `fetch`."""
        positions = self.positions_of(ids)
        layout = self.manifest.layout
        if layout.kind == "sequences":
            _check(views is None, f"{self.manifest.name!r} keeps sequences, not views: ask for spans")
            rows, row_offsets = self._sequences.rows(positions, spans)
            return SelectedRows(rows=rows, positions=positions, row_offsets=row_offsets)
        _check(spans is None, f"{self.manifest.name!r} keeps no sequences: it has no spans to ask for")
        rows = positions
        if layout.kind == "views":
            rows = positions * layout.views + _checked_views(views, len(ids), self.manifest)
        else:
            _check(views is None, f"{self.manifest.name!r} keeps one row a sample: it has no views to ask for")
        return SelectedRows(rows=rows, positions=positions, ids=ids)

    @of_one_version
    def select_at(self, positions_B: NDArray[np.int64], *, view: int | None = None) -> SelectedRows:
        """Return the rows of the samples at these positions of a finished store, all of one view."""
        layout = self.manifest.layout
        if layout.kind == "sequences":
            rows, row_offsets = self._sequences.rows(positions_B, None)
            return SelectedRows(rows=rows, positions=positions_B, row_offsets=row_offsets)
        rows = positions_B if view is None else positions_B * layout.views + view
        return SelectedRows(rows=rows, positions=positions_B)

    @of_one_version
    def read(self, selected: SelectedRows, fields: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        """Return these rows, with the arrays of `fetch`; raise as it does."""
        if selected.row_offsets is None:
            return self.fetch_rows(selected.rows, fields, ids=selected.ids)
        # Ids and fingerprints of sequences are kept beside their rows.
        found = self.fetch_rows(selected.rows, tuple(field for field in fields if field not in (IDS, FINGERPRINTS)))
        if FINGERPRINTS in fields:
            found[FINGERPRINTS] = self._sequences.fingerprints(selected.positions)
        if IDS in fields:
            assert self._index is not None, "made when positions were looked up"
            found[IDS] = self._index.ids_at(selected.positions)
        found[ROW_OFFSETS] = selected.row_offsets
        return found

    def row_counts(self, ids: IdArray) -> NDArray[np.int64]:
        """Return how many rows each of these samples has, [B], without reading them."""
        return self.row_counts_at(self.positions_of(ids))

    @of_one_version
    def row_counts_at(self, positions_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many rows each of the samples at these positions has, [B]."""
        if self.manifest.layout.kind != "sequences":
            return np.full(len(positions_B), self.manifest.layout.views, dtype=np.int64)
        return self._sequences.lengths(positions_B)

    @of_one_version
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
            self._index = self._open_index()
        return self._index.positions(ids)

    @of_one_version
    def fetch_rows(
        self,
        rows_B: NDArray[np.int64],
        fields: tuple[str, ...],
        *,
        ids: IdArray | None = None,
        verify: bool = False,
    ) -> dict[str, NDArray[Any]]:
        """Return rows by number; raise as `fetch` does, and ManifestError unless they have these ids, [B].

        Args:
            verify: compare them with what was written, whatever `LocalRows` was opened with.
        """
        for field in fields:
            if field not in self.manifest.arrays:
                kept = ", ".join(self.manifest.arrays)
                raise UnknownFieldError(f"{self.manifest.name!r} keeps no {field!r}; it keeps {kept}", field=field)
        wanted = ids if self.manifest.ids.dense_start is None else None
        found = self._arrays.gather(fields if wanted is None else {*fields, IDS}, rows_B)
        if verify or self._verify == "every-read" or not file_watch.is_complete:
            self._arrays.verify_rows(rows_B, found)
        # The index is not verified on opening; a flipped bit in it could lead to other rows, which carry their ids.
        if wanted is not None and not np.array_equal(ids_of_rows(found[IDS]), wanted):
            raise ManifestError(
                f"the id index of {self.manifest.name!r} points to rows of other samples: run `softlabels repair`"
            )
        return {field: ids_of_rows(found[field]) if field == IDS else found[field] for field in fields}

    @of_one_version
    def row_sums(self, rows_B: NDArray[np.int64]) -> NDArray[np.uint32] | None:
        """Return the CRC-32C of each array of these rows, [B, `Manifest.row_sum_names`], as they were written.

        Bytes that were read, and have another sum, changed since. None in stores of format version 1.
        """
        return self._arrays.row_sums(rows_B)

    def at_positions(
        self, positions_B: NDArray[np.int64], fields: tuple[str, ...], *, view: int | None = None
    ) -> dict[str, NDArray[Any]]:
        """Return rows of the samples at these positions of a finished store, all of one view, as `fetch` does."""
        return self.read(self.select_at(positions_B, view=view), fields)

    def epoch(self, config: EpochConfig, fields: tuple[str, ...]) -> Iterator[EpochRows]:
        """Yield the rows of each step of an epoch; raises as `fetch` does."""
        view = config.view_of(self.manifest)
        wanted = tuple(dict.fromkeys((*fields, IDS)))
        for step in config.batches(self.manifest, self.digest):
            arrays = self.at_positions(step.positions, wanted, view=view)
            ids: Any = arrays[IDS]
            yield EpochRows(ids=ids, arrays=arrays, repeated=step.repeated, cursor_after=step.cursor_after)

    def refuse(self, shards: Mapping[int | None, str]) -> None:
        """Raise ChecksumError with these messages wherever rows of these shards are read; None stands for every shard.

        For shards that another check found damaged; replaces what was refused before.
        """
        self._arrays.refused = dict(shards)

    def close(self) -> None:
        """Release the mapped files."""
        self._arrays.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (self._snapshot.folder.path, self._verify, self.digest))


def _reopen(root: Path, verify: Verify, digest: str) -> LocalRows:
    return LocalRows(root, verify=verify, digest=digest)


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
