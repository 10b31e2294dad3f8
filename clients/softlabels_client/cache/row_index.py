"""In which slot does a key's row lie? Two indices on disk: an array over row numbers, and a hash table over hashes.

Both begin with one word, how many slots are taken: slots are given out in the order in which rows come, and what was
given out is never taken back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from softlabels_client.cache.checks import Words
from softlabels_client.cache.row_records import WORD, MappedFile, runs

PROBES = 32
"""Entries of the hash table in which a key may lie: at the load below, next to none finds all of them taken."""

_ENTRIES_A_SLOT = 1.5


class SlotIndex(Protocol):
    """Keys to slots; what is put under one name stays until the whole cache of the store goes."""

    @property
    def file(self) -> MappedFile:
        """Where it is kept."""
        ...

    def find(self, keys: Words) -> NDArray[np.int64]:
        """The slot of each key, [B]; -1 where it has none."""
        ...

    def places(self, keys: Words) -> NDArray[np.int64]:
        """Where each of these different keys' entries may be put, [B]; -1 where there is no room for it."""
        ...

    def put(self, places: NDArray[np.int64], keys: Words, slots: NDArray[np.int64]) -> None:
        """Write the entries of keys into places. Raises OSError."""
        ...


def index_bytes(keys: int, *, dense: bool) -> int:
    """Bytes of the index over so many row numbers, or for so many hashes."""
    return WORD * (1 + keys) if dense else WORD * (1 + 2 * _table_size(keys))


def taken_slots(index: SlotIndex) -> int:
    """How many slots are given out."""
    return int(np.frombuffer(index.file.map, dtype="<u8", count=1)[0])


def read_taken(path: Path) -> int:
    """The same of an index that is not open; 0 where there is none."""
    try:
        with path.open("rb") as file:
            return int.from_bytes(file.read(WORD), "little")
    except FileNotFoundError:
        return 0


def take_slots(index: SlotIndex, taken: int) -> None:
    """Write down that so many slots are given out. Raises OSError."""
    index.file.write(0, np.array([taken], dtype="<u8").view(np.uint8))


class RowNumberIndex:
    """For keys that are row numbers: the slot of row i, plus 1, at word 1 + i.

    Args:
        path: of the file.
        keys: rows of the store.
        read_only: never written to.
    Raises:
        OSError: as `MappedFile`.
    """

    def __init__(self, path: Path, keys: int, *, read_only: bool) -> None:
        self.file = MappedFile(path, index_bytes(keys, dense=True), read_only=read_only)
        self._entries: Words = np.frombuffer(self.file.map, dtype="<u8", offset=WORD)

    def find(self, keys: Words) -> NDArray[np.int64]:
        """The slot of each key, [B]; -1 where it has none."""
        return self._entries[keys].astype(np.int64) - 1

    def places(self, keys: Words) -> NDArray[np.int64]:
        """Every row number has its place."""
        return keys.astype(np.int64)

    def put(self, places: NDArray[np.int64], keys: Words, slots: NDArray[np.int64]) -> None:
        """Write the entries of keys into places. Raises OSError."""
        order = np.argsort(places)
        places, entries = places[order], (slots[order] + 1).astype("<u8")
        for begin, end in runs(places):
            self.file.write(WORD * (1 + int(places[begin])), entries[begin:end].view(np.uint8))


class HashIndex:
    """For keys that are hashes, none of them 0: a table of (key, slot plus 1), probed from the key's own place on.

    Args:
        path: of the file.
        keys: that may come.
        read_only: never written to.
    Raises:
        OSError: as `MappedFile`.
    """

    def __init__(self, path: Path, keys: int, *, read_only: bool) -> None:
        self.file = MappedFile(path, index_bytes(keys, dense=False), read_only=read_only)
        self._size = _table_size(keys)
        table = np.frombuffer(self.file.map, dtype="<u8", offset=WORD).reshape(self._size, 2)
        self._keys, self._slots = table[:, 0], table[:, 1]

    def find(self, keys: Words) -> NDArray[np.int64]:
        """The slot of each key, [B]; -1 where it has none."""
        window = self._window(keys)
        found = self._keys[window] == keys[:, None]
        entries = window[np.arange(len(keys)), found.argmax(axis=1)]
        return np.where(found.any(axis=1), self._slots[entries].astype(np.int64) - 1, -1)

    def places(self, keys: Words) -> NDArray[np.int64]:
        """Where each of these different keys' entries may be put, [B]; -1 where there is no room for it."""
        window = self._window(keys)
        kept = self._keys[window]
        free = (kept == 0) | (kept == keys[:, None])
        places = np.full(len(keys), -1, dtype=np.int64)
        given: set[int] = set()
        for row, allowed in enumerate(free):
            for place in window[row][allowed].tolist():
                if place not in given:
                    given.add(place)
                    places[row] = place
                    break
        return places

    def put(self, places: NDArray[np.int64], keys: Words, slots: NDArray[np.int64]) -> None:
        """Write the entries of keys into places. Raises OSError."""
        entries = np.stack([keys, (slots + 1).astype(np.uint64)], axis=1).astype("<u8")
        for place, entry in zip(places.tolist(), entries, strict=True):
            self.file.write(WORD * (1 + 2 * place), entry.view(np.uint8))

    def _window(self, keys: Words) -> NDArray[np.int64]:
        begin = (keys % np.uint64(self._size)).astype(np.int64)
        window: NDArray[np.int64] = (begin[:, None] + np.arange(PROBES)) % self._size
        return window


def _table_size(keys: int) -> int:
    return max(PROBES, int(keys * _ENTRIES_A_SLOT))
