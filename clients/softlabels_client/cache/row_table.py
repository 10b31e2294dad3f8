"""What of one version of a store is kept on this machine? Rows by key, never one that is not as it came.

    index     key → slot          see `softlabels_client.cache.row_index`
    rows      slot → record       see `softlabels_client.cache.row_records`
    ids       position → id       where ids do not count up, so that an epoch's samples have names without the server

A row is written into a slot that nobody else has, and only then into the index. Whoever is killed in between leaves a
slot unused. Writers of several processes take turns by a lock that ends with its owner; readers need none.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.ids import IdArray, from_fixed_bytes, id_kind, to_fixed_bytes
from softlabels.manifest import IDS, ArraySpec, Manifest
from softlabels_client.cache.checks import RowKeys, Words
from softlabels_client.cache.row_index import HashIndex, RowNumberIndex, SlotIndex, index_bytes, take_slots, taken_slots
from softlabels_client.cache.row_records import RecordFile, record_bytes

ROWS_FILE, INDEX_FILE, IDS_FILE, WRITING_FILE = "rows", "index", "ids", "writing"


@dataclass(frozen=True, kw_only=True)
class TableShape:
    """How large the files of a store's table are.

    Attributes:
        fields: that a record holds.
        slots: records that there is room for.
        keys: that the index is made for.
        dense: whether keys are row numbers.
        samples: whose ids are kept by position; 0 where ids count up.
        id_spec: how ids are kept.
    """

    fields: Mapping[str, ArraySpec]
    slots: int
    keys: int
    dense: bool
    samples: int
    id_spec: ArraySpec

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        sizes = {
            INDEX_FILE: index_bytes(self.keys, dense=self.dense),
            ROWS_FILE: self.slots * record_bytes(self.fields),
        }
        return sizes | ({IDS_FILE: self.samples * record_bytes({IDS: self.id_spec})} if self.samples else {})

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together; fewer on the disk until they are full."""
        return sum(self.sizes.values())


def shape_of(manifest: Manifest, slots: int) -> TableShape:
    """The table of a store that has room for so many rows."""
    dense = manifest.ids.dense_start is not None
    text = manifest.ids.kind == "str"
    return TableShape(
        fields={name: spec for name, spec in manifest.arrays.items() if name != IDS},
        slots=slots,
        keys=manifest.rows if dense else slots,
        dense=dense,
        samples=0 if dense else manifest.samples,
        id_spec=ArraySpec(dtype="|u1" if text else "<i8", row_shape=(manifest.ids.width_bytes,) if text else ()),
    )


def shape_within(manifest: Manifest, most_bytes: int) -> TableShape | None:
    """The largest table of a store that takes no more than this; None where not one row in a hundred would fit."""
    # By halving: what a slot costs besides its record differs from index to index.
    fits, too_many = 0, manifest.rows + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if shape_of(manifest, middle).size_bytes <= most_bytes:
            fits = middle
        else:
            too_many = middle
    return shape_of(manifest, fits) if fits and fits * 100 >= manifest.rows else None


class RowTable:
    """The kept rows of one version of a store; safe in threads, between processes and after fork.

    Args:
        folder: where its files lie.
        manifest: of the store.
        digest: of the store.
        shape: of the files.
        read_only: never written to.
    Raises:
        OSError: a file is missing, or is not of the size that it should have.
    """

    def __init__(self, folder: Path, manifest: Manifest, digest: str, shape: TableShape, *, read_only: bool) -> None:
        self.shape = shape
        self._folder, self._ids, self._read_only = folder, manifest.ids, read_only
        self.keys = RowKeys(manifest)
        make = RowNumberIndex if shape.dense else HashIndex
        self._index: SlotIndex = make(folder / INDEX_FILE, shape.keys, read_only=read_only)
        self._rows = RecordFile(folder / ROWS_FILE, shape.fields, shape.slots, digest=digest, read_only=read_only)
        self._names: RecordFile | None = None
        if shape.samples:
            fields = {IDS: shape.id_spec}
            self._names = RecordFile(folder / IDS_FILE, fields, shape.samples, digest=digest, read_only=read_only)

    def read(
        self, keys: Words, checks: Words, names: tuple[str, ...]
    ) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_], int]:
        """Rows by key.

        Args:
            keys, checks: [B], as `keys.of` gives them.
            names: of the fields.
        Returns:
            One array a field, [B, ...], of any content where a row is not here; which rows are here, [B]; and how many
            were found spoilt, which count as not here.
        Raises:
            OSError: somebody cut the files.
        """
        self._refuse_cut_files()
        slots = self._index.find(keys)
        here = (slots >= 0) & (slots < self.shape.slots)
        if not here.any():
            shapes = {name: self.shape.fields[name] for name in names}
            return {n: np.zeros((len(keys), *s.row_shape), s.dtype) for n, s in shapes.items()}, here, 0
        arrays, sound, spoilt = self._rows.read(np.where(here, slots, 0), names, keys, checks)
        return arrays, sound & here, int((spoilt & here).sum())

    def keep(self, keys: Words, checks: Words, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keep rows as they came; what is here already is filled up or put right, what there is no room for is left.

        Args:
            keys, checks: [B], as `keys.of` gives them.
            arrays: one a field, [B, ...].
        Raises:
            OSError: the disk is full, or broken.
        """
        if self._read_only or not len(keys) or not arrays:
            return
        _, distinct = np.unique(keys, return_index=True)
        if len(distinct) < len(keys):
            keys, checks = keys[distinct], checks[distinct]
            arrays = {name: array[distinct] for name, array in arrays.items()}
        if self.taken_slots == self.shape.slots and not (self._index.find(keys) >= 0).any():
            return
        block = self._rows.pack(keys, checks, arrays)
        with self._turn():
            self._refuse_cut_files()
            slots = self._index.find(keys)
            known = (slots >= 0) & (slots < self.shape.slots)
            # An index that leads to somebody else's record was spoilt: it gets another entry, and they keep theirs.
            known[known] = self._rows.keys_at(slots[known]) == keys[known]
            if known.any():
                self._put_right(slots[known], keys[known], checks[known], block[known], tuple(arrays))
                keys, block = keys[~known], block[~known]
            self._append(keys, block)

    def keep_ids(self, positions: NDArray[np.int64], ids: IdArray) -> None:
        """Keep the ids of the samples at these positions, where they do not count up. Raises OSError."""
        if self._names is None or self._read_only:
            return
        _, distinct = np.unique(positions, return_index=True)
        positions, ids = positions[distinct], ids[distinct]
        kept = to_fixed_bytes(ids, width_bytes=self._ids.width_bytes) if id_kind(ids) == "str" else ids
        keys = positions.astype(np.uint64)
        with self._turn():
            self._refuse_cut_files()
            self._names.write(positions, self._names.pack(keys, keys, {IDS: kept}))

    def ids_at(self, positions: NDArray[np.int64]) -> IdArray | None:
        """The ids of the samples at these positions; None where some are not known here. Raises OSError."""
        if self._ids.dense_start is not None:
            return positions + self._ids.dense_start
        assert self._names is not None, "a table without row numbers keeps ids"
        self._refuse_cut_files()
        keys = positions.astype(np.uint64)
        arrays, sound, _ = self._names.read(positions, (IDS,), keys, keys)
        if not sound.all():
            return None
        return from_fixed_bytes(arrays[IDS]) if self._ids.kind == "str" else arrays[IDS]

    @property
    def taken_slots(self) -> int:
        """How many rows are kept, or were once."""
        return min(taken_slots(self._index), self.shape.slots)

    def _put_right(
        self, slots: NDArray[np.int64], keys: Words, checks: Words, block: NDArray[np.uint8], names: tuple[str, ...]
    ) -> None:
        """Write these fields of records that are there already, where they are not as they should be."""
        _, sound, _ = self._rows.read(slots, names, keys, checks)
        for row in np.flatnonzero(~sound).tolist():
            self._rows.write_fields(int(slots[row]), block[row], names)

    def _append(self, keys: Words, block: NDArray[np.uint8]) -> None:
        taken = self.taken_slots
        keys, block = keys[: self.shape.slots - taken], block[: self.shape.slots - taken]
        places = self._index.places(keys)
        room = places >= 0
        if not room.all():
            places, keys, block = places[room], keys[room], block[room]
        if not len(keys):
            return
        slots = np.arange(taken, taken + len(keys))
        # In this order: whoever is killed after any of the three leaves slots unused, and none with two owners.
        take_slots(self._index, taken + len(keys))
        self._rows.write(slots, block)
        self._index.put(places, keys, slots)

    def _refuse_cut_files(self) -> None:
        for file in (self._index.file, self._rows.file, *([self._names.file] if self._names else [])):
            file.refuse_other_size()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        # Opened anew each time: a lock belongs to an open file, which threads and forked children would share.
        fd = os.open(self._folder / WRITING_FILE, os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            # Closing is not enough: a child that another thread forked meanwhile has this file open too.
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)
