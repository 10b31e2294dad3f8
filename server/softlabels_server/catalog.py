"""Which stores are served: the folders below one root, opened when first asked for and again when replaced."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias

from softlabels.encodings import Encoding
from softlabels.errors import DamageError, ManifestError, SoftLabelsError, UnknownStoreError
from softlabels.manifest import STORE_NAME, Manifest
from softlabels.store.rows import MANIFEST, PLAN, LocalRows
from softlabels_server.pacing import Pace

Signature: TypeAlias = tuple[str, int, int, int]
"""File, inode, size and modification time (ns) of what a store says of itself: another signature, another version."""


@dataclass(frozen=True, kw_only=True)
class ServedStore:
    """One version of one store, open.

    Attributes:
        name: what it is called in URLs: the name of its folder.
        path: of its folder.
        digest: names this version.
        signature: of the manifest file that it was opened from.
        pace: how fast its rows come.
        forms: headers of replies, by what they hold.
    """

    name: str
    path: Path
    rows: LocalRows
    manifest: Manifest
    encoding: Encoding
    digest: str
    signature: Signature
    pace: Pace = field(default_factory=Pace)
    forms: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BrokenStore:
    """A store that is there but cannot be opened: listed with the reason, for leaving it out would call it missing."""

    name: str
    error: SoftLabelsError


class StoreFolder:
    """The stores directly below a folder, or the one store that the folder itself is.

    A store is called what its folder is called, so that copying or renaming a folder is all it takes to publish one.
    The root given as a store itself is called the same way. Links that lead out of the root are not followed. Safe
    under threads.

    Args:
        root: the folder.
    Raises:
        UnknownStoreError: no such folder.
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
        self._opened: dict[str, ServedStore] = {}
        self._lock = threading.Lock()
        self._own_name = self._name_of_root() if _signature(self.root) is not None else None

    def names(self) -> list[str]:
        """Names of the stores there are now, sorted; whether each can be opened shows when it is.

        Raises:
            DamageError: the folder cannot be listed.
        """
        if self._own_name is not None:
            return [self._own_name]
        try:
            entries = os.listdir(self.root)
        except OSError as error:
            raise DamageError(
                f"the folder of the stores cannot be listed: {error.strerror}; it was there before"
            ) from error
        return sorted(entry for entry in entries if self._is_there(entry))

    def __iter__(self) -> Iterator[ServedStore | BrokenStore]:
        """Every store there is now, opened, or why it cannot be."""
        for name in self.names():
            try:
                yield self.get(name)
            except UnknownStoreError:
                continue  # removed since its name was read
            except SoftLabelsError as error:
                yield BrokenStore(name=name, error=error)

    def opened(self, name: str) -> ServedStore | None:
        """The store, if it is open and unchanged on disk: one look at a file's status, so fit for an event loop."""
        store = self._opened.get(name)
        return store if store is not None and store.signature == _signature(store.path) else None

    def get(self, name: str) -> ServedStore:
        """The store of this name, in the version that lies on disk now.

        Raises:
            UnknownStoreError: none of that name.
            ManifestError, FormatVersionError: it cannot be believed or understood.
        """
        with self._lock:
            store = self.opened(name)
            if store is None:
                # A replaced version is not closed: replies under way still read it. It goes with the last of them.
                self._opened.pop(name, None)
                store = self._opened[name] = self._open(name)
            return store

    def close(self) -> None:
        """Let go of every store."""
        with self._lock:
            for store in self._opened.values():
                store.rows.close()
            self._opened.clear()

    def _open(self, name: str) -> ServedStore:
        signature = self._signature_of(name)
        if signature is None:
            near = get_close_matches(name, self.names(), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; GET /v1/stores lists those there are"
            raise UnknownStoreError(f"there is no store {name[:128]!r} here{hint}", name=name[:128])
        path = self.root if self._own_name is not None else self.root / name
        try:
            rows = LocalRows(path)
        except SoftLabelsError:
            raise
        except OSError as error:
            raise ManifestError(f"store {name!r} is there but cannot be read: {error.strerror}") from error
        return ServedStore(
            name=name,
            path=path,
            rows=rows,
            manifest=rows.manifest,
            encoding=rows.encoding,
            digest=rows.digest,
            signature=signature,
        )

    def _signature_of(self, name: str) -> Signature | None:
        if self._own_name is not None:
            return _signature(self.root) if name == self._own_name else None
        if not STORE_NAME.fullmatch(name):
            return None
        path = self.root / name
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(self.root):
            return None
        return _signature(path)

    def _is_there(self, name: str) -> bool:
        try:
            return self._signature_of(name) is not None
        except ManifestError:
            return True  # listed as what cannot be read, rather than taken for nothing

    def _name_of_root(self) -> str:
        name = self.root.name
        # A folder like `/` or `my store` cannot be a path segment; the name that its maker gave it can.
        return name if STORE_NAME.fullmatch(name) else LocalRows(self.root).manifest.name


def _signature(folder: Path) -> Signature | None:
    """What tells one version of a store from the next, None where there is no store.

    Raises:
        ManifestError: whether there is one cannot be seen.
    """
    for file in (MANIFEST, PLAN):
        try:
            status = os.stat(f"{folder}/{file}")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ManifestError(f"folder {folder.name!r} cannot be looked into: {error.strerror}") from error
        return file, status.st_ino, status.st_size, status.st_mtime_ns
    return None
