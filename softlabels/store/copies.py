"""Copies of stores: conversion to another container or compression, and the union of stores of one plan."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from softlabels.atomic_files import write_atomically
from softlabels.documents import open_sealed
from softlabels.errors import (
    ChecksumError,
    ConflictError,
    DamageError,
    JobError,
    ManifestError,
    RowsNotCommittedError,
    ShardConflictError,
)
from softlabels.manifest import COMPRESSIONS, FORMAT_VERSION, Container, Manifest
from softlabels.progress import ShowProgress, silent
from softlabels.store.chunks import shard_rows, sums_path
from softlabels.store.ledger import Ledger, Receipt
from softlabels.store.safe_open import open_committed
from softlabels.store.sample_index import rows_as_stored
from softlabels.store.store_documents import JOB, PLAN, load_plan
from softlabels.store.store_reader import LocalRows
from softlabels.store.verify import inspect_documents
from softlabels.store.writer import StoreWriter
from softlabels.transfer_set import FingerprintSum

_BLOCK_BYTES = 4 << 20
_SHOWN = 8
"""How many differences between two plans a message spells out."""


def convert_store(
    source: Path,
    target: Path,
    *,
    container: Container | None = None,
    compression: str | None = None,
    advance: Callable[[int], object] = lambda rows: None,
) -> Manifest:
    """Copy a finished store into another container, verifying every chunk; continue where it was interrupted.

    The plan stays the same except for container, compression and format version, which is the newest. The library
    versions in it stay too, since they made the targets. So a store that is converted there and back is the same store
    again, digest included.

    Args:
        container: container of the new store; the source's when left out.
        compression: compression of chunks, for archives; None for fixed-size chunks.
        advance: called with the number of rows of each shard that is done.
    Raises:
        RowsNotCommittedError: the source is unfinished. JobError: the container has no such compression.
        ShardConflictError: the target holds rows of another run of the same plan.
        ChecksumError, TruncatedError, ManifestError: the source is damaged. StoreExistsError, ShardClaimedError.
    """
    rows = LocalRows(source, verify="every-read")
    if not rows.manifest.finished:
        raise RowsNotCommittedError(f"{source} is unfinished: run `softlabels resume {source}`, then convert it")
    before = load_plan(source)
    chosen = container or before.container
    if compression is not None and compression not in COMPRESSIONS[chosen]:
        raise JobError(
            f"{chosen} chunks cannot be compressed with {compression}: every reader of {chosen} supports "
            f"{' and '.join(COMPRESSIONS[chosen])}, others would need plugins"
        )
    shards = replace(before.shards, compression=compression)
    plan = replace(before, container=chosen, shards=shards, format_version=FORMAT_VERSION)
    if rows.manifest.plan_sha256 != before.digest:
        raise ManifestError(f"plan and manifest of {source} do not belong together: run `softlabels verify {source}`")
    ledger = Ledger(source, rows.manifest)
    writer = StoreWriter.create_with_files(target, plan, _metadata_files([source], plan))
    for shard in range(plan.shards.count):
        with writer.claim(shard):
            receipt = ledger.read(shard)
            if receipt is None:
                raise ManifestError(f"the receipt of shard {shard} of {source} is missing: run `softlabels repair`")
            if not _has_same_rows(writer.ledger.read(shard), receipt):
                # Of a shard that is committed there, `commit` compares the contents and raises where they differ.
                arrays = _verified_arrays(rows, shard, receipt)
                try:
                    writer.commit(
                        shard, arrays, fingerprint=receipt.fingerprint, audit=receipt.audit, salt=receipt.salt
                    )
                except ShardConflictError as error:
                    raise ShardConflictError(
                        f"{target} holds another shard {shard} than {source}, of another run of the same job: convert "
                        "into another folder, or remove that one first",
                        shard=shard,
                    ) from error
        advance(len(shard_rows(plan, shard)))
    return writer.finish()


def _has_same_rows(existing: Receipt | None, receipt: Receipt) -> bool:
    """Return whether a shard is committed with this receipt's rows, by the sums of its rows; False without sums."""
    path = sums_path(receipt.shard)
    if existing is None or path not in receipt.files or existing.files.get(path) != receipt.files[path]:
        return False
    return (existing.fingerprint, existing.salt) == (receipt.fingerprint, receipt.salt)


@dataclass(kw_only=True)
class Merge:
    """What `merge` did.

    Attributes:
        copied: number of shards copied, by source.
        kept: number of shards that the destination had already, with the same contents.
        damaged: message for each shard that is damaged in a source and still missing, by shard.
        missing: shards that the destination still lacks.
        digest: digest of the published store; None while shards are missing.
    """

    copied: dict[str, int] = field(default_factory=dict)
    kept: int = 0
    damaged: dict[int, str] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)
    digest: str | None = None


def merge(sources: Sequence[Path], destination: Path, *, show: ShowProgress = silent) -> Merge:
    """Copy the committed shards of stores with the very same plan into one store.

    Every file is read, compared with its receipt's SHA-256 and made durable before the shard's receipt is written. An
    interrupted merge leaves an unfinished store and continues when it is run again. When no shard is missing, the store
    is published. The sources, at least one and finished or not, are not changed.

    Raises:
        ConflictError: the plans differ; the message says how.
        ShardConflictError: two of the stores hold the same shard with different contents.
        UnknownStoreError, ManifestError: a source is not a store, or its plan is invalid.
        StoreExistsError: the destination holds something else.
    """
    ledgers, plan = _common_plan(sources, destination)
    writer = StoreWriter.create_with_files(destination, plan, _metadata_files(sources, plan))
    done = Merge()
    with show(plan.shards.count * len(sources), f"merge {plan.name}", "shards") as progress:
        for source in sources:
            _keep_job_of(source, writer)
            for shard in range(plan.shards.count):
                _merge_shard(source, ledgers[source], shard, writer, done)
                progress.advance()
    done.missing = writer.missing_shards()
    # A shard that is damaged in one source may have been copied from another.
    done.damaged = {shard: message for shard, message in done.damaged.items() if shard in done.missing}
    if not done.missing:
        done.digest = writer.finish().digest
    return done


def _keep_job_of(source: Path, writer: StoreWriter) -> None:
    """Keep a source's job where the destination has none, so that it can be resumed."""
    # Under the lock: a run of the job may write its own at the same time, under the same temporary name.
    with writer.ledger.exclusive():
        if (source / JOB).is_file() and not (writer.root / JOB).exists():
            raw = (source / JOB).read_bytes()
            open_sealed(raw, what=str(source / JOB))
            write_atomically(writer.root / JOB, [raw])


def _verified_arrays(rows: LocalRows, shard: int, receipt: Receipt) -> dict[str, NDArray[Any]]:
    """Return the arrays of a shard as stored, with every chunk and the receipt's fingerprint verified."""
    manifest = rows.manifest
    arrays = rows.fetch_rows(np.asarray(shard_rows(manifest, shard)), tuple(manifest.arrays))
    total = FingerprintSum()
    if "ids" in arrays:
        total.add(arrays["ids"], arrays["fingerprints"])
    if total.hexdigest() != receipt.fingerprint:
        raise ManifestError(f"shard {shard} of {manifest.name!r} holds other samples than its receipt says")
    return rows_as_stored(manifest, arrays)


def _common_plan(sources: Sequence[Path], destination: Path) -> tuple[dict[Path, Ledger], Manifest]:
    """Return the receipts of each store, and the plan that all of them have."""
    plans: list[tuple[Path, Manifest]] = []
    ledgers = {}
    for where in [*sources, *([destination] if (destination / PLAN).exists() else [])]:
        documents = inspect_documents(where)
        if documents.plan is None:
            raise ManifestError(f"{where} cannot be merged: {'; '.join(map(str, documents.faults))}")
        plans.append((where, documents.plan))
        ledgers[where] = Ledger(where, documents.manifest or documents.plan)
    first, plan = plans[0]
    for where, other in plans[1:]:
        # By digest: 4 and 4.0 are equal in Python, but not in a plan.
        if other.digest != plan.digest:
            found = list(_differences(plan.to_json(), other.to_json(), ""))
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise ConflictError(
                f"the stores at {first} and {where} have different plans, so their rows do not belong in one store: "
                f"{'; '.join(found[:_SHOWN])}{more}. Run both with one job, the same weights and library versions",
                differs=[text.partition(":")[0] for text in found],
            )
    return ledgers, plan


def _differences(ours: Any, theirs: Any, where: str) -> Iterator[str]:
    """Yield where two JSON documents differ, as "teachers.0.weights_sha256: 'ab' and 'cd'"."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in sorted({*ours, *theirs}):
            yield from _differences(ours.get(key), theirs.get(key), f"{where}.{key}" if where else str(key))
    elif isinstance(ours, Sequence) and isinstance(theirs, Sequence) and not isinstance(ours, str):
        for number in range(max(len(ours), len(theirs))):
            our, their = (side[number] if number < len(side) else None for side in (ours, theirs))
            yield from _differences(our, their, f"{where}.{number}")
    elif ours != theirs:
        yield f"{where}: {ours!r} and {theirs!r}"


def _metadata_files(sources: Sequence[Path], plan: Manifest) -> dict[str, bytes]:
    """Return the files that the plan lists, each from the first source where it is intact, else raise DamageError."""
    found: dict[str, bytes] = {}
    for path, digest in plan.metadata_sha256.items():
        for source in sources:
            try:
                found[path] = b"".join(_verified(source, path, digest))
                break
            except DamageError:
                if source is sources[-1]:
                    raise
    return found


def _merge_shard(source: Path, theirs: Ledger, shard: int, writer: StoreWriter, done: Merge) -> None:
    ledger, root = writer.ledger, writer.root
    try:
        receipt = theirs.read(shard)
        if receipt is None:
            return
        with ledger.claim(shard):
            existing = ledger.read(shard)
            if existing is not None:
                if existing.files != receipt.files:
                    raise ShardConflictError(
                        f"shard {shard} of {source} has other contents than the one in {root}: the teachers are not "
                        "deterministic across these machines, or the inputs changed; find out which is right first",
                        shard=shard,
                    )
                done.kept += 1
                return
            for path, record in receipt.files.items():
                # Raises after the last block where the digest differs: the file is then removed before it has its name.
                blocks = _verified(source, path, record.sha256)
                write_atomically(root / path, blocks, staging=ledger.staging(shard, path))
            writer.add(receipt)
    except DamageError as error:
        done.damaged[shard] = f"{source}: {error}"
        return
    done.copied[str(source)] = done.copied.get(str(source), 0) + 1


def _verified(source: Path, path: str, sha256: str) -> Iterator[bytes]:
    """Yield a file's contents in blocks; raise after the last one if its SHA-256 differs."""
    digest = hashlib.sha256()
    with os.fdopen(open_committed(source, path), "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            yield block
    if digest.hexdigest() != sha256:
        raise ChecksumError(f"{source / path} is not what was written: run `softlabels repair` and `softlabels resume`")
