"""Conversion of a finished store to another container or compression; its rows stay the same, bit by bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from softlabels.errors import ChecksumError, JobError, ManifestError, RowsNotCommittedError
from softlabels.ids import to_fixed_bytes
from softlabels.manifest import COMPRESSIONS, Container, Manifest
from softlabels.store.chunks import shard_rows
from softlabels.store.ledger import Ledger, Receipt
from softlabels.store.safe_open import safe_read
from softlabels.store.store_documents import load_plan, plan_digest
from softlabels.store.store_reader import LocalRows
from softlabels.store.writer import StoreWriter
from softlabels.transfer_set import FingerprintSum

MAX_METADATA_BYTES = 1 << 40
"""Largest file beside the rows: offsets of sequences, learnt arrays of an encoding."""


def convert_store(
    source: Path,
    target: Path,
    *,
    container: Container | None = None,
    compression: str | None = None,
    advance: Callable[[int], object] = lambda rows: None,
) -> Manifest:
    """Copy a finished store into another container, verifying every chunk; continue where it was interrupted.

    The plan stays the same except for container and compression. The library versions in it stay too, since they made
    the targets. So a store that is converted there and back is the same store again, digest included.

    Args:
        source: folder of the store to copy.
        target: folder of the new store.
        container: container of the new store; the source's when left out.
        compression: compression of chunks, for archives; None for fixed-size chunks.
        advance: called with the number of rows of each shard that is done.
    Returns:
        The manifest of the new store.
    Raises:
        RowsNotCommittedError: the source is unfinished. JobError: the container has no such compression.
        ChecksumError, TruncatedError, ManifestError: the source is damaged. StoreExistsError, ShardClaimedError.
    """
    rows = LocalRows(source)
    if not rows.manifest.finished:
        raise RowsNotCommittedError(f"{source} is unfinished: run `softlabels resume {source}`, then convert it")
    plan = _plan(load_plan(source), container, compression)
    ledger = Ledger(source, plan_sha256=plan_digest(rows.manifest))
    files = {path: _metadata_file(source, path, sha256) for path, sha256 in plan.metadata_sha256.items()}
    writer = StoreWriter.create_with_files(target, plan, files)
    missing = writer.missing_shards()
    advance(plan.rows - sum(len(shard_rows(plan, shard)) for shard in missing))
    for shard in missing:
        with writer.claim(shard):
            receipt = ledger.read(shard)
            if receipt is None:
                raise ManifestError(
                    f"shard {shard} of {source} has no receipt though it is finished: run `softlabels repair`"
                )
            arrays = _arrays(rows, shard, receipt)
            writer.commit(shard, arrays, fingerprint=receipt.fingerprint, audit=receipt.audit)
        advance(len(shard_rows(plan, shard)))
    return writer.finish()


def _plan(plan: Manifest, container: Container | None, compression: str | None) -> Manifest:
    chosen = container or plan.container
    if compression is not None and compression not in COMPRESSIONS[chosen]:
        raise JobError(
            f"{chosen} chunks cannot be compressed with {compression}: every reader of {chosen} supports "
            f"{' and '.join(COMPRESSIONS[chosen])}, others would need plugins"
        )
    return replace(plan, container=chosen, shards=replace(plan.shards, compression=compression))


def _arrays(rows: LocalRows, shard: int, receipt: Receipt) -> dict[str, NDArray[Any]]:
    """Return the arrays of a shard as stored, with every chunk and the receipt's fingerprint verified."""
    manifest = rows.manifest
    span = shard_rows(manifest, shard)
    arrays = rows.fetch_rows(np.arange(span.start, span.stop, dtype=np.int64), tuple(manifest.arrays))
    total = FingerprintSum()
    if "ids" in arrays:
        total.add(arrays["ids"], arrays["fingerprints"])
        if manifest.ids.kind == "str":
            arrays["ids"] = to_fixed_bytes(arrays["ids"], width_bytes=manifest.ids.width_bytes)
    if total.hexdigest() != receipt.fingerprint:
        raise ManifestError(f"shard {shard} of {manifest.name!r} holds other samples than its receipt says")
    return arrays


def _metadata_file(source: Path, path: str, sha256: str) -> bytes:
    contents = safe_read(source, path, max_bytes=MAX_METADATA_BYTES)
    if hashlib.sha256(contents).hexdigest() != sha256:
        raise ChecksumError(f"{source / path} is not what was written: run `softlabels verify {source}`", path=path)
    return contents
