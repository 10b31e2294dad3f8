"""Which shards are committed: one receipt a shard, written last, and the claim that keeps a second writer out."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softlabels.documents import MAX_DOCUMENT_BYTES, as_json, canonical_json, open_sealed, seal
from softlabels.errors import ManifestError, ShardClaimedError, TruncatedError
from softlabels.manifest import STORE_NAME
from softlabels.store.confined import read_confined
from softlabels.store.files import TEMPORARY, make_folder, write_atomically
from softlabels.store.geometry import Part

FOLDER = "ledger"
LOCKS = "locks"

CLAIM_PATIENCE_S = 0.25
"""A shard may be held for a moment by somebody who only looks (`status`, a purge): that is no other writer."""

_LOOK_AGAIN_S = 0.01
STAGING = "staging"
DAMAGED = "damaged"
"""Where `repair` puts what it takes out of a store."""


_HEX = re.compile(r"[0-9a-f]*")
_RECEIPT_NAME = re.compile(r"[0-9]{8}\.json")


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A committed file: its size in bytes and SHA-256."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What a shard's writer vouches for; a shard without a receipt does not exist, whatever files lie there.

    Attributes:
        plan_sha256: digest of the plan that the shard was computed for.
        rows: first row and the one after the last.
        files: by path relative to the store.
        parts: where each array lies.
        fingerprint: of the shard's samples, see `softlabels.transfer_set.FingerprintSum`.
        audit: mergeable error statistics of the encoding over these rows.
    """

    shard: int
    plan_sha256: str
    rows: tuple[int, int]
    files: Mapping[str, FileRecord]
    parts: Mapping[str, Part]
    fingerprint: str
    audit: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """A JSON-able description that `from_json` reads back."""
        document: dict[str, Any] = as_json(self)
        return document

    @property
    def sha256(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(canonical_json(self.to_json())).hexdigest()

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Receipt:
        """Read a receipt.

        Raises:
            ManifestError: not what a receipt looks like, or a path that leaves the store.
        """
        try:
            first, last = document["rows"]
            receipt = cls(
                shard=check_whole(document["shard"], "shard"),
                plan_sha256=str(document["plan_sha256"]),
                rows=(check_whole(first, "rows"), check_whole(last, "rows")),
                files={check_path(path): _record(**record) for path, record in document["files"].items()},
                parts={str(name): _part(**part) for name, part in document["parts"].items()},
                fingerprint=str(document["fingerprint"]),
                audit=document["audit"],
            )
            for part in receipt.parts.values():
                if part.path not in receipt.files:
                    raise ValueError(f"array in {part.path!r}, which it does not name")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ManifestError(f"a receipt of the ledger does not say what it must: {error}") from error
        return receipt


class Ledger:
    """The receipts of the store at `root`."""

    def __init__(self, root: Path, *, plan_sha256: str) -> None:
        self._root = root
        self._plan_sha256 = plan_sha256

    def path(self, shard: int) -> Path:
        """Where the receipt of a shard lies."""
        return self._root / FOLDER / f"{shard:08d}.json"

    def read(self, shard: int) -> Receipt | None:
        """The receipt of a shard, None where it is not committed.

        Raises:
            ManifestError: there is one, but it is damaged, of another shard or of another plan.
        """
        path = self.path(shard)
        try:
            raw = read_confined(self._root, f"{FOLDER}/{path.name}", most_bytes=MAX_DOCUMENT_BYTES)
        except FileNotFoundError:
            return None
        receipt = Receipt.from_json(open_sealed(raw, what=f"receipt {path}"))
        if receipt.shard != shard or receipt.plan_sha256 != self._plan_sha256:
            raise ManifestError(f"receipt {path} belongs to another shard or another store: do not mix stores' files")
        return receipt

    def committed(self) -> list[int]:
        """Numbers of the shards that have a receipt, in order; the receipts are not read."""
        folder = self._root / FOLDER
        names = os.listdir(folder) if folder.is_dir() else []
        return sorted(int(name[:8]) for name in names if _RECEIPT_NAME.fullmatch(name))

    def staging(self, shard: int, path: str) -> Path:
        """Where a file of a shard is written before it is moved into its place; purged when its writer has died."""
        return self._root / STAGING / f"{shard:08d}.{path.replace('/', '-')}{TEMPORARY}"

    def write(self, receipt: Receipt) -> None:
        """Commit a shard: from here on its rows exist. The caller holds the claim, and its files are durable."""
        staging = self.staging(receipt.shard, "receipt")
        write_atomically(self.path(receipt.shard), [seal(receipt.to_json())], staging=staging)

    def digest(self, shards: int) -> str:
        """SHA-256 over the receipts of shards 0 … shards−1.

        Raises:
            TruncatedError: one is missing.
        """
        total = hashlib.sha256()
        for shard in range(shards):
            receipt = self.read(shard)
            if receipt is None:
                raise TruncatedError(
                    f"shard {shard} has no receipt: the store is not complete; run `softlabels resume`"
                )
            total.update(bytes.fromhex(receipt.sha256))
        return total.hexdigest()

    @contextlib.contextmanager
    def claim(self, shard: int) -> Iterator[None]:
        """Hold a shard alone while the context lasts; a claim dies with its process, also by kill -9 or power loss.

        Raises:
            ShardClaimedError: another writer holds it.
        """
        with self._lock(f"{shard:08d}", patience_s=CLAIM_PATIENCE_S) as held:
            if not held:
                raise ShardClaimedError(
                    f"shard {shard} of {self._root} is being written by another process: let it finish, or stop it and "
                    "resume",
                    shard=shard,
                )
            yield

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody else begins or finishes this store, and keep others from it while the context lasts."""
        with self._lock("store", patience_s=math.inf):
            yield

    @contextlib.contextmanager
    def _lock(self, name: str, *, patience_s: float) -> Iterator[bool]:
        folder = self._root / LOCKS
        make_folder(folder)
        descriptor = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            give_up = time.monotonic() + patience_s
            while not (held := _is_locked(descriptor)) and time.monotonic() < give_up:
                time.sleep(_LOOK_AGAIN_S)
            yield held
        finally:
            os.close(descriptor)


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _part(*, path: str, offset: int, stride: int, rows: int, checksums: str, sizes: list[int] | None = None) -> Part:
    if not isinstance(checksums, str) or not _HEX.fullmatch(checksums):
        raise ValueError("checksums that are no hex digits")
    return Part(
        path=check_path(path),
        offset=check_whole(offset, "offset"),
        stride=check_whole(stride, "stride"),
        rows=check_whole(rows, "rows"),
        checksums=checksums,
        sizes=None if sizes is None else tuple(check_whole(size, "size") for size in sizes),
    )


def _record(*, size: int, sha256: str) -> FileRecord:
    return FileRecord(size=check_whole(size, "size"), sha256=str(sha256))


def check_path(path: str) -> str:
    """Return the path if it stays inside a store's folder; raise ValueError otherwise."""
    if not all(STORE_NAME.fullmatch(segment) for segment in path.split("/")):
        raise ValueError(f"path {path!r} leaves the store or is hidden")
    return path


def check_whole(value: Any, label: str) -> int:
    """Return an integer from 0 to 2⁶²; raise ValueError for anything else."""
    if type(value) is not int or not 0 <= value <= 1 << 62:
        raise ValueError(f"{label} is {value!r}, not an integer from 0 to 2^62")
    return value
