"""Sample index: from sample ids to positions in the transfer set, and from positions to the rows of sequences.

Dense ids (start, start + 1, ...) are arithmetic; others are a binary search in sorted ids, memory-mapped. Sequence
stores keep ids and fingerprints once per sample, in files beside the shards: at 96 bytes a position of a language
model, once per row would cost a quarter of the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import BadIdsError, ManifestError, RequestError, ShapeMismatchError, UnknownIdError
from softlabels.ids import IdArray, from_fixed_bytes, id_kind, to_fixed_bytes, utf8
from softlabels.manifest import Manifest
from softlabels.mapping_guard import stable_read
from softlabels.store.safe_open import OpenFolder, StoreRoot
from softlabels.store.store_documents import npy_bytes
from softlabels.store.verified_table import VerifiedTable
from softlabels.transfer_set import FINGERPRINT_BYTES, FingerprintSum

SORTED_IDS = "index/sorted_ids.npy"
POSITIONS = "index/positions.npy"
SEQUENCE_OFFSETS = "index/offsets.npy"
SEQUENCE_FINGERPRINTS = "index/fingerprints.npy"

_MAX_SHOWN_IDS = 5
"""Unknown ids that an error message lists."""


class DenseIdIndex:
    """Index of ids `start`, `start + 1`, ...: the position is a subtraction."""

    def __init__(self, manifest: Manifest) -> None:
        assert manifest.ids.dense_start is not None
        self._start, self._samples, self._name = manifest.ids.dense_start, manifest.samples, manifest.name

    def positions(self, ids: IdArray) -> NDArray[np.int64]:
        """Return the position of each sample in the transfer set, [B]; raise UnknownIdError, BadIdsError."""
        if ids.dtype.kind == "U":  # not always called: every warm batch request passes here
            _check_kind(ids, "int", self._name)
        # The difference may wrap around, but never into the store: |start| ≤ 2^62 and samples ≤ 2^48 (manifest.py).
        positions = ids.astype(np.int64, copy=False) - self._start
        if len(positions) and _largest(positions) >= self._samples:
            outside = (positions < 0) | (positions >= self._samples)
            last = self._start + self._samples - 1
            raise _unknown(ids[outside], self._name, f"its ids run from {self._start} to {last}")
        return positions

    def ids_at(self, positions: NDArray[np.int64]) -> IdArray:
        """Return the ids of the samples at these positions."""
        return positions + self._start


class SortedIdIndex:
    """Index of arbitrary ids: sorted ids and their positions, both memory-mapped.

    Raises:
        ManifestError: its files are missing, damaged or of another store.
    """

    def __init__(self, folder: OpenFolder, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        # Rows that carry their own id show whether the index led to the right ones. Those of sequences carry none, so
        # there the index itself is verified before its first use, at the cost of reading it once.
        first = "ids" not in manifest.arrays

        def table(path: str, dtype: str) -> VerifiedTable:
            sha256, shape = manifest.metadata_sha256.get(path), (manifest.samples,)
            return VerifiedTable(folder, path, shape, dtype, sha256=sha256, verify_first=first)

        self._sorted = table(SORTED_IDS, "|S" if manifest.ids.kind == "str" else "<i8")
        self._positions = table(POSITIONS, "<i8")
        self._slots: NDArray[np.int64] | None = None

    def positions(self, ids: IdArray) -> NDArray[np.int64]:
        """Return the position of each sample in the transfer set, [B]; raise UnknownIdError, BadIdsError."""
        _check_kind(ids, self._manifest.ids.kind, self._manifest.name)
        wanted: NDArray[Any] = ids if id_kind(ids) == "int" else utf8(ids)

        def look_up() -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
            # The slot of an id beyond the last is one past the end; the entry before differs from it.
            slot = np.minimum(np.searchsorted(self._sorted.array(), wanted), self._manifest.samples - 1)
            return self._sorted.take_once(slot) == wanted, self._positions.take_once(slot)

        found, positions = stable_read(look_up)
        if not found.all():
            # A flipped bit in the index hides samples, so the index is verified before an id is called unknown.
            self._verify()
            raise _unknown(ids[~found], self._manifest.name, f"it holds {self._manifest.samples} samples")
        if len(positions) and _largest(positions) >= self._manifest.samples:
            raise ManifestError(f"{self._folder / POSITIONS} points outside the store: run `softlabels repair`")
        return positions

    def ids_at(self, positions: NDArray[np.int64]) -> IdArray:
        """Return the ids of the samples at these positions; the first call takes 8 bytes of memory per sample."""
        if self._slots is None:
            self._verify()
            self._slots = stable_read(lambda: np.argsort(self._positions.array(), kind="stable"))
        found = self._sorted.take(self._slots[positions])
        return np.char.decode(found, "utf-8") if found.dtype.kind == "S" else found

    def is_strictly_ascending(self) -> bool:
        """Return whether every id is larger than the one before, so that none is repeated."""
        step, last = 1 << 20, self._manifest.samples
        # `+ 1`: neighbouring pieces share an id, so that the pair across their border is compared too.
        pieces = (np.arange(start, min(start + step + 1, last)) for start in range(0, last - 1, step))
        return all(bool((ids[1:] > ids[:-1]).all()) for ids in map(self._sorted.take, pieces))

    def _verify(self) -> None:
        self._sorted.verify()
        self._positions.verify()


def make_index(root: StoreRoot, manifest: Manifest) -> DenseIdIndex | SortedIdIndex:
    """Return the index for the ids of a store."""
    if manifest.ids.dense_start is not None:
        return DenseIdIndex(manifest)
    folder = root if isinstance(root, OpenFolder) else OpenFolder(root)
    return SortedIdIndex(folder, manifest)


def index_files(ids: IdArray) -> dict[str, bytes]:
    """Return the files of a sorted index, by path.

    Args:
        ids: [samples], in the order of the store; held in memory whole, 8 bytes a sample (strings: their width).
    Raises:
        BadIdsError: an id is repeated.
    """
    keys: NDArray[Any] = ids if id_kind(ids) == "int" else utf8(ids)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    repeated = ordered[1:] == ordered[:-1]
    if repeated.any():
        example = ids[order[1:][repeated][0]].item()
        raise BadIdsError(f"{int(repeated.sum())} sample ids are repeated in the transfer set, for example {example!r}")
    return {SORTED_IDS: npy_bytes(ordered), POSITIONS: npy_bytes(order.astype("<i8"))}


def ids_of_rows(stored: NDArray[Any]) -> IdArray:
    """Return sample ids from rows of a store's array `ids`, where string ids are zero-padded UTF-8."""
    return from_fixed_bytes(stored) if stored.ndim == 2 else stored


def rows_as_stored(manifest: Manifest, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return arrays that a reader returned as shards hold them: string ids as zero-padded UTF-8."""
    if "ids" not in arrays or manifest.ids.kind != "str":
        return dict(arrays)
    return {**arrays, "ids": to_fixed_bytes(arrays["ids"], width_bytes=manifest.ids.width_bytes)}


@dataclass(frozen=True, kw_only=True)
class SampleTable:
    """The samples of a sequence store, known before anything is computed.

    Attributes:
        ids: [samples], unique.
        lengths: [samples] number of rows of each, at least 0.
        fingerprints: [samples, 16] fingerprints of their contents.
        dense: whether ids count up by one, so that they need no index.
    """

    ids: IdArray
    lengths: NDArray[np.int64]
    fingerprints: NDArray[np.uint8]
    dense: bool

    def __post_init__(self) -> None:
        count = len(self.ids)
        if self.lengths.shape != (count,) or self.fingerprints.shape != (count, FINGERPRINT_BYTES):
            raise ShapeMismatchError(
                f"{count} ids, lengths {self.lengths.shape} and fingerprints {self.fingerprints.shape} do not describe "
                "the same samples"
            )
        if count and int(self.lengths.min()) < 0:
            raise BadIdsError("the length of a sample is negative: it needs at least 0 rows")

    @property
    def rows(self) -> int:
        """Rows of all samples together."""
        return int(self.lengths.sum())

    def fingerprint(self) -> str:
        """Return the transfer set's fingerprint."""
        total = FingerprintSum()
        total.add(self.ids, self.fingerprints)
        return total.hexdigest()

    def files(self) -> dict[str, bytes]:
        """Return the files that hold this table, by path; raise BadIdsError if an id is repeated."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype("<i8")
        files = {SEQUENCE_OFFSETS: npy_bytes(offsets), SEQUENCE_FINGERPRINTS: npy_bytes(self.fingerprints)}
        return files if self.dense else files | index_files(self.ids)


class SequenceIndex:
    """Row offsets and fingerprints of a sequence store, by sample position; each file is verified before first use."""

    def __init__(self, folder: OpenFolder, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._tables: dict[str, VerifiedTable] = {}

    def rows(
        self, positions_B: NDArray[np.int64], spans_B2: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the row numbers of ranges of samples.

        Args:
            positions_B: positions of the samples.
            spans_B2: [B, 2] first row and the one after the last, within the sample; None for whole samples.
        Returns:
            Row numbers of all ranges joined, and [B + 1] offsets of the ranges among them.
        Raises:
            RequestError: a range outside its sample. ManifestError: the offsets are damaged.
        """
        begin, end = self._bounds(positions_B)
        if spans_B2 is not None:
            outside = (spans_B2[:, 0] < 0) | (spans_B2[:, 1] < spans_B2[:, 0]) | (spans_B2[:, 1] > end - begin)
            if outside.any():
                worst = int(outside.argmax())
                rows = int((end - begin)[worst])
                raise RequestError(
                    f"range {spans_B2[worst].tolist()} is outside its sample, which has {rows} rows", row=worst
                )
            begin, end = begin + spans_B2[:, 0], begin + spans_B2[:, 1]
        if len(begin) and (begin.min() < 0 or (end < begin).any() or end.max() > self._manifest.rows):
            raise ManifestError(f"{self._folder / SEQUENCE_OFFSETS} points outside the store: run `softlabels repair`")
        lengths = end - begin
        joined = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        within = np.arange(joined[-1]) - np.repeat(joined[:-1], lengths)
        return np.repeat(begin, lengths) + within, joined

    def lengths(self, positions_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many rows these samples have, [B]."""
        offsets = self._offsets()
        # Without a look at each page: the numbers of a whole epoch are added up, and lead to no row.
        return stable_read(lambda: offsets.array()[positions_B + 1] - offsets.array()[positions_B])

    def _bounds(self, positions_B: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the first row of each sample and the one after its last, [B] each."""
        return self._offsets().take(positions_B), self._offsets().take(positions_B + 1)

    def _offsets(self) -> VerifiedTable:
        return self._table(SEQUENCE_OFFSETS, (self._manifest.samples + 1,), "<i8")

    def fingerprints(self, positions_B: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the content fingerprints of these samples, [B, 16]."""
        return self._table(SEQUENCE_FINGERPRINTS, (self._manifest.samples, FINGERPRINT_BYTES), "|u1").take(positions_B)

    def _table(self, path: str, shape: tuple[int, ...], dtype: str) -> VerifiedTable:
        if (known := self._tables.get(path)) is not None:
            return known
        sha256 = self._manifest.metadata_sha256.get(path)
        made = VerifiedTable(self._folder, path, shape, dtype, sha256=sha256)
        # No lock: two threads may both make it; a lock held during a fork would stay locked in the child.
        return self._tables.setdefault(path, made)


def _largest(positions: NDArray[np.int64]) -> int:
    # As unsigned, a negative position is the largest of all: one pass finds what is outside on either side.
    return int(positions.view(np.uint64).max())


def _check_kind(ids: IdArray, kind: str, name: str) -> None:
    if id_kind(ids) != kind:
        words = {"int": "integers", "str": "strings"}
        raise BadIdsError(f"sample ids of {name!r} are {words[kind]}, not {words[id_kind(ids)]}")


def _unknown(missing: NDArray[Any], name: str, hint: str) -> UnknownIdError:
    shown = missing[:_MAX_SHOWN_IDS].tolist()
    more = f" and {len(missing) - _MAX_SHOWN_IDS} more" if len(missing) > _MAX_SHOWN_IDS else ""
    return UnknownIdError(
        f"{name!r} holds no sample {', '.join(map(repr, shown))}{more}; {hint}", ids=shown, missing=len(missing)
    )
