"""Verification of a whole store: documents, receipts, metadata files, id index, and every shard."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from softlabels.documents import MAX_DOCUMENT_BYTES, canonical_json, open_sealed
from softlabels.errors import DamageError, ManifestError, UnknownStoreError
from softlabels.manifest import Manifest
from softlabels.progress import ShowProgress, silent
from softlabels.store.chunks import chunks_in, shard_rows
from softlabels.store.containers import container_of
from softlabels.store.ledger import DAMAGED_FOLDER, LEDGER_FOLDER, LOCK_FOLDER, STAGING_FOLDER, Ledger, summarize
from softlabels.store.safe_open import safe_open, safe_read
from softlabels.store.sample_index import POSITIONS, SORTED_IDS, DenseIdIndex, SortedIdIndex, make_index
from softlabels.store.shard_checks import Fault, Report, ShardChecks
from softlabels.store.store_documents import JOB, MANIFEST, PLAN, RECEIPTS, load_document, load_encoding

_REPLACED = (
    "the receipts are not those that the manifest was published with: a shard was replaced afterwards, which one is "
    "not known; restore the store from a copy, or compute it again in an empty folder"
)

_NOT_CONTENTS = (LOCK_FOLDER, STAGING_FOLDER, DAMAGED_FOLDER)


@dataclass(frozen=True, kw_only=True)
class StoreDocuments:
    """Plan and manifest of a store that may be damaged, None where they are invalid, and what is wrong with them.

    The plan is as stored, else as the manifest implies it.
    """

    plan: Manifest | None
    manifest: Manifest | None
    faults: tuple[Fault, ...]


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
        sample: check this many random chunks (all arrays of each) instead of all of them. Apart from these, only the
            SHA-256 of shard files and the sum of all fingerprints are left out.
        every_fault: continue after the first fault and list all. That a store is unfinished is one, listed last.
        seed: random seed for the choice of chunks.
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


def inspect_documents(root: Path) -> StoreDocuments:
    """Return the documents of the store at `root`, with their faults instead of an error for each.

    Raises:
        UnknownStoreError: it has neither plan nor manifest. FormatVersionError: a newer softlabels wrote them.
    """
    faults: list[Fault] = []
    plan, manifest = (_load_or_report(root, name, faults) for name in (PLAN, MANIFEST))
    if plan is None and manifest is None and not faults:
        raise UnknownStoreError(f"there is no store at {root}: it has neither {MANIFEST} nor {PLAN}", where=str(root))
    if manifest is not None and not manifest.finished:
        faults.append(_document_fault(MANIFEST, "it is a plan, not the manifest of a finished store"))
        manifest = None
    if plan is not None and plan.finished:
        faults.append(_document_fault(PLAN, "it is a manifest, not a plan"))
        plan = None
    if plan is None and manifest is not None:
        if not any(fault.path == PLAN for fault in faults):
            faults.append(_document_fault(PLAN, "it is missing: without it nothing can be added to the store"))
        plan = _plan_of(manifest)
    elif plan is not None and manifest is not None and manifest.plan_sha256 != plan.digest:
        implied = _plan_of(manifest)
        # The receipts decide which of the two came from another store: moving the wrong one out would lose every row.
        if implied is not None and _has_receipts(root, implied) and not _has_receipts(root, plan):
            faults.append(_document_fault(PLAN, f"it is not the plan of {MANIFEST} and the receipts: another store's"))
            plan = implied
        else:
            faults.append(_document_fault(MANIFEST, f"it belongs to another plan than {PLAN}: of another store"))
    try:
        open_sealed(safe_read(root, JOB, max_bytes=MAX_DOCUMENT_BYTES), what=JOB)
    except FileNotFoundError:
        pass  # a store that was not written by a job has none
    except (ManifestError, OSError) as error:
        faults.append(_document_fault(JOB, f"{error}; only `softlabels resume` needs it"))
    return StoreDocuments(plan=plan, manifest=manifest, faults=tuple(faults))


def find_faults(
    root: Path, report: Report, *, sample: int | None = None, seed: int | None = None, show: ShowProgress = silent
) -> Iterator[Fault]:
    """Yield every fault of a store, cheap checks first, and count in `report` what was verified; see `verify`."""
    documents = inspect_documents(root)
    yield from documents.faults
    plan, manifest = documents.plan, documents.manifest
    if plan is None:
        return
    report.finished, report.shards = manifest is not None, plan.shards.count
    metadata_faults = list(_metadata_faults(root, manifest or plan, planned=set(plan.metadata_sha256)))
    damaged = {fault.path for fault in metadata_faults}
    # Without the digests of the single receipts, `_ledger_faults` compares the digest over all of them.
    ledger = Ledger(root, plan if manifest is None or RECEIPTS in damaged else manifest)
    index, index_faults = _index(root, manifest, plan, damaged)
    encoding = None
    # Damaged files of the encoding are reported above, by their SHA-256.
    with contextlib.suppress(ManifestError):
        encoding = load_encoding(root, plan)
    checks = ShardChecks(root, plan, encoding, index=index, report=report)
    valid, receipt_faults = _valid_receipts(ledger, plan, checks)
    report.committed = len(valid)
    yield from receipt_faults
    if manifest is not None:
        yield from _ledger_faults(root, ledger, manifest, plan, valid, damaged, clean=not receipt_faults)
    yield from metadata_faults
    yield from index_faults
    if manifest is not None:
        yield from _stray_files(root, manifest, ledger, valid)
    yield from _shard_faults(ledger, plan, checks, valid, sample=sample, seed=seed, show=show)
    if manifest is None:
        yield from _unfinished(documents, plan, valid)


def _has_receipts(root: Path, plan: Manifest) -> bool:
    """Return whether a shard was committed under this plan."""
    ledger = Ledger(root, plan)
    for shard in ledger.committed():
        with contextlib.suppress(ManifestError, OSError):
            if ledger.read(shard) is not None:
                return True
    return False


def _valid_receipts(ledger: Ledger, plan: Manifest, checks: ShardChecks) -> tuple[list[int], list[Fault]]:
    """Return the committed shards with a valid receipt, and the faults of the others."""
    valid, faults = [], []
    for shard in ledger.committed():
        if shard >= plan.shards.count:
            continue  # a stray file
        try:
            receipt = ledger.read(shard)
            fault = None if receipt is None else checks.receipt_fault(receipt)
        except (ManifestError, OSError) as error:
            fault = checks.fault("document", str(error), shard, path=ledger.path_of(shard))
            receipt = None
        if fault is not None:
            faults.append(fault)
        elif receipt is not None:
            valid.append(shard)
    return valid, faults


def _are_published(root: Path, ledger: Ledger, manifest: Manifest, valid: list[int]) -> bool:
    """Return whether these receipts are those that the store was published with, though the table of them is damaged.

    The manifest has a digest over the whole table, so what is left of the table for the other shards must fit as well.
    """
    size = hashlib.sha256().digest_size
    try:
        raw = safe_read(root, RECEIPTS, max_bytes=MAX_DOCUMENT_BYTES + manifest.shards.count * size)
    except (DamageError, OSError):
        return False
    table = bytearray(raw[-manifest.shards.count * size :])
    for receipt in ledger.receipts(valid):
        table[receipt.shard * size : (receipt.shard + 1) * size] = bytes.fromhex(receipt.sha256)
    return hashlib.sha256(table).hexdigest() == manifest.ledger


def _ledger_faults(
    root: Path,
    ledger: Ledger,
    manifest: Manifest,
    plan: Manifest,
    valid: list[int],
    damaged: set[str | None],
    *,
    clean: bool,
) -> Iterator[Fault]:
    """Yield where the receipts, each of them valid, are not those that the manifest was made from."""
    missing = sorted(set(range(plan.shards.count)) - set(valid))
    if missing:
        message = "its receipt is missing from a finished store: its rows cannot be read"
        for shard in missing if clean else ():
            yield Fault(kind="missing", message=message, shard=shard, path=ledger.path_of(shard))
        if manifest.format_version >= 2 and RECEIPTS in damaged and not _are_published(root, ledger, manifest, valid):
            yield _document_fault(LEDGER_FOLDER, _REPLACED)
        return
    summary = summarize(ledger.receipts(valid))
    if summary.sha256 != manifest.ledger:
        yield _document_fault(LEDGER_FOLDER, _REPLACED)
    if manifest.transfer_set.fingerprint != (plan.transfer_set.fingerprint or summary.fingerprint):
        yield _document_fault(MANIFEST, "the transfer set's fingerprint is not the receipts' sum")
    if canonical_json(manifest.audit) != canonical_json(summary.audit):
        yield _document_fault(MANIFEST, "the audit is not what the receipts add up to")


def _metadata_faults(root: Path, manifest: Manifest, *, planned: set[str]) -> Iterator[Fault]:
    for path, expected in manifest.metadata_sha256.items():
        remedy = f"`softlabels {'resume' if path in planned else 'repair'}` writes it again"
        try:
            with os.fdopen(safe_open(root, path), "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except (ManifestError, OSError) as error:
            yield Fault(kind="missing", message=f"it cannot be read ({error}); {remedy}", path=path)
            continue
        if digest != expected:
            yield Fault(kind="checksum", message=f"its SHA-256 is not the manifest's; {remedy}", path=path)


def _index(
    root: Path, manifest: Manifest | None, plan: Manifest, damaged: set[str | None]
) -> tuple[DenseIdIndex | SortedIdIndex | None, list[Fault]]:
    """Return the id index and its faults; None where there is none yet, or its files are damaged."""
    unwritten = plan.ids.dense_start is None and manifest is None and plan.layout.kind != "sequences"
    if unwritten or {SORTED_IDS, POSITIONS} & damaged:
        return None, []
    try:
        index = make_index(root, manifest or plan)
    except ManifestError as error:
        return None, [Fault(kind="document", message=str(error))]
    if isinstance(index, SortedIdIndex) and not index.is_strictly_ascending():
        message = "the ids of the index are not strictly ascending: an id is repeated"
        return index, [Fault(kind="contents", message=message)]
    return index, []


def _stray_files(root: Path, manifest: Manifest, ledger: Ledger, valid: list[int]) -> Iterator[Fault]:
    """Yield files in the store's folders that neither manifest nor receipts list; its top level is the user's."""
    if len(valid) < manifest.shards.count:
        return  # the files of the other shards are not known; `repair` drops these shards, `resume` writes them again
    known = {PLAN, MANIFEST, JOB, *manifest.metadata_sha256, *map(ledger.path_of, valid)}
    known |= {path for receipt in ledger.receipts(valid) for path in receipt.files}
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
            yield from checks.faults(receipt, chosen[receipt.shard])
            progress.advance(len(chosen[receipt.shard]))


def _choose(plan: Manifest, valid: list[int], sample: int, seed: int | None) -> dict[int, list[int]]:
    """Return random chunks without repetition: numbers within their shard, by shard, both in order."""
    counts = [chunks_in(len(shard_rows(plan, shard)), plan.shards.rows_per_chunk) for shard in valid]
    ends = np.cumsum(counts, dtype=np.int64)
    total = sum(counts)
    if not total:
        return {}
    picked = np.sort(np.random.default_rng(seed).choice(total, size=min(sample, total), replace=False))
    chosen: dict[int, list[int]] = {}
    for number in picked.tolist():
        slot = int(np.searchsorted(ends, number, side="right"))
        chosen.setdefault(valid[slot], []).append(number - int(ends[slot]) + counts[slot])
    return chosen


def _unfinished(documents: StoreDocuments, plan: Manifest, valid: list[int]) -> Iterator[Fault]:
    missing = sorted(set(range(plan.shards.count)) - set(valid))
    if missing:
        shown = ", ".join(map(str, missing[:10])) + (" …" if len(missing) > 10 else "")
        message = f"{len(missing)} of {plan.shards.count} shards are not committed ({shown}): run `softlabels resume`"
        yield Fault(kind="unfinished", message=message)
    elif not any(fault.path == MANIFEST for fault in documents.faults):
        message = "every shard is committed but the manifest is not published: run `softlabels resume`"
        yield Fault(kind="unfinished", message=message)


def _load_or_report(root: Path, name: str, faults: list[Fault]) -> Manifest | None:
    try:
        return load_document(root, name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ManifestError, OSError) as error:
        faults.append(_document_fault(name, str(error)))
        return None


def _plan_of(manifest: Manifest) -> Manifest | None:
    """Return the plan that a manifest was made from; None where no guess has its digest."""
    written_later = {*container_of(manifest).metadata(manifest), RECEIPTS}
    before = {path: digest for path, digest in manifest.metadata_sha256.items() if path not in written_later}
    without_index = {path: digest for path, digest in before.items() if path not in (SORTED_IDS, POSITIONS)}
    # Sequences know fingerprint and index before the first shard, other layouts after the last: try both.
    for fingerprint in (None, manifest.transfer_set.fingerprint):
        for metadata in (without_index, before):
            plan = replace(
                manifest,
                ledger=None,
                audit=None,
                plan_sha256=None,
                metadata_sha256=metadata,
                transfer_set=replace(manifest.transfer_set, fingerprint=fingerprint),
            )
            if plan.digest == manifest.plan_sha256:
                return plan
    return None


def _document_fault(name: str, message: str) -> Fault:
    return Fault(kind="document", path=name, message=message)
