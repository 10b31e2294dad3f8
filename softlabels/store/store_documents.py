"""A store's own documents: plan, manifest, job and the encoding's learnt arrays, read strictly or with their faults."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from softlabels.documents import MAX_DOCUMENT_BYTES, open_sealed
from softlabels.encodings import Encoding
from softlabels.errors import ManifestError, UnknownStoreError
from softlabels.manifest import Manifest, check_encoding
from softlabels.store.containers import container_of
from softlabels.store.safe_open import safe_read
from softlabels.store.sample_index import POSITIONS, SORTED_IDS, npy_bytes
from softlabels.store.verify_report import Fault

MANIFEST = "manifest.json"
PLAN = "plan.json"
JOB = "job.json"
"""The job that a store was started with; `softlabels resume STORE` reads it."""

MAX_CONSTANT_BYTES = 1 << 32
"""A basis of 4,096 vectors over half a million classes."""


def load_manifest(root: Path) -> Manifest:
    """Return the manifest of a finished store, else its plan.

    Raises:
        UnknownStoreError: neither exists. ManifestError, FormatVersionError.
    """
    for name in (MANIFEST, PLAN):
        try:
            return _load(root, name)
        except (FileNotFoundError, NotADirectoryError):
            continue
    raise UnknownStoreError(f"there is no store at {root}: it has neither {MANIFEST} nor {PLAN}", where=str(root))


def load_plan(root: Path) -> Manifest:
    """Return the plan of the store at `root`.

    Raises:
        ManifestError: it is missing or damaged.
    """
    try:
        return _load(root, PLAN)
    except FileNotFoundError as error:
        raise ManifestError(f"{root / PLAN} is missing: without it nothing can be added to the store") from error


def plan_digest(manifest: Manifest) -> str:
    """Return the digest of the plan that a manifest was made from; for a plan, its own digest."""
    return manifest.plan_sha256 or manifest.digest


def store_digest(manifest: Manifest) -> str:
    """Return the digest that identifies this version of the store to caches and clients."""
    if manifest.finished:
        return manifest.digest
    # Not the plan's own digest: nothing cached from an unfinished store may pass for the finished one.
    return hashlib.sha256(b"unfinished" + bytes.fromhex(manifest.digest)).hexdigest()


def constant_files(encoding: Encoding) -> dict[str, bytes]:
    """Return the files of an encoding's learnt arrays, by path; none for most encodings."""
    return {_constant_path(name): npy_bytes(array) for name, array in encoding.constants.items()}


def load_encoding(root: Path, manifest: Manifest) -> Encoding:
    """Return the encoding of a store's rows, with its learnt arrays.

    Raises:
        ManifestError: a learnt array is missing or damaged, or the store's arrays are not of this encoding.
    """
    constants = {name: _load_constant(root, manifest, name) for name in manifest.encoding.constants}
    return check_encoding(manifest, manifest.make_encoding(constants))


@dataclass(frozen=True, kw_only=True)
class StoreDocuments:
    """Plan and manifest of a store that may be damaged.

    Attributes:
        plan: as stored; else as the manifest implies it; None where neither is possible.
        manifest: None where the store is unfinished, or its manifest is invalid.
        faults: what is wrong with the documents.
    """

    plan: Manifest | None
    manifest: Manifest | None
    faults: tuple[Fault, ...]


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
        faults.append(_fault(MANIFEST, "it is a plan, not the manifest of a finished store"))
        manifest = None
    if plan is not None and plan.finished:
        faults.append(_fault(PLAN, "it is a manifest, not a plan"))
        plan = None
    if plan is None and manifest is not None:
        if not any(fault.path == PLAN for fault in faults):
            faults.append(_fault(PLAN, "it is missing: without it nothing can be added to the store"))
        plan = _plan_of(manifest)
    elif plan is not None and manifest is not None and manifest.plan_sha256 != plan.digest:
        faults.append(_fault(MANIFEST, f"it belongs to another plan than {PLAN}: do not mix stores' files"))
    _check_job(root, faults)
    return StoreDocuments(plan=plan, manifest=manifest, faults=tuple(faults))


def _load(root: Path, name: str) -> Manifest:
    raw = safe_read(root, name, max_bytes=MAX_DOCUMENT_BYTES)
    return Manifest.from_json(open_sealed(raw, what=str(root / name)))


def _load_or_report(root: Path, name: str, faults: list[Fault]) -> Manifest | None:
    try:
        return _load(root, name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ManifestError, OSError) as error:
        faults.append(_fault(name, str(error)))
        return None


def _plan_of(manifest: Manifest) -> Manifest | None:
    """Return the plan that a manifest was made from; None where no guess has its digest."""
    written_later = set(container_of(manifest).metadata(manifest))
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


def _check_job(root: Path, faults: list[Fault]) -> None:
    try:
        open_sealed(safe_read(root, JOB, max_bytes=MAX_DOCUMENT_BYTES), what=JOB)
    except FileNotFoundError:
        return  # a store that was not written by a job has none
    except (ManifestError, OSError) as error:
        faults.append(_fault(JOB, f"{error}; only `softlabels resume` needs it"))


def _fault(name: str, message: str) -> Fault:
    return Fault(kind="document", path=name, message=message)


def _constant_path(name: str) -> str:
    return f"encoding/{name}.npy"


def _load_constant(root: Path, manifest: Manifest, name: str) -> NDArray[Any]:
    path = _constant_path(name)
    try:
        raw = safe_read(root, path, max_bytes=MAX_CONSTANT_BYTES)
        if hashlib.sha256(raw).hexdigest() != manifest.metadata_sha256.get(path):
            raise ManifestError(
                f"{root / path} is not what was written: no row of this store can be decoded without it"
            )
        loaded: NDArray[Any] = np.load(io.BytesIO(raw), allow_pickle=False)
    except ManifestError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise ManifestError(f"{root / path} cannot be read ({error}): restore it from a copy of the store") from error
    return loaded
