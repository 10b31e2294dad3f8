"""Repair: damaged shards and files are moved out of a store, so that `resume` computes just these again."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from softlabels.atomic_files import make_folder, purge, sync_folder, write_atomically
from softlabels.documents import seal
from softlabels.errors import DamageError, RowsNotCommittedError, ShardClaimedError
from softlabels.manifest import Manifest
from softlabels.progress import ShowProgress, silent
from softlabels.store.chunks import masked, sums_of_shard, sums_path
from softlabels.store.containers import container_of
from softlabels.store.ledger import DAMAGED_FOLDER, LEDGER_FOLDER, Ledger, receipts_file, summarize
from softlabels.store.sample_index import POSITIONS, SORTED_IDS, index_files, rows_as_stored
from softlabels.store.shard_checks import Fault, Report
from softlabels.store.store_documents import MANIFEST, PLAN, RECEIPTS
from softlabels.store.store_plan import has_file
from softlabels.store.store_reader import LocalRows
from softlabels.store.verify import StoreDocuments, find_faults, inspect_documents
from softlabels.store.writer import StoreWriter, stored_ids


@dataclass(kw_only=True)
class Repair:
    """What `repair` found and did.

    Attributes:
        dropped: shards that are no longer committed; `resume` computes them again.
        busy: faulty shards that a living writer holds; these were left alone.
        moved: new path of each file that was moved out, by its old path, both relative to the store.
        rebuilt: files that were written again, from what is intact.
        mixed: whether shards were replaced, and which ones is not known: nothing is published then.
        plan_lost: whether the plan is lost; run `precompute` with the same job to restore it.
        digest: digest of the published store; None while it is unfinished.
    """

    faults: tuple[Fault, ...] = ()
    dropped: list[int] = field(default_factory=list)
    busy: list[int] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)
    rebuilt: list[str] = field(default_factory=list)
    mixed: bool = False
    plan_lost: bool = False
    digest: str | None = None


def repair(root: Path, *, show: ShowProgress = silent) -> Repair:
    """Verify a store and move what is faulty into its folder `damaged/`; nothing is deleted.

    What follows from intact parts is written again: a lost plan, metadata files, the id index, and, where no shard is
    missing, the manifest. Interrupted at any point and run again, it ends the same.

    Raises:
        UnknownStoreError: there is no store. FormatVersionError: a newer softlabels wrote it.
        BadIdsError: a sample id is repeated, so that the store cannot be published.
    """
    root = Path(root)
    done = Repair()
    documents = inspect_documents(root)
    if documents.plan is None:
        done.faults, done.plan_lost = documents.faults, True
        for path in (PLAN, MANIFEST):
            _move_out(root, path, done.moved)
        return done
    ledger = Ledger(root, documents.plan)
    with ledger.exclusive():
        ready = _move_out_and_rebuild(root, documents, documents.plan, ledger, done, show)
    # After the lock is released, since `finish` takes it too.
    writer = StoreWriter.resume(root)
    if ready and not writer.missing_shards():
        done.digest = writer.finish().digest
    return done


def _move_out_and_rebuild(
    root: Path, documents: StoreDocuments, plan: Manifest, ledger: Ledger, done: Repair, show: ShowProgress
) -> bool:
    """Move out what is faulty, rebuild what can be; return whether all files beside the shards are intact."""
    plan_faults = [fault for fault in documents.faults if fault.path == PLAN]
    if plan_faults:
        _move_out(root, PLAN, done.moved)
        write_atomically(root / PLAN, [seal(plan.to_json())])
        done.rebuilt.append(PLAN)
    done.faults = (*plan_faults, *find_faults(root, Report(root=str(root)), show=show))
    rebuilt = {shard for shard in _shards_of(done.faults) if _rebuild_sums(root, plan, ledger, shard, done)}
    # A faulty shard loses its receipt first, so that its rows stop existing before their bytes do; then the manifest
    # is moved out, and the shard's files last.
    files = _drop_shards(root, ledger, done, keep=rebuilt)
    manifest = documents.manifest
    wrong = {fault.path for fault in done.faults if fault.path is not None and fault.shard is None} - {PLAN}
    done.mixed = LEDGER_FOLDER in wrong
    wrong.discard(LEDGER_FOLDER)
    metadata = _rebuilt_metadata(root, manifest, plan, wrong) if manifest is not None and not done.dropped else {}
    # A file that is not rebuilt to the same bytes changes the store's digest, so a new manifest has to be published.
    listed = wrong & set(manifest.metadata_sha256 if manifest is not None else ())
    keep_manifest = manifest is not None and not done.dropped and not done.busy and MANIFEST not in wrong
    # A new manifest would declare a mixture of two runs whole.
    keep_manifest = done.mixed or (keep_manifest and listed <= set(metadata))
    if not keep_manifest:
        _move_out(root, MANIFEST, done.moved)
    for path in [*files, *sorted(wrong - {MANIFEST})]:
        _move_out(root, path, done.moved)
    for path, contents in metadata.items() if keep_manifest else ():
        write_atomically(root / path, [contents])
        done.rebuilt.append(path)
    for folder in {root, *((root / path).parent for path in metadata)}:
        purge(folder)
    return not (done.busy or done.mixed) and all(
        has_file(root / path, digest) for path, digest in plan.metadata_sha256.items()
    )


def _shards_of(faults: Sequence[Fault]) -> list[int]:
    return sorted({fault.shard for fault in faults if fault.shard is not None})


def _rebuild_sums(root: Path, plan: Manifest, ledger: Ledger, shard: int, done: Repair) -> bool:
    """Write the sums of a shard's rows again where only they are damaged; return whether that was so.

    They follow from rows in intact chunks, and the receipt has the SHA-256 of their file: nothing has to be computed.
    """
    path = sums_path(shard)
    if any(fault.path != path for fault in done.faults if fault.shard == shard):
        return False
    try:
        with ledger.claim(shard), contextlib.closing(LocalRows(root)) as rows:
            receipt = ledger.read(shard)
            if receipt is None or receipt.salt is None:
                return False
            numbers = np.arange(*receipt.rows)
            arrays = rows_as_stored(plan, rows.fetch_rows(numbers, tuple(plan.arrays)))
            sums = masked(sums_of_shard(plan, arrays), numbers, receipt.salt).astype("<u4").tobytes()
            if hashlib.sha256(sums).hexdigest() != receipt.files[path].sha256:
                return False
            _move_out(root, path, done.moved)
            write_atomically(root / path, [sums])
    except (DamageError, RowsNotCommittedError, ShardClaimedError):
        return False
    done.rebuilt.append(path)
    return True


def _drop_shards(root: Path, ledger: Ledger, done: Repair, *, keep: set[int]) -> list[str]:
    """Move out the receipts of faulty shards but those to keep; return the files that these shards leave behind."""
    files: list[str] = []
    for shard in sorted(set(_shards_of(done.faults)) - keep):
        try:
            with ledger.claim(shard):
                # A damaged receipt cannot name its files: they stay, until `resume` replaces them under the same paths.
                with contextlib.suppress(DamageError):
                    receipt = ledger.read(shard)
                    files += [] if receipt is None else list(receipt.files)
                _move_out(root, ledger.path_of(shard), done.moved)
                done.dropped.append(shard)
        except ShardClaimedError:
            done.busy.append(shard)
    return files


def _rebuilt_metadata(root: Path, manifest: Manifest, plan: Manifest, wrong: set[str]) -> dict[str, bytes]:
    """Return the damaged metadata files that come out the same, byte for byte, when they are built again."""
    expected = {path: digest for path, digest in manifest.metadata_sha256.items() if path in wrong}
    if not expected:
        return {}
    made = container_of(manifest).metadata(manifest)
    if {SORTED_IDS, POSITIONS} & set(expected) and "ids" in manifest.arrays:
        made |= index_files(stored_ids(root, plan))
    if RECEIPTS in expected:
        made[RECEIPTS] = receipts_file(summarize(Ledger(root, plan).receipts(range(plan.shards.count))))
    return {path: raw for path, raw in made.items() if hashlib.sha256(raw).hexdigest() == expected.get(path)}


def _move_out(root: Path, path: str, moved: dict[str, str]) -> None:
    """Move a file of the store into its folder `damaged/`, durably; do nothing where it is missing already."""
    target = root / DAMAGED_FOLDER / path
    make_folder(target.parent)
    number = 0
    # lexists, since os.rename would replace a dangling link too.
    while os.path.lexists(target):
        number += 1
        target = root / DAMAGED_FOLDER / f"{path}.{number}"
    try:
        os.rename(root / path, target)
    except FileNotFoundError:
        return
    # The new name before the old one's removal: after a power failure both may exist, never neither.
    sync_folder(target.parent)
    sync_folder((root / path).parent)
    moved[path] = str(target.relative_to(root))
