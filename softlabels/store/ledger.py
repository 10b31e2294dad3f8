"""Ledger: the receipts that say which shards are committed, the claims that keep a second writer out, and progress.

A shard exists when its receipt does. The receipt is written last, after every file of the shard is durable, so a crash
at any moment leaves either no shard or a whole one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softlabels.atomic_files import TEMPORARY, make_folder, write_atomically
from softlabels.audit import Audit
from softlabels.documents import (
    MAX_DOCUMENT_BYTES,
    Document,
    Sha256,
    as_json,
    canonical_json,
    open_sealed,
    parse_document,
    seal,
)
from softlabels.errors import ManifestError, ShardClaimedError
from softlabels.manifest import Manifest, StorePath
from softlabels.store.chunks import Count, Part, shard_rows
from softlabels.store.safe_open import safe_read
from softlabels.store.store_documents import load_manifest, plan_digest

LEDGER_FOLDER = "ledger"
LOCK_FOLDER = "locks"
STAGING_FOLDER = "staging"
DAMAGED_FOLDER = "damaged"
"""Where `repair` moves what it removes from a store."""

CLAIM_TIMEOUT_S = 0.25
"""Readers of the locks (`status`, a purge) hold one for a moment: that is not another writer."""

_POLL_S = 0.01
_RECEIPT_NAME = re.compile(r"[0-9]{8}\.json")


class FileRecord(Document, frozen=True):
    """A committed file: size in bytes and SHA-256."""

    size: Count
    sha256: Sha256


class Receipt(Document, frozen=True):
    """Record of a committed shard. A shard without a receipt does not exist, whatever files are there.

    Attributes:
        plan_sha256: digest of the plan that the shard was computed for.
        rows: first row of the store, and the one after the last.
        files: by path relative to the store.
        parts: location of each array, by name.
        fingerprint: fingerprint of the shard's samples, see `softlabels.transfer_set.FingerprintSum`.
        audit: mergeable error statistics of the encoding over these rows, see `softlabels.audit.Audit`.
    """

    shard: Count
    plan_sha256: Sha256
    rows: tuple[Count, Count]
    files: dict[StorePath, FileRecord]
    parts: dict[str, Part]
    fingerprint: str
    audit: dict[str, Any]

    def __post_init__(self) -> None:
        for name, part in self.parts.items():
            if part.path not in self.files:
                raise ValueError(f"parts.{name}.path is {part.path!r}, which `files` does not list")

    @property
    def sha256(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(canonical_json(as_json(self))).hexdigest()


class Ledger:
    """The receipts of the store at `root`.

    Args:
        plan_sha256: digest of the store's plan; receipts of other plans are refused.
    """

    def __init__(self, root: Path, *, plan_sha256: str) -> None:
        self._root = root
        self._plan_sha256 = plan_sha256

    def path(self, shard: int) -> Path:
        """Return the path of a shard's receipt."""
        return self._root / LEDGER_FOLDER / f"{shard:08d}.json"

    def read(self, shard: int) -> Receipt | None:
        """Return the receipt of a shard, None where it is not committed.

        Raises:
            ManifestError: there is one, but it is damaged, or belongs to another shard or plan.
        """
        path = self.path(shard)
        try:
            raw = safe_read(self._root, f"{LEDGER_FOLDER}/{path.name}", max_bytes=MAX_DOCUMENT_BYTES)
        except FileNotFoundError:
            return None
        receipt = parse_receipt(raw, what=f"receipt {path}")
        if receipt.shard != shard or receipt.plan_sha256 != self._plan_sha256:
            raise ManifestError(f"receipt {path} belongs to another shard or another store: do not mix stores' files")
        return receipt

    def receipts(self, shards: Iterable[int]) -> Iterator[Receipt]:
        """Yield the receipts of those of these shards that are committed, one at a time, since many are large."""
        for shard in shards:
            receipt = self.read(shard)
            if receipt is not None:
                yield receipt

    def committed(self) -> list[int]:
        """Return the numbers of the shards that have a receipt, in order."""
        folder = self._root / LEDGER_FOLDER
        names = os.listdir(folder) if folder.is_dir() else []
        return sorted(int(name[:8]) for name in names if _RECEIPT_NAME.fullmatch(name))

    def staging(self, shard: int, path: str) -> Path:
        """Return where a file of a shard is written before it is renamed; removed later if its writer dies."""
        return self._root / STAGING_FOLDER / f"{shard:08d}.{path.replace('/', '-')}{TEMPORARY}"

    def write(self, receipt: Receipt) -> None:
        """Commit a shard: from now on its rows exist. The caller holds the claim, and its files are durable."""
        staging = self.staging(receipt.shard, "receipt")
        write_atomically(self.path(receipt.shard), [seal(as_json(receipt))], staging=staging)

    @contextlib.contextmanager
    def claim(self, shard: int) -> Iterator[None]:
        """Hold a shard exclusively inside this context.

        The claim ends with its process, also after kill -9 or a power failure.

        Raises:
            ShardClaimedError: another writer holds it.
        """
        with self._lock(f"{shard:08d}", timeout_s=CLAIM_TIMEOUT_S) as held:
            if not held:
                raise ShardClaimedError(
                    f"shard {shard} of {self._root} is being written by another process: let it finish, or stop it and "
                    "resume",
                    shard=shard,
                )
            yield

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock under which a store is created, finished or repaired; waits for it.

        Lock order: this one first, then a shard's claim; the other way round two processes could wait for each other.
        """
        with self._lock("store", timeout_s=math.inf):
            yield

    @contextlib.contextmanager
    def _lock(self, name: str, *, timeout_s: float) -> Iterator[bool]:
        folder = self._root / LOCK_FOLDER
        make_folder(folder)
        # The file is never removed: a second process could then lock a new file of that name beside the old one.
        descriptor = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            deadline_s = time.monotonic() + timeout_s
            # flock, which the kernel releases when a process dies, and not fcntl locks, which closing any descriptor of
            # the file would release. Polled, since a blocking flock knows no timeout.
            while not (held := _try_lock(descriptor)) and time.monotonic() < deadline_s:
                time.sleep(_POLL_S)
            yield held
        finally:
            os.close(descriptor)


@dataclass(frozen=True, kw_only=True)
class Status:
    """Progress of a store.

    Attributes:
        manifest: manifest of the finished store, else its plan.
        committed: shards that have a receipt.
        rows: rows in these shards.
        in_work: shards that a living process holds.
        rows_per_s: rows a second between the first and the last commit; None before the second commit.
        left_s: seconds that the rest takes at this rate; None without a rate, 0 when nothing is left.
        audit: error of the encoding over the rows so far, see `Audit.summary`.
    """

    manifest: Manifest
    committed: tuple[int, ...]
    rows: int
    in_work: tuple[int, ...]
    rows_per_s: float | None
    left_s: float | None
    audit: dict[str, Any]


def parse_receipt(raw: bytes, *, what: str) -> Receipt:
    """Return the receipt in the contents of its file.

    Args:
        what: name of the file for messages.
    Raises:
        ManifestError: damaged, or not a receipt; the message names the field.
    """
    return parse_document(open_sealed(raw, what=what), Receipt, what=what)


def read_status(root: Path) -> Status:
    """Return the progress of the store at `root`, from any process that sees the folder.

    Raises:
        UnknownStoreError: there is no store. ManifestError: a receipt is damaged.
    """
    manifest = load_manifest(root)
    ledger = Ledger(root, plan_sha256=plan_digest(manifest))
    committed = tuple(shard for shard in ledger.committed() if shard < manifest.shards.count)
    audit, commits, rows = Audit(), [], 0
    for shard in committed:
        receipt = ledger.read(shard)
        if receipt is None:  # removed by `repair` since it was listed
            continue
        audit.merge(Audit.from_json(receipt.audit))
        size = len(shard_rows(manifest, shard))
        commits.append((ledger.path(shard).stat().st_mtime, size))
        rows += size
    rate = _rows_per_s(sorted(commits))
    left = manifest.rows - rows
    return Status(
        manifest=manifest,
        committed=committed,
        rows=rows,
        in_work=tuple(shard for shard in _lock_numbers(root) if _is_held(ledger, shard)),
        rows_per_s=rate,
        left_s=0.0 if left == 0 else None if rate is None else left / rate,
        audit=audit.summary(),
    )


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _rows_per_s(commits: list[tuple[float, int]]) -> float | None:
    # The start of the first shard is not recorded, so the clock runs from its commit on, and its rows do not count.
    if len(commits) < 2 or commits[-1][0] <= commits[0][0]:
        return None
    return sum(size for _, size in commits[1:]) / (commits[-1][0] - commits[0][0])


def _lock_numbers(root: Path) -> list[int]:
    folder = root / LOCK_FOLDER
    return sorted(int(path.stem) for path in folder.glob("*.lock") if path.stem.isdigit()) if folder.is_dir() else []


def _is_held(ledger: Ledger, shard: int) -> bool:
    try:
        with ledger.claim(shard):
            return False
    except ShardClaimedError:
        return True
