"""Table of cached rows of one store version: found by key, verified at every read.

    index     key → slot          `softlabels_client.cache.row_index`
    rows      slot → record       `softlabels_client.cache.row_records`
    ids       position → id       unless ids are consecutive integers; epochs then need no server to name their samples

A row is written into a slot that no other row has, and only then into the index; a process killed in between leaves a
slot unused. One process at a time writes, by a file lock that ends with its owner; readers need no lock.
"""

from __future__ import annotations

import fcntl
import os
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.ids import IdArray, from_fixed_bytes, id_kind, to_fixed_bytes
from softlabels.manifest import IDS, ArraySpec, Manifest
from softlabels_client.cache.row_index import RowKeys, SlotIndex, index_bytes
from softlabels_client.cache.row_records import MappedFile, RecordFile, Words, record_type

ROWS_FILE, INDEX_FILE, IDS_FILE, WRITING_FILE, IN_USE_FILE = "rows", "index", "ids", "writing", "in-use"


class FileLock:
    """An `flock` of a kind that is held until released, or until no reference to it exists, here or in a fork."""

    _fd = -1  # for `__del__`, which also runs where `os.open` raises

    def __init__(self, path: Path, kind: int, *, create: bool = False) -> None:
        # Opened anew for each lock: it belongs to the open file description, which threads and forks share.
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT if create else os.O_RDONLY, 0o600)
        fcntl.flock(self._fd, kind)

    def release(self) -> None:
        """Release for all: closing alone would leave it to a child that another thread forked meanwhile."""
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        self.release()

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


@dataclass(frozen=True)
class TableShape:
    """The files of a store's table with so many slots."""

    manifest: Manifest
    slots: int

    @property
    def fields(self) -> dict[str, ArraySpec]:
        """Fields of a record."""
        return {name: spec for name, spec in self.manifest.arrays.items() if name != IDS}

    @property
    def dense(self) -> bool:
        """Whether keys are row numbers."""
        return self.manifest.ids.dense_start is not None

    @property
    def keys(self) -> int:
        """Keys that the index has room for."""
        return self.manifest.rows if self.dense else self.slots

    @property
    def id_fields(self) -> dict[str, ArraySpec]:
        """Fields of the record of a position's id; none if ids are consecutive integers."""
        ids = self.manifest.ids
        text = ArraySpec(dtype="|u1", row_shape=(ids.width_bytes,))
        return {} if self.dense else {IDS: text if ids.kind == "str" else ArraySpec(dtype="<i8", row_shape=())}

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file when full; records are added as rows arrive."""
        records = self.slots * record_type(self.fields).itemsize
        sizes = {INDEX_FILE: index_bytes(self.keys, dense=self.dense), ROWS_FILE: records}
        if self.id_fields:
            sizes[IDS_FILE] = self.manifest.samples * record_type(self.id_fields).itemsize
        return sizes

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(self.sizes.values())


def shape_within(manifest: Manifest, most_bytes: int) -> TableShape | None:
    """Return the largest table within `most_bytes`; None if less than one row in a hundred would fit."""
    # Searched for: the bytes of a slot besides its record depend on the index.
    numbers = range(1, manifest.rows + 1)
    fits = bisect_right(numbers, most_bytes, key=lambda slots: TableShape(manifest, slots).size_bytes)
    return TableShape(manifest, fits) if fits and fits * 100 >= manifest.rows else None


class RowTable:
    """Cached rows of one store version; safe in threads, between processes and after fork.

    Raises:
        OSError: a file of the folder is missing or has a different size.
    """

    def __init__(self, folder: Path, shape: TableShape, *, digest: str, read_only: bool) -> None:
        self.shape, self.fields = shape, shape.fields
        self._folder, self._ids, self._read_only = folder, shape.manifest.ids, read_only
        self.keys = RowKeys(shape.manifest)
        self._in_use = FileLock(folder / IN_USE_FILE, fcntl.LOCK_SH)  # held until the table is closed: never removed
        self._index = SlotIndex(folder / INDEX_FILE, shape.keys, dense=shape.dense, read_only=read_only)
        self._rows = RecordFile(
            folder / ROWS_FILE, self.fields, shape.slots, digest=digest, read_only=read_only, grows=True
        )
        self._files: list[MappedFile] = [self._index, self._rows]
        self._id_file: RecordFile | None = None
        if id_fields := shape.id_fields:
            samples = shape.manifest.samples
            self._id_file = RecordFile(folder / IDS_FILE, id_fields, samples, digest=digest, read_only=read_only)
            self._files.append(self._id_file)

    def read(
        self, keys: Words, checks: Words, names: tuple[str, ...]
    ) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_], int]:
        """Return rows by key.

        Args:
            keys, checks: [B], as `keys.of` returns them.
            names: fields to return.
        Returns:
            One array per field, [B, ...], with arbitrary content for rows not cached; which rows are cached, [B]; and
            how many were damaged, which count as not cached.
        Raises:
            OSError: a file was cut.
        """
        self._check_sizes()
        slots = self._index.find(keys)
        # The index has no checksum: a damaged one may return any number, which must not be used as a slot.
        cached = (slots >= 0) & (slots < len(self._rows))
        if not cached.any():  # in a first epoch, nothing is read in vain
            specs = {name: self.fields[name] for name in names}
            return {n: np.zeros((len(keys), *s.row_shape), s.dtype) for n, s in specs.items()}, cached, 0
        # Slot 0 stands in for rows that are not cached: what it holds is masked out below.
        arrays, valid, damaged = self._rows.read(np.where(cached, slots, 0), names, keys, checks)
        return arrays, valid & cached, int((damaged & cached).sum())

    def store(self, keys: Words, checks: Words, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Store rows, given as `read` returns them; raises OSError: the disk is full or failing.

        Missing or damaged fields of cached rows are written, rows without a free slot are dropped.
        """
        if self._read_only or not len(keys) or not arrays:
            return
        # A new key that occurs twice would get two slots.
        _, distinct = np.unique(keys, return_index=True)
        if len(distinct) < len(keys):
            keys, checks = keys[distinct], checks[distinct]
            arrays = {name: array[distinct] for name, array in arrays.items()}
        if self.taken_slots == self.shape.slots and not (self._index.find(keys) >= 0).any():
            return  # full, and nothing to repair: neither pack nor lock
        # Checksums are computed before the lock is taken, since other processes wait for it.
        block = self._rows.pack(keys, checks, arrays)
        with FileLock(self._folder / WRITING_FILE, fcntl.LOCK_EX, create=True):
            self._check_sizes()
            slots = self._index.find(keys)
            known = (slots >= 0) & (slots < len(self._rows))
            # A damaged index may lead to another row's record: this row then gets a new slot, the other keeps its own.
            known[known] = self._rows.keys_at(slots[known]) == keys[known]
            if known.any():
                self._repair(slots[known], keys[known], checks[known], block[known], tuple(arrays))
                keys, block = keys[~known], block[~known]
            self._append(keys, block)

    def store_ids(self, positions: NDArray[np.int64], ids: IdArray) -> None:
        """Store the ids of the samples at these positions, unless ids are consecutive integers. Raises OSError."""
        if self._id_file is None or self._read_only:
            return
        _, distinct = np.unique(positions, return_index=True)
        positions, ids = positions[distinct], ids[distinct]
        stored = to_fixed_bytes(ids, width_bytes=self._ids.width_bytes) if id_kind(ids) == "str" else ids
        keys = positions.astype(np.uint64)
        with FileLock(self._folder / WRITING_FILE, fcntl.LOCK_EX, create=True):
            self._check_sizes()
            self._id_file.write_records(positions, self._id_file.pack(keys, keys, {IDS: stored}))

    def ids_at(self, positions: NDArray[np.int64]) -> IdArray | None:
        """Return the ids of the samples at these positions; None if some are not cached. Raises OSError."""
        if self._ids.dense_start is not None:
            return positions + self._ids.dense_start
        assert self._id_file is not None, "a table without row numbers keeps ids"
        self._check_sizes()
        keys = positions.astype(np.uint64)
        arrays, valid, _ = self._id_file.read(positions, (IDS,), keys, keys)
        if not valid.all():
            return None
        return from_fixed_bytes(arrays[IDS]) if self._ids.kind == "str" else arrays[IDS]

    @property
    def taken_slots(self) -> int:
        """Number of slots assigned; a damaged index may say more than there are."""
        return min(self._index.taken, self.shape.slots)

    def _repair(
        self, slots: NDArray[np.int64], keys: Words, checks: Words, block: NDArray[np.uint8], names: tuple[str, ...]
    ) -> None:
        _, valid, _ = self._rows.read(slots, names, keys, checks)
        for row in np.flatnonzero(~valid).tolist():
            self._rows.write_fields(int(slots[row]), block[row], names)

    def _append(self, keys: Words, block: NDArray[np.uint8]) -> None:
        taken = self.taken_slots
        keys, block = keys[: self.shape.slots - taken], block[: self.shape.slots - taken]
        entries = self._index.free_entries(keys)
        room = entries >= 0
        if not room.all():
            entries, keys, block = entries[room], keys[room], block[room]
        if not len(keys):
            return
        slots = np.arange(taken, taken + len(keys))
        # In this order: a process killed after any of the three leaves slots unused, and never one with two owners.
        self._index.take(taken + len(keys))
        self._rows.write_records(slots, block)
        self._index.put(entries, keys, slots)

    def _check_sizes(self) -> None:
        for file in self._files:
            file.check_size()
