"""Ledger: receipts of the committed shards, claims that keep a second writer of a shard out, and a store's progress.

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
from typing import Any, NamedTuple

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
from softlabels.transfer_set import FingerprintSum

LEDGER_FOLDER = "ledger"
LOCK_FOLDER = "locks"
STAGING_FOLDER = "staging"
DAMAGED_FOLDER = "damaged"
"""Where `repair` moves what it removes from a store."""

CLAIM_TIMEOUT_S = 0.25
"""`status` and a starting writer hold each claim for a moment, to see whether it is free: they are waited for."""

_POLL_S = 0.01
# Eight digits are enough for MAX_SHARDS, 2^24.
_RECEIPT_NAME = re.compile(r"[0-9]{8}\.json")


class FileRecord(Document, frozen=True):
    """A committed file: size in bytes and SHA-256."""

    size: Count
    sha256: Sha256


class Receipt(Document, frozen=True):
    """Record of a committed shard. A shard without a receipt does not exist, whatever files are there.

    Attributes:
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
    """The receipts of the store at `root`; receipts of another plan than `plan_sha256` are refused."""

    def __init__(self, root: Path, *, plan_sha256: str) -> None:
        self._root = root
        self.plan_sha256 = plan_sha256

    def path_of(self, shard: int) -> str:
        """Return the path of a shard's receipt, relative to the store."""
        return f"{LEDGER_FOLDER}/{shard:08d}.json"

    def read(self, shard: int) -> Receipt | None:
        """Return the receipt of a shard, None where it is not committed.

        Raises:
            ManifestError: there is one, but it is damaged, or belongs to another shard or plan.
        """
        path = self.path_of(shard)
        what = f"receipt {self._root / path}"
        try:
            receipt = read_receipt(self._root, path, what=what)
        # Only a file that does not exist means "not committed": any other I/O error is raised.
        except FileNotFoundError:
            return None
        if receipt.shard != shard or receipt.plan_sha256 != self.plan_sha256:
            raise ManifestError(f"{what} belongs to another shard or another store: do not mix stores' files")
        return receipt

    def receipts(self, shards: Iterable[int]) -> Iterator[Receipt]:
        """Yield the receipts of the committed ones of these shards, one at a time, since many take much memory."""
        return (receipt for shard in shards if (receipt := self.read(shard)) is not None)

    def committed(self) -> list[int]:
        """Return the numbers of the shards that have a receipt, in order."""
        folder = self._root / LEDGER_FOLDER
        names = os.listdir(folder) if folder.is_dir() else []
        # By name alone: a shard whose receipt is damaged is listed too, and `read` raises for it.
        return sorted(int(name[:8]) for name in names if _RECEIPT_NAME.fullmatch(name))

    def staging(self, shard: int, path: str) -> Path:
        """Return where a file of a shard is written before it is renamed; removed later if its writer dies."""
        return self._root / STAGING_FOLDER / f"{shard:08d}.{path.replace('/', '-')}{TEMPORARY}"

    def write(self, receipt: Receipt) -> None:
        """Commit a shard: from now on its rows exist. The caller holds the claim, and its files are durable."""
        path, staging = self._root / self.path_of(receipt.shard), self.staging(receipt.shard, "receipt")
        write_atomically(path, [seal(as_json(receipt))], staging=staging)

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
                    f"another process is writing shard {shard} of {self._root}: let it finish, or stop it and resume",
                    shard=shard,
                )
            yield

    def is_claimed(self, shard: int) -> bool:
        """Return whether a living process holds this shard."""
        with self._lock(f"{shard:08d}", timeout_s=CLAIM_TIMEOUT_S) as held:
            return not held

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
            # Polled, since a blocking flock knows no timeout.
            while not (held := _try_lock(descriptor)) and time.monotonic() < deadline_s:
                time.sleep(_POLL_S)
            yield held
        finally:
            # This releases the lock, unless a child that was forked meanwhile still has its copy of the descriptor.
            os.close(descriptor)


class LedgerSummary(NamedTuple):
    """What a manifest records of all receipts: digest over them in order, transfer set's fingerprint, error sums."""

    shards: int
    sha256: str
    fingerprint: str
    audit: dict[str, Any]


def summarize(receipts: Iterable[Receipt]) -> LedgerSummary:
    """Return the summary of a store's receipts, given in the order of their shards."""
    shards, digest, fingerprint, audit = 0, hashlib.sha256(), FingerprintSum(), Audit()
    for receipt in receipts:
        shards += 1
        digest.update(bytes.fromhex(receipt.sha256))
        fingerprint.merge(FingerprintSum.from_hexdigest(receipt.fingerprint))
        # In the order of the shards: a floating-point sum depends on it, and `verify` requires the same audit exactly.
        audit.merge(Audit.from_json(receipt.audit))
    return LedgerSummary(shards, digest.hexdigest(), fingerprint.hexdigest(), audit.summary())


@dataclass(frozen=True, kw_only=True)
class Status:
    """Progress of a store.

    Attributes:
        manifest: manifest of the finished store, else its plan.
        rows: number of rows in the committed shards.
        in_work: shards that a living process holds.
        rows_per_s: rate between the first and the last commit; None before the second commit.
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


def read_receipt(root: Path, path: str, *, what: str) -> Receipt:
    """Return the receipt in a file; raise FileNotFoundError, ManifestError, which says that `what` is damaged."""
    return parse_document(
        open_sealed(safe_read(root, path, max_bytes=MAX_DOCUMENT_BYTES), what=what), Receipt, what=what
    )


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
        # A receipt is written once, so its modification time is the time of the commit.
        commits.append(((root / ledger.path_of(shard)).stat().st_mtime, size))
        rows += size
    commits.sort()
    # The start of the first shard is not recorded, so the clock runs from its commit on, and its rows do not count.
    elapsed_s = commits[-1][0] - commits[0][0] if commits else 0.0
    rate = sum(size for _, size in commits[1:]) / elapsed_s if elapsed_s > 0 else None
    left = manifest.rows - rows
    locks = sorted(int(path.stem) for path in (root / LOCK_FOLDER).glob("*.lock") if path.stem.isdigit())
    return Status(
        manifest=manifest,
        committed=committed,
        rows=rows,
        in_work=tuple(shard for shard in locks if ledger.is_claimed(shard)),
        rows_per_s=rate,
        left_s=0.0 if left == 0 else None if rate is None else left / rate,
        audit=audit.summary(),
    )


def _try_lock(descriptor: int) -> bool:
    # flock, which the kernel releases when a process dies, and not fcntl locks, which closing any descriptor of the
    # file would release.
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
