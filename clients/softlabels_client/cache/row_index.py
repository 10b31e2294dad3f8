"""From samples to slots: row keys, and the index on disk, an array over row numbers or a hash table.

The file begins with one word, the number of slots assigned. Slots are assigned in the order in which rows arrive
and are never freed, so readers need no lock.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from softlabels.ids import IdArray, to_fixed_bytes, utf8
from softlabels.manifest import Manifest
from softlabels.splitmix64 import finalise, sequence
from softlabels_client.cache.row_records import WORD, GuardedMap, MappedFile, Words, derive_seed, runs

PROBES = 32
"""Consecutive entries of the hash table in which a key may be."""

_ENTRIES_A_SLOT = 1.5
"""Entries per slot: at a load of two thirds almost no key finds all of its entries occupied; its row is not cached."""


def index_bytes(keys: int, *, dense: bool) -> int:
    """Return the bytes of an index for so many row numbers or hashes."""
    return WORD * (1 + keys) if dense else WORD * (1 + 2 * _table_size(keys))


class SlotIndex(MappedFile):
    """Index from keys to slots; entries are never removed while the table exists.

    For row numbers, word 1 + i of the file is the slot of row i, plus 1: 0 marks a free entry. For hashes, which are
    never 0, it is a table of (key, slot + 1) with linear probing.

    Args:
        path, read_only: as in `MappedFile`.
        keys: most keys.
        dense: whether keys are row numbers below `keys`.
    """

    def __init__(self, path: Path, keys: int, *, dense: bool, read_only: bool) -> None:
        self._dense = dense
        super().__init__(path, index_bytes(keys, dense=dense), read_only=read_only)

    def map_changed(self, new: GuardedMap) -> None:
        """Make the views of the words."""
        self._words: Words = np.frombuffer(new, dtype="<u8")
        entries = self._words[1:]
        self._keys, self._slots = (entries, entries) if self._dense else (entries[::2], entries[1::2])

    @property
    def taken(self) -> int:
        """Number of slots assigned."""
        return int(self._words[0])

    def take(self, taken: int) -> None:
        """Record the number of slots assigned. Raises OSError."""
        self.write(0, np.array([taken], dtype="<u8").view(np.uint8))

    def find(self, keys: Words) -> NDArray[np.int64]:
        """Return the slot of each key, [B]; -1 if it has none."""
        if self._dense:
            # In range: `RowKeys.of` returns no row number beyond the store's.
            return self._slots[keys].astype(np.int64) - 1
        window = self._window(keys)
        found = self._keys[window] == keys[:, None]
        entries = window[np.arange(len(keys)), found.argmax(axis=1)]
        # Readers take no lock: one that sees a key before its slot reads 0, hence -1, and the row is not cached yet.
        return np.where(found.any(axis=1), self._slots[entries].astype(np.int64) - 1, -1)

    def free_entries(self, keys: Words) -> NDArray[np.int64]:
        """Return a free entry for each of these distinct keys, [B]; -1 if there is none."""
        if self._dense:
            return keys.astype(np.int64)
        window = self._window(keys)
        occupants = self._keys[window]
        # The key's own entry counts as free: if a damaged slot in it led nowhere, it is overwritten.
        free = (occupants == 0) | (occupants == keys[:, None])
        entry_B = np.full(len(keys), -1, dtype=np.int64)
        given: set[int] = set()
        for row, allowed in enumerate(free):
            entry_B[row] = next((entry for entry in window[row][allowed].tolist() if entry not in given), -1)
            given.add(int(entry_B[row]))
        return entry_B

    def put(self, entry_B: NDArray[np.int64], keys: Words, slots: NDArray[np.int64]) -> None:
        """Write these keys and slots into entries. Raises OSError."""
        order = np.argsort(entry_B)
        entry_B, values = entry_B[order], (slots[order] + 1).astype("<u8")
        entries = values[:, None] if self._dense else np.stack([keys[order], values], axis=1).astype("<u8")
        for begin, end in runs(entry_B):
            self.write(WORD * (1 + int(entry_B[begin]) * entries.shape[1]), entries[begin:end].view(np.uint8))

    def _window(self, keys: Words) -> NDArray[np.int64]:
        size = len(self._keys)
        begin = (keys % np.uint64(size)).astype(np.int64)
        window: NDArray[np.int64] = (begin[:, None] + np.arange(PROBES)) % size
        return window


def _table_size(keys: int) -> int:
    return max(PROBES, int(keys * _ENTRIES_A_SLOT))


class RowKeys:
    """Keys of rows: a 64-bit lookup key for each (sample, view), and a second one that enters the checksum.

    With consecutive integer ids both are the row's number in the store; otherwise both are hashes, 128 bits together.

    Args:
        manifest: manifest of a store with one row per sample or per view.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._ids, self._layout = manifest.ids, manifest.layout
        # Odd factors: multiplication by them modulo 2⁶⁴ loses no bit.
        width_words = -(-max(manifest.ids.width_bytes, 8) // 8)
        self._factors = [sequence(derive_seed("row keys", which), width_words) | np.uint64(1) for which in ("1", "2")]

    def of(self, ids: IdArray, views: NDArray[np.int64] | None) -> tuple[Words, Words] | None:
        """Return both keys, [B] each; None if a sample cannot be in the store, or views do not fit its layout."""
        if (views is None) != (self._layout.kind == "single") or (ids.dtype.kind == "U") != (self._ids.kind == "str"):
            return None
        if views is not None and (
            views.shape != ids.shape or bool(((views < 0) | (views >= self._layout.views)).any())
        ):
            return None
        if self._ids.dense_start is None:
            return self._hashed(ids, views)
        positions = ids.astype(np.int64, copy=False) - self._ids.dense_start
        if bool(((positions < 0) | (positions >= self._layout.samples)).any()):
            return None
        rows = (positions if views is None else positions * self._layout.views + views).astype(np.uint64)
        return rows, rows

    def _hashed(self, ids: IdArray, views: NDArray[np.int64] | None) -> tuple[Words, Words] | None:
        if ids.dtype.kind == "U":
            width = self._factors[0].size * 8
            if utf8(ids).dtype.itemsize > self._ids.width_bytes:
                return None
            words_BW = to_fixed_bytes(ids, width_bytes=width).view("<u8")
        else:
            words_BW = ids.astype(np.int64, copy=False).view(np.uint64)[:, None]
        first, second = (np.einsum("bw,w->b", finalise(words_BW), factors) for factors in self._factors)
        if views is not None:
            first += sequence(1, self._layout.views)[views]
            second += sequence(2, self._layout.views)[views]
        # 0 marks a free entry of the index, so no key is 0.
        return np.maximum(finalise(first), np.uint64(1)), finalise(second)
