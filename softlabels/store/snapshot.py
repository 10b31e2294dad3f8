"""Snapshot: one version of a store, as it was when it was opened: its folder, held open, its manifest and its receipts.

A store that is replaced while it is read is noticed: renamed folders are no matter, since all files are opened relative
to the one that is held; files of another version do not have the digests that the manifest and the receipts give.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar, cast

from softlabels.errors import (
    DamageError,
    FormatVersionError,
    RowsNotCommittedError,
    StoreChangedError,
    TruncatedError,
    UnknownStoreError,
)
from softlabels.manifest import Manifest
from softlabels.store.ledger import Ledger, Receipt
from softlabels.store.safe_open import OpenFolder
from softlabels.store.store_documents import MANIFEST, PLAN, load_document, load_manifest


class Snapshot:
    """A store in a folder, as it was when it was opened.

    Args:
        path: the store's folder.
        manifest: its manifest or plan; read from the folder when left out.
    Raises:
        UnknownStoreError: there is no store. ManifestError, FormatVersionError: its manifest is invalid or too new.
    """

    def __init__(self, path: Path, manifest: Manifest | None = None) -> None:
        try:
            self.folder = OpenFolder(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UnknownStoreError(f"there is no store at {path}: there is no such folder", where=str(path)) from error
        self.manifest = load_manifest(self.folder) if manifest is None else manifest
        self._ledger = Ledger(self.folder, self.manifest)

    def receipt(self, shard: int) -> Receipt:
        """Return the receipt of a shard.

        Raises:
            RowsNotCommittedError, TruncatedError: it has none.
            ManifestError: it is damaged, or not the one that the store was finished with.
        """
        receipt, name = self._ledger.read(shard), self.manifest.name
        if receipt is None and self.manifest.finished:
            raise TruncatedError(
                f"{name!r}: the receipt of shard {shard} is missing from a finished store; run `softlabels repair`, "
                "then `softlabels resume`",
                shard=shard,
            )
        if receipt is None:
            first = shard * self.manifest.shards.rows_per_shard
            raise RowsNotCommittedError(
                f"{name!r} is unfinished: shard {shard} (rows from {first} on) is not committed; run "
                "`softlabels resume`",
                shard=shard,
            )
        return receipt

    def raise_if_changed(self, error: DamageError) -> None:
        """Raise StoreChangedError if what looks like damage comes from another version in the place of this one."""
        path, name = self.folder.path, MANIFEST if self.manifest.finished else PLAN
        try:
            changed = not self.folder.is_at_its_path() or load_document(path, name).digest != self.manifest.digest
        except (FileNotFoundError, NotADirectoryError, FormatVersionError):
            changed = True
        except (DamageError, OSError):
            return
        if changed:
            raise StoreChangedError(
                f"the store at {path} was replaced while it was open, and rows of the version with digest "
                f"{self.manifest.digest[:12]} can no longer be read ({error}): open it again"
            ) from error


class HasSnapshot(Protocol):
    """A reader of one version of a store."""

    _snapshot: Snapshot


_R = TypeVar("_R")
_P = ParamSpec("_P")
_S = TypeVar("_S", bound=HasSnapshot)


def of_one_version(method: Callable[Concatenate[_S, _P], _R]) -> Callable[Concatenate[_S, _P], _R]:
    """Let a reader's method raise StoreChangedError where damage comes from a store that was replaced."""

    @functools.wraps(method)
    def explained(self: _S, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return method(self, *args, **kwargs)
        except DamageError as error:
            self._snapshot.raise_if_changed(error)
            raise

    return cast("Callable[Concatenate[_S, _P], _R]", explained)
