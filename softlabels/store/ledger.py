"""Ledger: receipts of the committed shards, claims that keep a second writer of a shard out, and a store's progress.

A shard exists when its receipt does. The receipt is written last, after every file of the shard is durable, so a crash
at any moment leaves either no shard or a whole one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

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
from softlabels.errors import ManifestError, ShardClaimedError, StoreLockedError
from softlabels.manifest import Manifest, StorePath
from softlabels.progress import duration
from softlabels.store.chunks import Count, Part, shard_rows, sums_path
from softlabels.store.safe_open import StoreRoot, safe_read
from softlabels.store.store_documents import RECEIPTS, load_listed_npy, load_manifest, npy_bytes, plan_digest
from softlabels.transfer_set import FingerprintSum

LEDGER_FOLDER = "ledger"
LOCK_FOLDER = "locks"
STAGING_FOLDER = "staging"
DAMAGED_FOLDER = "damaged"
"""Where `repair` moves what it removes from a store."""

CLAIM_TIMEOUT_S = 0.25
"""`status` and a starting writer hold each claim for a moment, to see whether it is free: they are waited for."""

LOCK_WAIT_S = 600.0
"""Longest wait for a store's lock: a holder has it for seconds, or for as long as it reads the ids of 10⁹ rows."""

_SILENT_WAIT_S = 2.0
_REPEATED_S = 30.0
"""A wait for the store's lock is reported after the first of these, then each time that the second has passed."""

_POLL_S = 0.01
_HOLDER_BYTES = 1024
_log = logging.getLogger(__name__)
_wait_s: ContextVar[float] = ContextVar("lock_wait_s", default=LOCK_WAIT_S)
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
        salt: what the stored sums of its rows are masked with, see `softlabels.row_sums.masks`; None in format
            version 1, which has no sums.
    """

    shard: Count
    plan_sha256: Sha256
    rows: tuple[Count, Count]
    files: dict[StorePath, FileRecord]
    parts: dict[str, Part]
    fingerprint: str
    audit: dict[str, Any]
    salt: Annotated[int, Meta(ge=0, lt=1 << 32)] | None = None

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
        manifest: the store's plan: receipts of another plan are refused. Or the manifest of the finished store: then,
            from format version 2 on, every receipt but those that it was published with is refused.
    """

    def __init__(self, root: StoreRoot, manifest: Manifest) -> None:
        self._root, self._manifest = root, manifest
        self.plan_sha256 = plan_digest(manifest)
        self._published: NDArray[np.uint8] | None = None

    def path_of(self, shard: int) -> str:
        """Return the path of a shard's receipt, relative to the store."""
        return f"{LEDGER_FOLDER}/{shard:08d}.json"

    def read(self, shard: int) -> Receipt | None:
        """Return the receipt of a shard, None where it is not committed.

        Raises:
            ManifestError: there is one, but it is damaged, belongs to another shard or plan, or to another run of it.
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
        sums, names = receipt.files.get(sums_path(shard)), self._manifest.row_sum_names
        expected = 4 * len(names) * len(shard_rows(self._manifest, shard)) if names else None
        # A receipt without sums would have a reader accept what an older format could not check.
        if (None if sums is None else sums.size) != expected or (receipt.salt is None) != (expected is None):
            raise ManifestError(f"{what} does not list the row sums of its format version: run `softlabels repair`")
        if receipt.sha256 != (self.published_sha256(shard) or receipt.sha256):
            raise ManifestError(
                f"{what} is not the one that the store was published with: the shard comes from another run of the "
                "job; run `softlabels repair`, which drops it, then `softlabels resume`"
            )
        return receipt

    def published_sha256(self, shard: int) -> str | None:
        """Return the digest of the receipt that a finished store was published with; None in format version 1."""
        if not self._manifest.finished or self._manifest.format_version < 2:
            return None
        if self._published is None:
            found = load_listed_npy(self._root, RECEIPTS, self._manifest)
            if found.dtype != np.uint8 or found.shape != (self._manifest.shards.count, hashlib.sha256().digest_size):
                raise ManifestError(f"{self._root / RECEIPTS} has not one digest a shard: run `softlabels repair`")
            self._published = found
        return bytes(self._published[shard]).hex()

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
        with self._lock(f"{shard:08d}") as lock:
            if not lock.acquire(CLAIM_TIMEOUT_S):
                raise ShardClaimedError(
                    f"another process is writing shard {shard} of {self._root} ({lock.holder()}): let it finish, or "
                    "end it and resume",
                    shard=shard,
                )
            yield

    def is_claimed(self, shard: int) -> bool:
        """Return whether a living process holds this shard."""
        with self._lock(f"{shard:08d}") as lock:
            return not lock.acquire(CLAIM_TIMEOUT_S, record=False)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock under which a store is created, finished or repaired; wait for it, see `lock_wait`.

        Lock order: this one first, then a shard's claim; the other way round two processes could wait for each other.

        Raises:
            StoreLockedError: another process still holds it after the wait.
        """
        began_s, longest_s, silent_s = time.monotonic(), _wait_s.get(), _SILENT_WAIT_S
        with self._lock("store") as lock:
            while not lock.acquire(min(silent_s, max(0.0, longest_s - (time.monotonic() - began_s)))):
                waited_s, silent_s = time.monotonic() - began_s, _REPEATED_S
                if waited_s >= longest_s:
                    raise StoreLockedError(
                        f"the lock of {self._root} is held by {lock.holder()}: let that process finish, or end it (one "
                        f"that is stopped keeps its locks), and run this again; waited {duration(waited_s)} (--wait)"
                    )
                _log.warning("waiting for the lock of %s, held by %s", self._root, lock.holder())
            yield

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[_Lock]:
        folder = self._root / LOCK_FOLDER
        make_folder(folder)
        # The file is never removed: a second process could then lock a new file of that name beside the old one.
        descriptor = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            yield _Lock(descriptor)
        finally:
            # This releases the lock, unless a child that was forked meanwhile still has its copy of the descriptor.
            os.close(descriptor)


@contextlib.contextmanager
def lock_wait(seconds: float | None) -> Iterator[None]:
    """Wait at most this long for a store's lock inside this context; as long as before when None."""
    before = _wait_s.set(_wait_s.get() if seconds is None else seconds)
    try:
        yield
    finally:
        _wait_s.reset(before)


class _Lock:
    """A lock on an open file, which also names its holder; what it names decides nothing."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def acquire(self, timeout_s: float, *, record: bool = True) -> bool:
        """Return whether the lock could be taken in this time, and record this process as its holder."""
        deadline_s = time.monotonic() + timeout_s
        # Polled, since a blocking flock knows no timeout.
        while not (held := _try_lock(self._descriptor)) and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        if held and record:
            holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}).encode()
            with contextlib.suppress(OSError):  # a full disk
                os.pwrite(self._descriptor, holder, 0)
                os.ftruncate(self._descriptor, len(holder))
        return held

    def holder(self) -> str:
        """Return process, host and age of the holder, for messages."""
        try:
            found = json.loads(os.pread(self._descriptor, _HOLDER_BYTES, 0))
            since = f"for {duration(time.time() - found['since'])}"
            return f"process {int(found['pid'])} on {str(found['host'])!r}, {since}"
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return "a process that did not record its number"


class LedgerSummary(NamedTuple):
    """What a manifest records of all receipts: their digests, transfer set's fingerprint, error sums."""

    digests: bytes
    fingerprint: str
    audit: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Digest over all receipts."""
        return hashlib.sha256(self.digests).hexdigest()


def summarize(receipts: Iterable[Receipt]) -> LedgerSummary:
    """Return the summary of a store's receipts, given in the order of their shards."""
    digests, fingerprint, audit = bytearray(), FingerprintSum(), Audit()
    for receipt in receipts:
        digests += bytes.fromhex(receipt.sha256)
        fingerprint.merge(FingerprintSum.from_hexdigest(receipt.fingerprint))
        # In the order of the shards: a floating-point sum depends on it, and `verify` requires the same audit exactly.
        audit.merge(Audit.from_json(receipt.audit))
    return LedgerSummary(bytes(digests), fingerprint.hexdigest(), audit.summary())


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


def receipts_file(summary: LedgerSummary) -> bytes:
    """Return the contents of `RECEIPTS`."""
    return npy_bytes(np.frombuffer(summary.digests, dtype=np.uint8).reshape(-1, hashlib.sha256().digest_size))


def parse_receipt(raw: bytes, *, what: str) -> Receipt:
    """Return the receipt in the contents of file `what`; raise ManifestError if it is damaged or not a receipt."""
    return parse_document(open_sealed(raw, what=what), Receipt, what=what)


def read_receipt(root: StoreRoot, path: str, *, what: str) -> Receipt:
    """Return the receipt in a file of the store; raise FileNotFoundError, ManifestError, which names `what`."""
    return parse_receipt(safe_read(root, path, max_bytes=MAX_DOCUMENT_BYTES), what=what)


def read_status(root: Path) -> Status:
    """Return the progress of the store at `root`, from any process that sees the folder.

    Raises:
        UnknownStoreError: there is no store. ManifestError: a receipt is damaged.
    """
    manifest = load_manifest(root)
    ledger = Ledger(root, manifest)
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
