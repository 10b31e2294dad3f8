"""Which row a sample id has: arithmetic where ids are dense, else a binary search in sorted ids mapped from disk."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import BadIdsError, ManifestError, UnknownIdError
from softlabels.ids import IdArray, id_kind, utf8
from softlabels.manifest import Manifest
from softlabels.store.confined import map_confined
from softlabels.store.files import sha256_of, write_atomically

SORTED_IDS = "index/sorted_ids.npy"
POSITIONS = "index/positions.npy"

_SHOWN = 5
"""How many unknown ids a message spells out."""


class DenseIndex:
    """Ids `start`, `start + 1`, …: the position is a subtraction."""

    def __init__(self, manifest: Manifest) -> None:
        assert manifest.ids.dense_start is not None
        self._start, self._samples, self._name = manifest.ids.dense_start, manifest.samples, manifest.name

    def positions(self, ids: IdArray) -> NDArray[np.int64]:
        """Position of each sample in the transfer set. Raises UnknownIdError, BadIdsError."""
        _refuse_other_kind(ids, "int", self._name)
        positions = ids.astype(np.int64, copy=False) - self._start
        if len(positions) and _largest(positions) >= self._samples:
            outside = (positions < 0) | (positions >= self._samples)
            last = self._start + self._samples - 1
            raise _unknown(ids[outside], self._name, f"its ids run from {self._start} to {last}")
        return positions

    def ids_at(self, positions: NDArray[np.int64]) -> IdArray:
        """The ids of the samples at these positions."""
        return positions + self._start


class SortedIndex:
    """Ids in sorted order beside their positions, both mapped from disk."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self._root, self._manifest = root, manifest
        self._sorted = map_confined(root, SORTED_IDS)
        self._positions = map_confined(root, POSITIONS)
        if self._sorted.shape != (manifest.samples,) or self._positions.shape != (manifest.samples,):
            raise ManifestError(
                f"the id index of {root} does not have {manifest.samples} entries: run `softlabels repair`"
            )
        as_ids = self._sorted.dtype.kind == "S" if manifest.ids.kind == "str" else self._sorted.dtype.str == "<i8"
        if not as_ids or self._positions.dtype.str != "<i8":
            raise ManifestError(f"the id index of {root} does not hold ids and positions: run `softlabels repair`")
        # Rows that carry their own id show whether the index led to the right ones. Those of sequences carry none, so
        # that there the index itself is verified before its first use, at the cost of reading it once.
        self._trusted = "ids" in manifest.arrays
        self._slots: NDArray[np.int64] | None = None

    def positions(self, ids: IdArray) -> NDArray[np.int64]:
        """Position of each sample in the transfer set. Raises UnknownIdError, BadIdsError."""
        _refuse_other_kind(ids, self._manifest.ids.kind, self._manifest.name)
        if not self._trusted:
            self._refuse_damage()
            self._trusted = True
        wanted: NDArray[Any] = ids if id_kind(ids) == "int" else utf8(ids)
        slot = np.searchsorted(self._sorted, wanted)
        found = self._sorted[np.minimum(slot, len(self._sorted) - 1)] == wanted
        if not found.all():
            self._refuse_damage()
            raise _unknown(ids[~found], self._manifest.name, f"it holds {self._manifest.samples} samples")
        positions = self._positions[slot].astype(np.int64, copy=False)
        if len(positions) and _largest(positions) >= self._manifest.samples:
            raise ManifestError(f"{self._root / POSITIONS} leads outside the store: run `softlabels repair`")
        return positions

    def ids_at(self, positions: NDArray[np.int64]) -> IdArray:
        """The ids of the samples at these positions; the first call takes 8 bytes of memory a sample."""
        if self._slots is None:
            self._slots = np.argsort(self._positions, kind="stable")
        found = self._sorted[self._slots[positions]]
        return np.char.decode(found, "utf-8") if found.dtype.kind == "S" else found

    def ascends(self) -> bool:
        """Whether every id is larger than the one before: then none stands twice."""
        step = 1 << 20
        starts = range(0, len(self._sorted) - 1, step)
        return all(bool((s[1:] > s[:-1]).all()) for s in (self._sorted[start : start + step + 1] for start in starts))

    def _refuse_damage(self) -> None:
        # Also before an id is called unknown: a flipped bit in the index hides samples.
        for path in (SORTED_IDS, POSITIONS):
            if sha256_of(self._root / path) != self._manifest.metadata_sha256.get(path):
                raise ManifestError(f"{self._root / path} is damaged: run `softlabels repair`")


def make_index(root: Path, manifest: Manifest) -> DenseIndex | SortedIndex:
    """The index of a store, whichever kind its ids call for."""
    return DenseIndex(manifest) if manifest.ids.dense_start is not None else SortedIndex(root, manifest)


def write_index(root: Path, ids: IdArray) -> dict[str, str]:
    """Write the index of these ids; returns SHA-256 of its files by path. Raises BadIdsError: an id stands twice."""
    return {path: write_atomically(root / path, [contents])[1] for path, contents in index_files(ids).items()}


def index_files(ids: IdArray) -> dict[str, bytes]:
    """The sorted ids of a store and their positions, as files by path.

    Args:
        ids: [samples], in the order of the store; held in memory whole, 8 bytes a sample (strings: their width).
    Raises:
        BadIdsError: an id stands twice.
    """
    keys: NDArray[Any] = ids if id_kind(ids) == "int" else utf8(ids)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    twice = ordered[1:] == ordered[:-1]
    if twice.any():
        example = ids[order[1:][twice][0]]
        raise BadIdsError(f"{int(twice.sum())} sample ids stand twice in the transfer set, {example!r} among them")
    return {SORTED_IDS: npy_bytes(ordered), POSITIONS: npy_bytes(order.astype("<i8"))}


def npy_bytes(array: NDArray[Any]) -> bytes:
    """An array as a `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _largest(positions: NDArray[np.int64]) -> int:
    # As unsigned, a negative position is the largest of all: one pass finds what lies outside on either side.
    return int(positions.view(np.uint64).max())


def _refuse_other_kind(ids: IdArray, kind: str, name: str) -> None:
    if id_kind(ids) != kind:
        words = {"int": "integers", "str": "strings"}
        raise BadIdsError(f"sample ids of {name!r} are {words[kind]}, not {words[id_kind(ids)]}")


def _unknown(missing: NDArray[Any], name: str, hint: str) -> UnknownIdError:
    shown = missing[:_SHOWN].tolist()
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    return UnknownIdError(
        f"{name!r} holds no sample {', '.join(map(repr, shown))}{more}; {hint}", ids=shown, missing=len(missing)
    )
