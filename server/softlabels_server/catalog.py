"""Catalog of served stores: the folders below one root, opened on first use and reopened when replaced."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias

from softlabels.documents import Document
from softlabels.errors import DamageError, ManifestError, SoftLabelsError, UnknownStoreError
from softlabels.manifest import FINGERPRINTS, IDS, STORE_NAME, ArraySpec
from softlabels.store.store_documents import MANIFEST, PLAN, load_manifest
from softlabels.store.store_reader import LocalRows
from softlabels_server.fast_path.executor_policy import ExecutorPolicy

Signature: TypeAlias = tuple[str, int, int, int]
"""Name, inode, size and change time (ns) of a store's manifest file; a new version has another."""


class Damage(Document, frozen=True):
    """Damage of one version of a store, found by a background check; `shard` is None where it concerns every row."""

    store: str
    signature: Signature
    shard: int | None
    message: str


class ScrubState(Document, frozen=True):
    """State of the background check of all stores.

    Attributes:
        rounds: number of finished rounds.
        finished_s: Unix time at which the last one ended.
        read_bytes, total_bytes: progress of the round under way.
    """

    interval_s: float
    rounds: int = 0
    finished_s: float | None = None
    read_bytes: int = 0
    total_bytes: int = 0
    damage: tuple[Damage, ...] = ()


@dataclass(kw_only=True, eq=False)
class ServedStore:
    """One open version of a store.

    Attributes:
        name: name in URLs, which is the name of its folder.
        signature: signature of the manifest file that it was opened from.
        layouts: cache of `fast_path.response_plan.layout_for`.
    """

    name: str
    path: Path
    rows: LocalRows
    signature: Signature
    executor_policy: ExecutorPolicy = field(default_factory=ExecutorPolicy)
    layouts: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.manifest, self.digest, self.encoding = self.rows.manifest, self.rows.digest, self.rows.encoding

    @property
    def has_row_offsets(self) -> bool:
        """Whether replies carry `row_offsets`, since a sample may have any number of rows (sequences)."""
        return self.manifest.layout.kind == "sequences"

    def spec_of(self, name: str) -> ArraySpec:
        """Return dtype and row shape of an array of a reply, whether or not the manifest lists it."""
        found = self.manifest.arrays.get(name)
        if found is not None:
            return found
        if name == FINGERPRINTS:
            return ArraySpec(dtype="|u1", row_shape=(16,))
        if name == IDS and self.manifest.ids.kind == "str":
            return ArraySpec(dtype="|u1", row_shape=(self.manifest.ids.width_bytes,))
        return ArraySpec(dtype="<i8", row_shape=())  # integer ids, row offsets


@dataclass(frozen=True, kw_only=True)
class BrokenStore:
    """A store that exists but cannot be opened: listed with the reason, since leaving it out would call it missing."""

    name: str
    error: SoftLabelsError


class StoreFolder:
    """The stores directly below a folder, or the folder itself if it is a store. Thread-safe.

    A store is named after its folder, so that copying or renaming a folder publishes it. Links that lead out of the
    root are not followed.

    Raises:
        UnknownStoreError: there is no such folder.
    """

    def __init__(self, root: str | Path) -> None:
        try:
            self.root = Path(root).resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise UnknownStoreError(f"there is no folder {str(root)!r} to serve stores from: {error}") from error
        if not self.root.is_dir():
            raise UnknownStoreError(
                f"{str(root)!r} is not a folder: give the folder that holds the stores, or one store's"
            )
        self.scrub: ScrubState | None = None
        self._opened: dict[str, ServedStore] = {}
        self._lock = threading.Lock()
        self._own_name = None
        if _signature(self.root) is not None:
            # A folder name such as `/` or `my store` cannot be a URL segment; the name in the manifest can.
            name = self.root.name
            self._own_name = name if STORE_NAME.fullmatch(name) else load_manifest(self.root).name

    def names(self) -> list[str]:
        """Return the sorted names of all existing stores, unreadable ones too. Raises DamageError."""
        if self._own_name is not None:
            return [self._own_name]
        try:
            entries = os.listdir(self.root)
        except OSError as error:
            raise DamageError(f"the folder of the stores cannot be listed any more: {error.strerror}") from error
        return sorted(entry for entry in entries if self._exists(entry))

    def __iter__(self) -> Iterator[ServedStore | BrokenStore]:
        """Yield every existing store, opened, or the reason why it cannot be."""
        for name in self.names():
            try:
                yield self.get(name)
            except UnknownStoreError:
                continue  # removed since its name was read
            except SoftLabelsError as error:
                yield BrokenStore(name=name, error=error)

    def opened(self, name: str) -> ServedStore | None:
        """Return the store if it is open and unchanged on disk: one `stat`, fast enough for an event loop."""
        # Without the lock, which `get` holds while a store is opened: the event loop must not wait for a disk.
        store = self._opened.get(name)
        return store if store is not None and store.signature == _signature(store.path) else None

    def get(self, name: str) -> ServedStore:
        """Return the version of a store that is on disk now.

        Raises:
            UnknownStoreError: no store of that name.
            ManifestError, FormatVersionError: its manifest is damaged or of a newer format.
        """
        with self._lock:
            store = self.opened(name)
            if store is None:
                # A replaced version is not closed: replies being sent still read it, and it is freed with the last.
                self._opened.pop(name, None)
                store = self._open(name)
                self._refuse_damaged(store)
                self._opened[name] = store
            return store

    def version_of(self, name: str) -> tuple[Signature | None, Path]:
        """Return the signature of the version on disk, None without a store of that name, and its folder."""
        return self._signature_of(name), self.root if self._own_name is not None else self.root / name

    def note_scrub(self, state: ScrubState) -> None:
        """Show the state of the background check in /health, and refuse the shards that it found damaged."""
        with self._lock:
            self.scrub = state
            for store in self._opened.values():
                self._refuse_damaged(store)

    def close(self) -> None:
        """Close every store."""
        with self._lock:
            for store in self._opened.values():
                store.rows.close()
            self._opened.clear()

    def _refuse_damaged(self, store: ServedStore) -> None:
        damage = () if self.scrub is None else self.scrub.damage
        version = store.name, store.signature
        store.rows.refuse({found.shard: found.message for found in damage if (found.store, found.signature) == version})

    def _open(self, name: str) -> ServedStore:
        # Before the files are read: if the store is replaced meanwhile, the next request notices and opens it again.
        signature, path = self.version_of(name)
        if signature is None:
            near = get_close_matches(name, self.names(), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; GET /v1/stores lists the stores"
            raise UnknownStoreError(f"there is no store {name[:128]!r} on this server{hint}", name=name[:128])
        try:
            return ServedStore(name=name, path=path, rows=LocalRows(path), signature=signature)
        except SoftLabelsError:
            raise
        except OSError as error:
            raise ManifestError(f"store {name!r} exists but cannot be read: {error.strerror}") from error

    def _signature_of(self, name: str) -> Signature | None:
        if self._own_name is not None:
            return _signature(self.root) if name == self._own_name else None
        if not STORE_NAME.fullmatch(name):
            return None
        path = self.root / name
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(self.root):
            return None
        return _signature(path)

    def _exists(self, name: str) -> bool:
        try:
            return self._signature_of(name) is not None
        except ManifestError:
            return True  # listed as unreadable: an I/O failure must not look like a missing store


def _signature(folder: Path) -> Signature | None:
    """Return the signature of the store in a folder, None if there is no store. Raises ManifestError if unreadable."""
    for file in (MANIFEST, PLAN):
        try:
            status = os.stat(f"{folder}/{file}")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ManifestError(f"folder {folder.name!r} cannot be read: {error.strerror}") from error
        # The time of the last change, and not of the last write: that one can be set, as `cp -p` and `rsync -t` do.
        return file, status.st_ino, status.st_size, status.st_ctime_ns
    return None
