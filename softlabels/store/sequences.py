"""Which rows a sample of many rows has: offsets by position, written before the first shard and verified before use.

A sequence store keeps no id and no fingerprint a row: for a language model's 96 bytes a position they would cost a
quarter of the store. They stand once a sample, in files whose SHA-256 the plan names.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import BadIdsError, ManifestError, RequestError, ShapeMismatchError
from softlabels.ids import IdArray
from softlabels.manifest import Manifest
from softlabels.store.confined import map_confined
from softlabels.store.files import sha256_of
from softlabels.store.index import index_files, npy_bytes
from softlabels.transfer_set import FINGERPRINT_BYTES, FingerprintSum

OFFSETS = "index/offsets.npy"
FINGERPRINTS_FILE = "index/fingerprints.npy"


@dataclass(frozen=True, kw_only=True)
class SampleTable:
    """The samples of a sequence store, known before anything is computed.

    Attributes:
        ids: [samples], unique.
        lengths: [samples] rows each has, at least 0.
        fingerprints: [samples, 16] of their contents.
        dense: ids count up by one, so that no lookup is needed.
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
            raise BadIdsError("a sample cannot have fewer than no rows: its length is negative")

    @property
    def rows(self) -> int:
        """Rows of all samples together."""
        return int(self.lengths.sum())

    def fingerprint(self) -> str:
        """The transfer set's fingerprint."""
        total = FingerprintSum()
        total.add(self.ids, self.fingerprints)
        return total.hexdigest()

    def files(self) -> dict[str, bytes]:
        """The files that hold this table, by path. Raises BadIdsError: an id stands twice."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype("<i8")
        files = {OFFSETS: npy_bytes(offsets), FINGERPRINTS_FILE: npy_bytes(self.fingerprints)}
        return files if self.dense else files | index_files(self.ids)

    def sha256(self) -> dict[str, str]:
        """SHA-256 of the files, by path."""
        return {path: hashlib.sha256(contents).hexdigest() for path, contents in self.files().items()}


class SequenceIndex:
    """Offsets and fingerprints of a sequence store, read from disk and verified whole before their first use."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self._root, self._manifest = root, manifest
        self._loaded: dict[str, NDArray[Any]] = {}

    def rows(
        self, positions_B: NDArray[np.int64], spans_B2: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Row numbers of ranges of samples.

        Args:
            positions_B: the samples' positions.
            spans_B2: [B, 2] first row and the one after the last, within the sample; None for whole samples.
        Returns:
            rows of all ranges joined, and [B + 1] where each range begins among them.
        Raises:
            RequestError: a range that leaves its sample. ManifestError: the offsets are damaged.
        """
        offsets = self._file(OFFSETS, (self._manifest.samples + 1,), "<i8")
        begin, end = offsets[positions_B], offsets[positions_B + 1]
        if spans_B2 is not None:
            outside = (spans_B2[:, 0] < 0) | (spans_B2[:, 1] < spans_B2[:, 0]) | (spans_B2[:, 1] > end - begin)
            if outside.any():
                worst = int(np.flatnonzero(outside)[0])
                raise RequestError(
                    f"range {spans_B2[worst].tolist()} leaves its sample, which has {int((end - begin)[worst])} rows",
                    row=worst,
                )
            begin, end = begin + spans_B2[:, 0], begin + spans_B2[:, 1]
        if len(begin) and (begin.min() < 0 or (end < begin).any() or end.max() > self._manifest.rows):
            raise ManifestError(f"{self._root / OFFSETS} leads outside the store: run `softlabels repair`")
        lengths = end - begin
        joined = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        within = np.arange(joined[-1]) - np.repeat(joined[:-1], lengths)
        return np.repeat(begin, lengths) + within, joined

    def lengths(self, positions_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many rows these samples have, [B]."""
        offsets = self._file(OFFSETS, (self._manifest.samples + 1,), "<i8")
        found: NDArray[np.int64] = offsets[positions_B + 1] - offsets[positions_B]
        return found

    def fingerprints(self, positions_B: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Content fingerprints of these samples, [B, 16]."""
        found: NDArray[np.uint8] = self._file(FINGERPRINTS_FILE, (self._manifest.samples, FINGERPRINT_BYTES), "|u1")[
            positions_B
        ]
        return found

    def _file(self, path: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        # No lock: two threads may verify the same file, to the same end; a lock held during a fork would stay locked.
        loaded = self._loaded.get(path)
        return self._loaded.setdefault(path, self._verified(path, shape, dtype)) if loaded is None else loaded

    def _verified(self, path: str, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        loaded = map_confined(self._root, path)
        if sha256_of(self._root / path) != self._manifest.metadata_sha256.get(path):
            raise ManifestError(f"{self._root / path} is not what was written: a changed offset is a wrong row")
        if loaded.shape != shape or loaded.dtype.str != dtype:
            raise ManifestError(
                f"{self._root / path} is {loaded.dtype}{loaded.shape}, the manifest says {dtype}{shape}"
            )
        return loaded
