"""Which stores' rows are kept on this machine, and who makes room for whom? A folder of tables, one a store's version.

FOLDER/rows-v1/lock                      held while tables come and go
FOLDER/rows-v1/DIGEST/table.json         which store, and how large; its age is when it was last opened
FOLDER/rows-v1/DIGEST/in-use             locked, shared, by every process that reads or fills the table
FOLDER/rows-v1/DIGEST/{index,rows,ids}   see `softlabels_client.cache.row_table`
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softlabels.documents import as_json
from softlabels.manifest import Manifest
from softlabels_client.cache.row_index import read_taken
from softlabels_client.cache.row_table import (
    IDS_FILE,
    INDEX_FILE,
    ROWS_FILE,
    WRITING_FILE,
    RowTable,
    TableShape,
    shape_of,
    shape_within,
)

LAYOUT = "rows-v1"
"""The folder of this layout of files; another layout has another name, and never reads these."""

ENVIRONMENT = "SOFTLABELS_CACHE"
"""Names the cache's folder where the caller does not."""

DEFAULT_BYTES = 16 << 30
"""What a cache may take unless told otherwise: of 1,000 classes in f16, eight million rows."""

_TABLE, _IN_USE, _LOCK = "table.json", "in-use", "lock"
_DIGEST = re.compile("[0-9a-f]{64}")
_GROWN = 1.25
"""A table is made anew when there is room for so many times its rows; below that, what it holds is worth more."""


def default_folder() -> Path:
    """Where a cache lies unless told otherwise: $SOFTLABELS_CACHE, else ~/.cache/softlabels ($XDG_CACHE_HOME)."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "softlabels"


@dataclass(frozen=True, kw_only=True)
class KeptStore:
    """One version of a store as the folder holds it.

    Attributes:
        name: of the store.
        digest: of its version.
        kept_rows: rows that are here, of `rows`.
        rows: of the store.
        size_bytes: most that its files will take.
        disk_bytes: what they take now.
        last_opened_s: when, seconds since 1970.
        in_use: whether a process has it open.
    """

    name: str
    digest: str
    kept_rows: int
    rows: int
    size_bytes: int
    disk_bytes: int
    last_opened_s: float
    in_use: bool


class _Held:
    """A lock that is held for as long as somebody refers to it, in this process or one forked from it."""

    def __init__(self, path: Path, kind: int, *, create: bool = False) -> None:
        self._fd = -1
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT if create else os.O_RDONLY, 0o600)
        fcntl.flock(self._fd, kind)

    def release(self) -> None:
        """Let go for all: a child forked meanwhile by another thread would go on holding what is only closed."""
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


@dataclass(frozen=True)
class OpenTable:
    """A table, and the lock that says it is in use."""

    table: RowTable
    held: _Held


class CacheFolder:
    """A folder that keeps rows of stores, within a bound.

    Args:
        folder: where; made when something is to be kept.
        most_bytes: of all tables together.
        read_only: nothing in it is ever changed.
    """

    def __init__(self, folder: Path, *, most_bytes: int = DEFAULT_BYTES, read_only: bool = False) -> None:
        self._root = folder / LAYOUT
        self._most_bytes, self._read_only = most_bytes, read_only

    def open(self, manifest: Manifest, digest: str) -> OpenTable | None:
        """The table of a version of a store, made where there is none; None where there is no room for one.

        Other versions make room, the longest unused first; those that a process has open stay.

        Raises:
            OSError: the folder cannot be read or written.
        """
        if self._read_only:
            shape = self._shape(manifest, digest)
            return None if shape is None else self._opened(manifest, digest, shape)
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._locked():
            self._clear_rubbish()
            shape = self._settled(manifest, digest)
            if shape is None:
                return None
            os.utime(self._root / digest / _TABLE)
            return self._opened(manifest, digest, shape)

    def kept(self) -> list[KeptStore]:
        """What the folder holds, the last opened first."""
        found = [self._described(folder) for folder in self._tables()]
        return sorted(found, key=lambda kept: -kept.last_opened_s)

    def clear(self, digest_start: str = "") -> tuple[list[KeptStore], list[KeptStore]]:
        """Remove tables; those that a process has open stay.

        Args:
            digest_start: of those to be removed; every one when empty.
        Returns:
            What was removed, and what stayed because it is in use.
        """
        if not self._root.is_dir():
            return [], []
        removed: list[KeptStore] = []
        stayed: list[KeptStore] = []
        with self._locked():
            self._clear_rubbish()
            for kept in self.kept():
                if kept.digest.startswith(digest_start):
                    (removed if self._removed(kept.digest) else stayed).append(kept)
        return removed, stayed

    def _settled(self, manifest: Manifest, digest: str) -> TableShape | None:
        """The shape of the table that is there from now on; None where there is no room for one."""
        others = [kept for kept in self.kept() if kept.digest != digest]
        room_bytes = self._most_bytes - sum(kept.size_bytes for kept in others if kept.in_use)
        wanted, there = shape_within(manifest, room_bytes), self._shape(manifest, digest)
        slots = 0 if wanted is None else wanted.slots
        if there is not None and there.slots <= slots <= there.slots * _GROWN:
            return there
        if (self._root / digest).exists() and not self._removed(digest):
            return there
        if wanted is not None:
            idle = [kept for kept in others if not kept.in_use]
            while wanted.size_bytes + sum(kept.size_bytes for kept in idle) > room_bytes:
                self._removed(idle.pop().digest)
            self._make(manifest, digest, wanted)
        return wanted

    def _make(self, manifest: Manifest, digest: str, shape: TableShape) -> None:
        new = self._root / f".new-{digest}"
        new.mkdir(mode=0o700)
        for name, size_bytes in {**shape.sizes, WRITING_FILE: 0, _IN_USE: 0}.items():
            with (new / name).open("wb") as file:
                file.truncate(size_bytes)  # holes: the disk is taken as rows come
        (new / _TABLE).write_text(json.dumps(_document(manifest, digest, shape)))
        new.rename(self._root / digest)

    def _shape(self, manifest: Manifest, digest: str) -> TableShape | None:
        """The shape of the table that is there; None where there is none that this store could have."""
        document = self._document(self._root / digest)
        slots = document.get("slots")
        if not isinstance(slots, int) or not 0 < slots <= manifest.rows:
            return None
        shape = shape_of(manifest, slots)
        if document != _document(manifest, digest, shape):
            return None
        sizes = {name: self._size(self._root / digest / name) for name in shape.sizes}
        return shape if sizes == shape.sizes else None

    def _opened(self, manifest: Manifest, digest: str, shape: TableShape) -> OpenTable:
        folder = self._root / digest
        held = _Held(folder / _IN_USE, fcntl.LOCK_SH)
        return OpenTable(RowTable(folder, manifest, digest, shape, read_only=self._read_only), held)

    def _removed(self, digest: str) -> bool:
        """Whether a table could be removed: nobody has it open."""
        folder = self._root / digest
        with contextlib.suppress(FileNotFoundError):
            try:
                held = _Held(folder / _IN_USE, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            held.release()
        # Renamed first: a process that is killed in the middle leaves rubbish, and no half table.
        gone = self._root / f".gone-{digest}-{os.getpid()}-{time.monotonic_ns()}"
        folder.rename(gone)
        shutil.rmtree(gone)
        return True

    def _clear_rubbish(self) -> None:
        for left in (*self._root.glob(".new-*"), *self._root.glob(".gone-*")):
            shutil.rmtree(left)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        held = _Held(self._root / _LOCK, fcntl.LOCK_EX, create=True)
        try:
            yield
        finally:
            held.release()

    def _tables(self) -> list[Path]:
        if not self._root.is_dir():
            return []
        return [path for path in self._root.iterdir() if _DIGEST.fullmatch(path.name)]

    def _described(self, folder: Path) -> KeptStore:
        document = self._document(folder)
        files = [path.stat() for path in folder.iterdir()]
        table = folder / _TABLE
        return KeptStore(
            name=str(document.get("name", "?")),
            digest=folder.name,
            kept_rows=read_taken(folder / INDEX_FILE),
            rows=int(document.get("rows", 0)),
            size_bytes=sum(max(0, self._size(folder / name)) for name in (INDEX_FILE, ROWS_FILE, IDS_FILE)),
            disk_bytes=sum(file.st_blocks * 512 for file in files),
            last_opened_s=table.stat().st_mtime if table.exists() else 0.0,
            in_use=self._in_use(folder),
        )

    @staticmethod
    def _in_use(folder: Path) -> bool:
        try:
            _Held(folder / _IN_USE, fcntl.LOCK_EX | fcntl.LOCK_NB).release()
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        return False

    @staticmethod
    def _document(folder: Path) -> dict[str, Any]:
        try:
            document = json.loads((folder / _TABLE).read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
            return {}  # none, or one that a power failure cut: what is there is made anew
        return document if isinstance(document, dict) else {}

    @staticmethod
    def _size(path: Path) -> int:
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return -1


def _document(manifest: Manifest, digest: str, shape: TableShape) -> dict[str, Any]:
    """What `table.json` says; a table that says anything else is not this store's."""
    return {
        "name": manifest.name,
        "digest": digest,
        "rows": manifest.rows,
        "slots": shape.slots,
        "files": shape.sizes,
        "fields": {name: as_json(spec) for name, spec in shape.fields.items()},
    }
