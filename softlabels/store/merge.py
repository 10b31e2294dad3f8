"""Merge: committed shards of stores with the same plan, copied into one store and verified on the way."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softlabels.atomic_files import write_atomically
from softlabels.errors import ChecksumError, ConflictError, DamageError, ManifestError, ShardConflictError
from softlabels.manifest import Manifest
from softlabels.store.ledger import Ledger, Receipt
from softlabels.store.safe_open import open_committed
from softlabels.store.store_documents import JOB, PLAN, inspect_documents
from softlabels.store.verify_report import ShowProgress, silent
from softlabels.store.writer import StoreWriter

_BLOCK_BYTES = 4 << 20
_SHOWN = 8
"""How many differences between two plans a message spells out."""


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
    is published. The sources are not changed.

    Args:
        sources: folders of stores, finished or not, at least one.
        destination: folder that is empty or missing, or holds a store of the same plan.
        show: progress display.
    Raises:
        ConflictError: the plans differ; the message says how.
        ShardConflictError: two of the stores hold the same shard with different contents.
        UnknownStoreError, ManifestError: a source is not a store, or its plan is invalid.
        StoreExistsError: the destination holds something else.
    """
    plan = _common_plan([Path(source) for source in sources], Path(destination))
    writer = StoreWriter.create_with_files(
        Path(destination), plan, _metadata_files([Path(source) for source in sources], plan)
    )
    done = Merge()
    with show(plan.shards.count * len(sources), f"merge {plan.name}", "shards") as progress:
        for source in map(Path, sources):
            if (source / JOB).is_file() and not (writer.root / JOB).exists():
                write_atomically(writer.root / JOB, [(source / JOB).read_bytes()])
            ledger = Ledger(source, plan_sha256=plan.digest)
            for shard in range(plan.shards.count):
                _merge_shard(source, ledger, shard, writer, done)
                progress.advance()
    done.missing = writer.missing_shards()
    done.damaged = {shard: message for shard, message in done.damaged.items() if shard in done.missing}
    if not done.missing:
        done.digest = writer.finish().digest
    return done


def _common_plan(sources: Sequence[Path], destination: Path) -> Manifest:
    plans: list[tuple[Path, Manifest]] = []
    for where in [*sources, *([destination] if (destination / PLAN).exists() else [])]:
        documents = inspect_documents(where)
        if documents.plan is None:
            raise ManifestError(f"{where} cannot be merged: {'; '.join(map(str, documents.faults))}")
        plans.append((where, documents.plan))
    first, plan = plans[0]
    for where, other in plans[1:]:
        if other.digest != plan.digest:
            found = list(_differences(plan.to_json(), other.to_json(), ""))
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise ConflictError(
                f"the stores at {first} and {where} have different plans, so their rows do not belong in one "
                f"store: {'; '.join(found[:_SHOWN])}{more}. Run both with one job, one set of weights and the same "
                "library versions",
                differs=[text.partition(":")[0] for text in found],
            )
    return plan


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
    """Return the files that the plan lists, each from the first source where it is intact.

    Raises:
        DamageError: none has.
    """
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


def _merge_shard(source: Path, ledger: Ledger, shard: int, writer: StoreWriter, done: Merge) -> None:
    own = Ledger(writer.root, plan_sha256=writer.plan.digest)
    try:
        receipt = ledger.read(shard)
        if receipt is None:
            return
        with own.claim(shard):
            before = own.read(shard)
            if before is not None:
                _check_same_contents(before, receipt, source, writer.root)
                done.kept += 1
                return
            for path, record in receipt.files.items():
                blocks = _verified(source, path, record.sha256)
                write_atomically(writer.root / path, blocks, staging=own.staging(shard, path))
            own.write(receipt)
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


def _check_same_contents(before: Receipt, receipt: Receipt, source: Path, root: Path) -> None:
    ours = {path: record.sha256 for path, record in before.files.items()}
    theirs = {path: record.sha256 for path, record in receipt.files.items()}
    if ours != theirs:
        raise ShardConflictError(
            f"shard {receipt.shard} of {source} has other contents than the one in {root}: the teachers are not "
            "deterministic across these machines, or the inputs changed; find out which is right first",
            shard=receipt.shard,
        )
