"""Verification of a whole store: documents, receipts, metadata files, id index, and every shard."""

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
from softlabels.store.ledger import DAMAGED_FOLDER, LEDGER_FOLDER, LOCK_FOLDER, STAGING_FOLDER, Ledger
from softlabels.store.safe_open import safe_open
from softlabels.store.sample_index import POSITIONS, SORTED_IDS, DenseIdIndex, SortedIdIndex, make_index
from softlabels.store.shard_checks import ShardChecks
from softlabels.store.store_documents import JOB, MANIFEST, PLAN, StoreDocuments, inspect_documents, load_encoding
from softlabels.store.verify_report import Fault, Report, ShowProgress, silent
from softlabels.transfer_set import FingerprintSum

_NOT_CONTENTS = (LOCK_FOLDER, STAGING_FOLDER, DAMAGED_FOLDER)


def verify(
    root: Path,
    *,
    sample: int | None = None,
    every_fault: bool = False,
    seed: int | None = None,
    show: ShowProgress = silent,
) -> Report:
    """Check a store against its own checksums, its receipts and its plan.

    Plan, manifest, receipts, metadata files and id index are checked first, then the shards: size and SHA-256 of every
    file, checksum of every chunk, and values of the rows (finite, largest logit 0, labels and ids as planned).

    Args:
        root: the store's folder.
        sample: check this many random chunks (all arrays of each) instead of all of them. Apart from these, only the
            SHA-256 of shard files and the sum of all fingerprints are left out.
        every_fault: continue after the first fault and list all.
        seed: random seed for the choice of chunks.
        show: progress display.
    Returns:
        The report; `report.sound` where nothing is wrong. An unfinished store is a fault of its own, listed last.
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
    """Yield every fault of a store, cheap checks first, and count in `report` what was verified; see `verify`."""
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
    valid, receipt_faults = _valid_receipts(ledger, plan, numbers, checks)
    report.committed = len(valid)
    yield from receipt_faults
    if documents.manifest is not None:
        yield from _ledger_faults(ledger, documents.manifest, plan, valid, clean=not receipt_faults)
    yield from metadata_faults
    yield from index_faults
    if documents.manifest is not None:
        yield from _stray_files(root, documents.manifest, ledger, valid)
    yield from _shard_faults(ledger, plan, checks, valid, sample=sample, seed=seed, show=show)
    yield from _unfinished(documents, plan, valid)


def _valid_receipts(
    ledger: Ledger, plan: Manifest, numbers: list[int], checks: ShardChecks
) -> tuple[list[int], list[Fault]]:
    """Return the committed shards with a valid receipt, and the faults of the others."""
    valid, faults = [], []
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
            valid.append(shard)
    return valid, faults


def _ledger_faults(
    ledger: Ledger, manifest: Manifest, plan: Manifest, valid: list[int], *, clean: bool
) -> Iterator[Fault]:
    """Yield where the receipts, each of them valid, are not those that the manifest was made from."""
    missing = sorted(set(range(plan.shards.count)) - set(valid))
    if missing and clean:
        for shard in missing:
            path = f"{LEDGER_FOLDER}/{ledger.path(shard).name}"
            message = "its receipt is missing from a finished store: its rows cannot be read"
            yield Fault(kind="missing", message=message, shard=shard, path=path)
    if missing:
        return
    total, fingerprint, audit = hashlib.sha256(), FingerprintSum(), Audit()
    for receipt in ledger.receipts(valid):
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


def _metadata_faults(root: Path, manifest: Manifest, *, planned: set[str]) -> Iterator[Fault]:
    for path, expected in manifest.metadata_sha256.items():
        remedy = f"`softlabels {'resume' if path in planned else 'repair'}` writes it again"
        try:
            with os.fdopen(safe_open(root, path), "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except (FileNotFoundError, ManifestError, OSError) as error:
            yield Fault(kind="missing", message=f"it cannot be read ({error}); {remedy}", path=path)
            continue
        if digest != expected:
            yield Fault(kind="checksum", message=f"its SHA-256 is not the manifest's; {remedy}", path=path)


def _index(
    root: Path, documents: StoreDocuments, damaged: set[str | None]
) -> tuple[DenseIdIndex | SortedIdIndex | None, list[Fault]]:
    """Return the id index and its faults; None where there is none yet, or its files are damaged."""
    known = documents.manifest or documents.plan
    assert known is not None
    if {SORTED_IDS, POSITIONS} & damaged:
        return None, []
    if known.ids.dense_start is None and documents.manifest is None and known.layout.kind != "sequences":
        return None, []
    try:
        index = make_index(root, known)
    except ManifestError as error:
        return None, [Fault(kind="document", message=str(error))]
    faults = []
    if isinstance(index, SortedIdIndex) and not index.is_strictly_ascending():
        faults.append(
            Fault(kind="contents", message="the ids of the index are not strictly ascending: an id is repeated")
        )
    return index, faults


def _encoding(root: Path, plan: Manifest) -> Encoding | None:
    """Return the encoding of the rows; None where its files are damaged, which their SHA-256 reports."""
    try:
        return load_encoding(root, plan)
    except ManifestError:
        return None


def _stray_files(root: Path, manifest: Manifest, ledger: Ledger, valid: list[int]) -> Iterator[Fault]:
    """Yield files inside the store's folders that neither manifest nor receipts list; its root is the user's."""
    known = set(manifest.metadata_sha256) | {PLAN, MANIFEST, JOB}
    known |= {f"{LEDGER_FOLDER}/{ledger.path(shard).name}" for shard in range(manifest.shards.count)}
    for receipt in ledger.receipts(valid):
        known |= set(receipt.files)
    if len(valid) < manifest.shards.count:
        return  # the files of the other shards are not known; `repair` drops these shards, `resume` writes them again
    for folder, folders, names in os.walk(root):
        inner = os.path.relpath(folder, root)
        if inner == ".":
            folders[:] = sorted(name for name in folders if name not in _NOT_CONTENTS)
            continue
        folders.sort()
        for name in sorted(names):
            path = f"{inner}/{name}"
            if path not in known:
                yield Fault(kind="stray", message="neither the manifest nor a receipt lists this file", path=path)


def _shard_faults(
    ledger: Ledger,
    plan: Manifest,
    checks: ShardChecks,
    valid: list[int],
    *,
    sample: int | None,
    seed: int | None,
    show: ShowProgress,
) -> Iterator[Fault]:
    if sample is None:
        with show(plan.rows, f"verify {plan.name}", "rows") as progress:
            for receipt in ledger.receipts(valid):
                yield from checks.faults(receipt)
                progress.advance(receipt.rows[1] - receipt.rows[0])
        return
    chosen = _choose(plan, valid, sample, seed)
    with show(sum(map(len, chosen.values())), f"verify {plan.name}", "chunks") as progress:
        for receipt in ledger.receipts(sorted(chosen)):
            yield from checks.sampled_faults(receipt, chosen[receipt.shard])
            progress.advance(len(chosen[receipt.shard]))


def _choose(plan: Manifest, valid: list[int], sample: int, seed: int | None) -> dict[int, list[int]]:
    """Return random chunks, by shard."""
    per_shard = plan.shards.rows_per_shard // plan.shards.rows_per_chunk
    last_rows = plan.rows - (plan.shards.count - 1) * plan.shards.rows_per_shard
    counts = np.array(
        [-(-last_rows // plan.shards.rows_per_chunk) if s == plan.shards.count - 1 else per_shard for s in valid],
        dtype=np.int64,
    )
    total = int(counts.sum())
    rng = np.random.default_rng(seed)
    picked = np.sort(rng.choice(total, size=min(sample, total), replace=False)) if total else np.empty(0, np.int64)
    ends = np.cumsum(counts)
    chosen: dict[int, list[int]] = {}
    for number in picked.tolist():
        slot = int(np.searchsorted(ends, number, side="right"))
        chosen.setdefault(valid[slot], []).append(number - int(ends[slot] - counts[slot]))
    return chosen


def _unfinished(documents: StoreDocuments, plan: Manifest, valid: list[int]) -> Iterator[Fault]:
    if documents.manifest is not None:
        return
    missing = sorted(set(range(plan.shards.count)) - set(valid))
    if missing:
        shown = ", ".join(map(str, missing[:10])) + (" …" if len(missing) > 10 else "")
        message = f"{len(missing)} of {plan.shards.count} shards are not committed ({shown}): run `softlabels resume`"
        yield Fault(kind="unfinished", message=message)
    elif not any(fault.path == MANIFEST for fault in documents.faults):
        message = "every shard is committed but the manifest is not published: run `softlabels resume`"
        yield Fault(kind="unfinished", message=message)
