"""The cache folder on a trainer's disk: one table per store version, within a size limit.

FOLDER/rows-v2/lock                      held while tables are created or removed
FOLDER/rows-v2/DIGEST/table.json         description of the table; its modification time is when it was last opened
FOLDER/rows-v2/DIGEST/in-use             locked, shared, by every process that reads or fills the table
FOLDER/rows-v2/DIGEST/{index,rows,ids}   see `softlabels_client.cache.row_table`
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from softlabels.documents import Document, as_json, parse_document
from softlabels.errors import ManifestError
from softlabels.manifest import ArraySpec, Manifest
from softlabels_client.cache.row_records import WORD, allocate
from softlabels_client.cache.row_table import (
    IDS_FILE,
    IN_USE_FILE,
    INDEX_FILE,
    ROWS_FILE,
    WRITING_FILE,
    FileLock,
    RowTable,
    TableShape,
    shape_within,
)

LAYOUT = "rows-v2"
"""Subfolder of this file format; another format gets another name and never reads these files."""

DEFAULT_BYTES = 16 << 30
"""Default size limit: eight million rows of 1,000 classes in f16."""

_TABLE, _LOCK = "table.json", "lock"
_DIGEST = re.compile("[0-9a-f]{64}")
_GROWTH = 1.25
"""A table is made anew once there is room for this many times its rows; below that, its content is worth more."""


def default_folder() -> Path:
    """Return the default cache folder: $SOFTLABELS_CACHE, else ~/.cache/softlabels ($XDG_CACHE_HOME)."""
    named = os.environ.get("SOFTLABELS_CACHE")
    if named:
        return Path(named).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "softlabels"


@dataclass(frozen=True, kw_only=True)
class CachedStore:
    """One store version in the cache.

    Attributes:
        cached_rows, rows: rows in the cache, and of the store.
        size_bytes: bytes of its files when full.
        disk_bytes: bytes they take on disk now.
        last_opened_s: last opening, seconds since 1970.
        in_use: whether a process has it open.
    """

    name: str
    digest: str
    cached_rows: int
    rows: int
    size_bytes: int
    disk_bytes: int
    last_opened_s: float
    in_use: bool


class TableDescription(Document, frozen=True, kw_only=True):
    """Content of `table.json`: what must match for the table to be used for a store."""

    name: str
    digest: str
    rows: Annotated[int, msgspec.Meta(ge=0)]
    slots: Annotated[int, msgspec.Meta(ge=1)]
    files: dict[str, int]
    fields: dict[str, ArraySpec]

    @classmethod
    def of(cls, shape: TableShape, digest: str) -> TableDescription:
        """Return the description of a store's table."""
        name, rows = shape.manifest.name, shape.manifest.rows
        return cls(name=name, digest=digest, rows=rows, slots=shape.slots, files=shape.sizes, fields=shape.fields)


class CacheFolder:
    """The cache folder: tables of several store versions, within a size limit.

    Args:
        folder: path; created when the first table is.
        most_bytes: size limit of all tables together.
        read_only: never change anything in it.
    """

    def __init__(self, folder: Path, *, most_bytes: int = DEFAULT_BYTES, read_only: bool = False) -> None:
        self._root = folder / LAYOUT
        self._most_bytes, self._read_only = most_bytes, read_only

    def open(self, manifest: Manifest, digest: str) -> RowTable | None:
        """Return the table of a store version, created if there is none; None if there is no room for one.

        Tables of other versions are removed to make room, least recently opened first, but never while in use.

        Raises:
            OSError: the folder cannot be read or written.
        """
        if self._read_only:
            # Without the folder's lock, since its file cannot be created where nothing may be written.
            return self._opened(digest, self._shape(manifest, digest))
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(self._root / _LOCK, fcntl.LOCK_EX, create=True):
            self._remove_leftovers()
            # Opened under the folder's lock: from then on its own lock on `in-use` keeps others from removing it.
            table = self._opened(digest, self._make_room(manifest, digest))
            if table is not None:
                os.utime(self._root / digest / _TABLE)
            return table

    def stores(self) -> list[CachedStore]:
        """Return the store versions in the folder, most recently opened first."""
        folders = list(self._root.iterdir()) if self._root.is_dir() else []
        found = [_describe(folder) for folder in folders if _DIGEST.fullmatch(folder.name)]
        return sorted(found, key=lambda store: -store.last_opened_s)

    def clear(self, digest_start: str = "") -> tuple[list[CachedStore], list[CachedStore]]:
        """Remove the tables whose digests begin so; return what was removed, and what not because it is in use."""
        removed: list[CachedStore] = []
        in_use: list[CachedStore] = []
        if not self._root.is_dir():
            return removed, in_use
        with FileLock(self._root / _LOCK, fcntl.LOCK_EX, create=True):
            self._remove_leftovers()
            for store in self.stores():
                if store.digest.startswith(digest_start):
                    (removed if self._remove(store.digest) else in_use).append(store)
        return removed, in_use

    def _make_room(self, manifest: Manifest, digest: str) -> TableShape | None:
        """Return the shape of the table, after removing others or making it anew; None if there is no room."""
        others = [store for store in self.stores() if store.digest != digest]
        # Tables count with their full size, not with what their sparse files take now: they may still be filled.
        room_bytes = self._most_bytes - sum(store.size_bytes for store in others if store.in_use)
        wanted, existing = shape_within(manifest, room_bytes), self._shape(manifest, digest)
        slots = 0 if wanted is None else wanted.slots
        if existing is not None and existing.slots <= slots <= existing.slots * _GROWTH:
            return existing
        if (self._root / digest).exists() and not self._remove(digest):
            return existing
        if wanted is not None:
            idle = [store for store in others if not store.in_use]
            while wanted.size_bytes + sum(store.size_bytes for store in idle) > room_bytes:
                # `stores` returns the most recently opened first, so the last is the least recently opened.
                self._remove(idle.pop().digest)
            self._make(digest, wanted)
        return wanted

    def _make(self, digest: str, shape: TableShape) -> None:
        new = self._root / f".new-{digest}"
        new.mkdir(mode=0o700)
        for name, size_bytes in {**shape.sizes, WRITING_FILE: 0, IN_USE_FILE: 0}.items():
            with (new / name).open("wb") as file:
                if size_bytes and name != ROWS_FILE:  # which grows as rows arrive
                    allocate(file.fileno(), 0, size_bytes)
        (new / _TABLE).write_text(json.dumps(as_json(TableDescription.of(shape, digest))))
        # Named once it is complete. There is no fsync: after a power failure the files' sizes, the description and the
        # checksums of rows tell what is usable.
        new.rename(self._root / digest)

    def _shape(self, manifest: Manifest, digest: str) -> TableShape | None:
        """Return the shape of the existing table; None if there is none, or one that does not fit this store."""
        description = _read_description(self._root / digest)
        if description is None or description.slots > manifest.rows:
            return None
        shape = TableShape(manifest, description.slots)
        if description != TableDescription.of(shape, digest):
            return None
        sizes, found, folder = shape.sizes, _sizes(self._root / digest), self._root / digest
        # Of records there are at least as many as were assigned.
        least = _taken_slots(folder / INDEX_FILE) * (sizes[ROWS_FILE] // shape.slots)
        if not min(least, sizes[ROWS_FILE]) <= found.get(ROWS_FILE, -1) <= sizes.pop(ROWS_FILE):
            return None
        return shape if sizes.items() <= found.items() else None

    def _opened(self, digest: str, shape: TableShape | None) -> RowTable | None:
        return None if shape is None else RowTable(self._root / digest, shape, digest=digest, read_only=self._read_only)

    def _remove(self, digest: str) -> bool:
        """Remove a table, and return whether that was possible: not while a process has it open."""
        folder = self._root / digest
        if _is_in_use(folder):
            return False
        # Renamed first: a process killed in the middle leaves leftovers to remove, not half a table.
        gone = self._root / f".gone-{digest}-{os.getpid()}-{time.monotonic_ns()}"
        folder.rename(gone)
        shutil.rmtree(gone)
        return True

    def _remove_leftovers(self) -> None:
        # Callers hold the folder's lock, so these are left over from processes that were killed.
        for left in (*self._root.glob(".new-*"), *self._root.glob(".gone-*")):
            shutil.rmtree(left)


def _describe(folder: Path) -> CachedStore:
    description, table, sizes = _read_description(folder), folder / _TABLE, _sizes(folder)
    return CachedStore(
        name="?" if description is None else description.name,
        digest=folder.name,
        cached_rows=_taken_slots(folder / INDEX_FILE),
        rows=0 if description is None else description.rows,
        size_bytes=sum(sizes.get(name, 0) for name in (INDEX_FILE, ROWS_FILE, IDS_FILE)),
        # `st_blocks` counts units of 512 bytes whatever the file system's block size, see stat(2).
        disk_bytes=sum(path.stat().st_blocks * 512 for path in folder.iterdir()),
        last_opened_s=table.stat().st_mtime if table.exists() else 0.0,
        in_use=_is_in_use(folder),
    )


def _taken_slots(index: Path) -> int:
    try:
        with index.open("rb") as file:
            return int.from_bytes(file.read(WORD), "little")
    except FileNotFoundError:
        return 0


def _is_in_use(folder: Path) -> bool:
    try:
        FileLock(folder / IN_USE_FILE, fcntl.LOCK_EX | fcntl.LOCK_NB).release()
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def _read_description(folder: Path) -> TableDescription | None:
    """Return a table's description; None if there is none, or one that a power failure or another version left."""
    try:
        return parse_document(json.loads((folder / _TABLE).read_bytes()), TableDescription, what=_TABLE)
    except (FileNotFoundError, NotADirectoryError, ManifestError, ValueError, RecursionError):
        return None


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}
