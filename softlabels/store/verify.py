"""Is a store what was written, whole, and does it make sense? Every checksum, every row, every file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from softlabels.audit import Audit
from softlabels.documents import canonical_json
from softlabels.encodings import Encoding
from softlabels.errors import ManifestError
from softlabels.manifest import Manifest
from softlabels.store.containers import container_of
from softlabels.store.encoding_files import load_encoding
from softlabels.store.ledger import DAMAGED_FOLDER, LEDGER_FOLDER, LOCK_FOLDER, STAGING_FOLDER, Ledger, Receipt
from softlabels.store.safe_open import safe_open
from softlabels.store.sample_index import POSITIONS, SORTED_IDS, DenseIdIndex, SortedIdIndex, make_index
from softlabels.store.shard_checks import ShardChecks
from softlabels.store.store_documents import JOB, MANIFEST, PLAN, StoreDocuments, inspect_documents
from softlabels.store.verify_report import Fault, Report, ShowProgress, silent
from softlabels.transfer_set import FingerprintSum

_NOT_DATA = (LOCK_FOLDER, STAGING_FOLDER, DAMAGED_FOLDER)


def verify(
    root: Path,
    *,
    sample: int | None = None,
    every_fault: bool = False,
    seed: int | None = None,
    show: ShowProgress = silent,
) -> Report:
    """Check a store against its own checksums, its receipts and its plan.

    Plan, manifest, receipts, metadata files and id index are checked whole, then the shards: every file's size and
    SHA-256, every chunk's checksum, and whether the rows make sense (finite, shifted, labels and ids as planned).

    Args:
        root: the store's folder.
        sample: check this many random chunks (all arrays of each) instead of all of them; nothing else is left out but
            the SHA-256 of shard files and the sum of all fingerprints.
        every_fault: go on after the first fault and list all.
        seed: of the choice of chunks.
        show: how progress is shown.
    Returns:
        The report; `report.sound` where nothing is wrong. An unfinished store is a fault of its own, the last listed.
    Raises:
        UnknownStoreError: there is no store. FormatVersionError: a newer softlabels wrote it.
    """
    root = Path(root)
    report = Report(root=str(root))
    for fault in find_faults(root, report, sample=sample, seed=seed, show=show):
        report.faults.append(fault)
        if not every_fault:
            break
    return report


def find_faults(
    root: Path, report: Report, *, sample: int | None = None, seed: int | None = None, show: ShowProgress = silent
) -> Iterator[Fault]:
    """Every fault of a store, one by one, cheap checks first; see `verify`. The report's counters go up on the way."""
    documents = inspect_documents(root)
    yield from documents.faults
    plan = documents.plan
    if plan is None:
        return
    report.finished, report.shards = documents.manifest is not None, plan.shards.count
    ledger = Ledger(root, plan_sha256=plan.digest)
    numbers = [number for number in ledger.committed() if number < plan.shards.count]
    metadata_faults = list(_metadata_faults(root, documents.manifest or plan, planned=set(plan.metadata_sha256)))
    index, index_faults = _index(root, documents, {fault.path for fault in metadata_faults})
    container = container_of(plan)
    checks = ShardChecks(root, plan, container, _encoding(root, plan), index=index, report=report)
    believed, receipt_faults = _believed(ledger, plan, numbers, checks)
    report.committed = len(believed)
    yield from receipt_faults
    if documents.manifest is not None:
        yield from _ledger_faults(ledger, documents.manifest, plan, believed, clean=not receipt_faults)
    yield from metadata_faults
    yield from index_faults
    if documents.manifest is not None:
        yield from _strays(root, documents.manifest, ledger, believed)
    yield from _shard_faults(ledger, plan, checks, believed, sample=sample, seed=seed, show=show)
    yield from _unfinished(documents, plan, believed)


def _believed(ledger: Ledger, plan: Manifest, numbers: list[int], checks: ShardChecks) -> tuple[list[int], list[Fault]]:
    """The committed shards whose receipts can be believed, and what is wrong with the others."""
    believed, faults = [], []
    for shard in numbers:
        path = f"{LEDGER_FOLDER}/{ledger.path(shard).name}"
        try:
            receipt = ledger.read(shard)
        except (ManifestError, OSError) as error:
            faults.append(checks.fault("document", str(error), shard, path=path))
            continue
        fault = None if receipt is None else checks.receipt_fault(receipt)
        if fault is not None:
            faults.append(fault)
        elif receipt is not None:
            believed.append(shard)
    return believed, faults


def _ledger_faults(
    ledger: Ledger, manifest: Manifest, plan: Manifest, believed: list[int], *, clean: bool
) -> Iterator[Fault]:
    """Where the receipts, all of them sound by themselves, are not those that the manifest was made from."""
    missing = sorted(set(range(plan.shards.count)) - set(believed))
    if missing and clean:
        for shard in missing:
            path = f"{LEDGER_FOLDER}/{ledger.path(shard).name}"
            message = "its receipt is gone from a finished store: its rows cannot be served"
            yield Fault(kind="missing", message=message, shard=shard, path=path)
    if missing:
        return
    total, fingerprint, audit = hashlib.sha256(), FingerprintSum(), Audit()
    for receipt in _receipts(ledger, believed):
        total.update(bytes.fromhex(receipt.sha256))
        fingerprint.merge(FingerprintSum.from_hexdigest(receipt.fingerprint))
        audit.merge(Audit.from_json(receipt.audit))
    if total.hexdigest() != manifest.ledger:
        message = "the receipts are not those that the manifest was published with: a shard was replaced afterwards"
        yield Fault(kind="document", message=message, path=MANIFEST)
    known = plan.transfer_set.fingerprint
    if manifest.transfer_set.fingerprint != (known or fingerprint.hexdigest()):
        yield Fault(kind="document", message="the transfer set's fingerprint is not the receipts' sum", path=MANIFEST)
    if canonical_json(manifest.audit) != canonical_json(audit.summary()):
        yield Fault(kind="document", message="the audit is not what the receipts add up to", path=MANIFEST)


def _receipts(ledger: Ledger, shards: list[int]) -> Iterator[Receipt]:
    for shard in shards:
        receipt = ledger.read(shard)
        if receipt is not None:
            yield receipt


def _metadata_faults(root: Path, manifest: Manifest, *, planned: set[str]) -> Iterator[Fault]:
    for path, expected in manifest.metadata_sha256.items():
        mend = f"`softlabels {'resume' if path in planned else 'repair'}` writes it again"
        try:
            with os.fdopen(safe_open(root, path), "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except (FileNotFoundError, ManifestError, OSError) as error:
            yield Fault(kind="missing", message=f"it cannot be read ({error}); {mend}", path=path)
            continue
        if digest != expected:
            yield Fault(kind="checksum", message=f"its SHA-256 is not the manifest's; {mend}", path=path)


def _index(
    root: Path, documents: StoreDocuments, wrong: set[str | None]
) -> tuple[DenseIdIndex | SortedIdIndex | None, list[Fault]]:
    """The id index, where there should be one and its files are not among those that are wrong."""
    known = documents.manifest or documents.plan
    assert known is not None
    if {SORTED_IDS, POSITIONS} & wrong:
        return None, []
    if known.ids.dense_start is None and documents.manifest is None and known.layout.kind != "sequences":
        return None, []
    try:
        index = make_index(root, known)
    except ManifestError as error:
        return None, [Fault(kind="document", message=str(error))]
    faults = []
    if isinstance(index, SortedIdIndex) and not index.is_strictly_ascending():
        faults.append(Fault(kind="contents", message="the ids of the index do not ascend: an id stands twice"))
    return index, faults


def _encoding(root: Path, plan: Manifest) -> Encoding | None:
    """How rows decode; None where what that takes is lost, which is told by its SHA-256."""
    try:
        return load_encoding(root, plan)
    except ManifestError:
        return None


def _strays(root: Path, manifest: Manifest, ledger: Ledger, believed: list[int]) -> Iterator[Fault]:
    """Files inside the store's own folders that neither manifest nor receipts know; the store's root is the user's."""
    known = set(manifest.metadata_sha256) | {PLAN, MANIFEST, JOB}
    known |= {f"{LEDGER_FOLDER}/{ledger.path(shard).name}" for shard in range(manifest.shards.count)}
    for receipt in _receipts(ledger, believed):
        known |= set(receipt.files)
    if len(believed) < manifest.shards.count:
        return  # whose files are known to nobody any more; `repair` drops the shard, and its files are written anew
    for folder, folders, names in os.walk(root):
        inner = os.path.relpath(folder, root)
        if inner == ".":
            folders[:] = sorted(name for name in folders if name not in _NOT_DATA)
            continue
        folders.sort()
        for name in sorted(names):
            path = f"{inner}/{name}"
            if path not in known:
                yield Fault(kind="stray", message="nobody vouches for this file", path=path)


def _shard_faults(
    ledger: Ledger,
    plan: Manifest,
    checks: ShardChecks,
    believed: list[int],
    *,
    sample: int | None,
    seed: int | None,
    show: ShowProgress,
) -> Iterator[Fault]:
    if sample is None:
        with show(plan.rows, f"verify {plan.name}", "rows") as progress:
            for receipt in _receipts(ledger, believed):
                yield from checks.faults(receipt)
                progress.advance(receipt.rows[1] - receipt.rows[0])
        return
    chosen = _choose(plan, believed, sample, seed)
    with show(sum(map(len, chosen.values())), f"verify {plan.name}", "chunks") as progress:
        for receipt in _receipts(ledger, sorted(chosen)):
            yield from checks.sampled_faults(receipt, chosen[receipt.shard])
            progress.advance(len(chosen[receipt.shard]))


def _choose(plan: Manifest, believed: list[int], sample: int, seed: int | None) -> dict[int, list[int]]:
    """Random chunks, by shard."""
    per_shard = plan.shards.rows_per_shard // plan.shards.rows_per_chunk
    last_rows = plan.rows - (plan.shards.count - 1) * plan.shards.rows_per_shard
    counts = np.array(
        [-(-last_rows // plan.shards.rows_per_chunk) if s == plan.shards.count - 1 else per_shard for s in believed],
        dtype=np.int64,
    )
    total = int(counts.sum())
    rng = np.random.default_rng(seed)
    picked = np.sort(rng.choice(total, size=min(sample, total), replace=False)) if total else np.empty(0, np.int64)
    ends = np.cumsum(counts)
    chosen: dict[int, list[int]] = {}
    for number in picked.tolist():
        slot = int(np.searchsorted(ends, number, side="right"))
        chosen.setdefault(believed[slot], []).append(number - int(ends[slot] - counts[slot]))
    return chosen


def _unfinished(documents: StoreDocuments, plan: Manifest, believed: list[int]) -> Iterator[Fault]:
    if documents.manifest is not None:
        return
    missing = sorted(set(range(plan.shards.count)) - set(believed))
    if missing:
        shown = ", ".join(map(str, missing[:10])) + (" …" if len(missing) > 10 else "")
        message = f"{len(missing)} of {plan.shards.count} shards are not committed ({shown}): run `softlabels resume`"
        yield Fault(kind="unfinished", message=message)
    elif not any(fault.path == MANIFEST for fault in documents.faults):
        message = "every shard is committed but the manifest is not published: run `softlabels resume`"
        yield Fault(kind="unfinished", message=message)
