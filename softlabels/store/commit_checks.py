"""Checks before a shard is committed or a store is published: nothing appears that no reader could read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.audit import Audit
from softlabels.documents import as_json, open_sealed, seal
from softlabels.errors import (
    ChecksumError,
    ManifestError,
    NonFiniteLogitsError,
    RequestError,
    ShapeMismatchError,
    ShardConflictError,
)
from softlabels.manifest import SAMPLE_ARRAYS, Manifest
from softlabels.softmath import has_nan
from softlabels.store.array_reader import checked_part
from softlabels.store.chunks import ShardFile
from softlabels.store.ledger import Ledger, Receipt, parse_receipt
from softlabels.store.sample_index import make_index
from softlabels.store.store_documents import MANIFEST
from softlabels.store.store_plan import has_file
from softlabels.transfer_set import UNLABELLED, FingerprintSum


def check_values(arrays: Mapping[str, NDArray[Any]], plan: Manifest, rows: range) -> None:
    """Raise where `verify` would call rows invalid; a job checks its own rows, with the sample ids at fault."""
    for name in sorted(set(arrays) - set(SAMPLE_ARRAYS)):
        if has_nan(arrays[name]):
            raise NonFiniteLogitsError(
                f"array {name!r} of rows {rows.start} to {rows.stop - 1} holds NaN, which no softmax can be taken of"
            )
    labels = arrays.get("labels")
    if labels is not None and len(bad := np.flatnonzero((labels < UNLABELLED) | (labels >= plan.classes))):
        raise RequestError(
            f"label {int(labels[bad[0]])} of row {rows[int(bad[0])]} is none of the {plan.classes} classes: give 0 to "
            f"{plan.classes - 1}, or {UNLABELLED} where there is none"
        )


def check_readable(receipt: Receipt, plan: Manifest) -> None:
    """Raise unless every reader will accept a receipt; called before anything of the shard is on disk."""
    what = f"the receipt of shard {receipt.shard}"
    try:
        parsed = parse_receipt(seal(as_json(receipt)), what=what)
        Audit.from_json(parsed.audit)
        FingerprintSum.from_hexdigest(parsed.fingerprint)
        for name in plan.arrays:
            checked_part(parsed, name, plan)
    except (TypeError, ValueError, KeyError, AttributeError, ManifestError) as error:
        raise ShapeMismatchError(
            f"{what} could not be read again ({type(error).__name__}: {error}), so nothing was written: `audit` must "
            "be what `Audit.to_json()` returned, and `fingerprint` what `FingerprintSum.hexdigest()` did"
        ) from error


def check_same_contents(root: Path, existing: Receipt, files: Sequence[ShardFile]) -> None:
    """Raise ShardConflictError unless these are the files of a shard that is committed."""
    for file in files:
        digest = hashlib.sha256()
        for buffer in file.buffers:
            digest.update(buffer)
        # Digests of files suffice: the same arrays give the same bytes in both containers (docs/adr/0005).
        record = existing.files.get(file.path)
        if record is None or record.sha256 != digest.hexdigest():
            raise ShardConflictError(
                f"shard {existing.shard} of {root} is committed with other contents than these: the teacher is not "
                "deterministic, or the inputs changed; committed shards never change",
                shard=existing.shard,
            )


def check_publishable(root: Path, manifest: Manifest, raw: bytes) -> None:
    """Raise unless a reader will open the store once its manifest exists, and find what was written."""
    damaged = [path for path, digest in manifest.metadata_sha256.items() if not has_file(root / path, digest)]
    if damaged:
        raise ChecksumError(
            f"{root / damaged[0]} was written and cannot be read back: the store is not published; check the disk and "
            "the memory of this machine, then run `softlabels resume`"
        )
    read = Manifest.from_json(open_sealed(raw, what=str(root / MANIFEST)))
    assert read.digest == manifest.digest, "the manifest as it is read is the one that was made"
    make_index(root, read)
    Ledger(root, read).read(read.shards.count - 1)
