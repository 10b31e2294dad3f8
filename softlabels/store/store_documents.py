"""A store's documents: plan, manifest, the digests that identify them, and the encoding's learnt arrays."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.documents import MAX_DOCUMENT_BYTES, open_sealed
from softlabels.encodings import Encoding
from softlabels.errors import ManifestError, UnknownStoreError
from softlabels.manifest import Manifest, check_encoding
from softlabels.store.safe_open import OpenFolder, StoreRoot, safe_read
from softlabels.wire import CONSTANT_PATH

MANIFEST = "manifest.json"
PLAN = "plan.json"
RECEIPTS = "index/receipts.npy"
"""SHA-256 of each shard's receipt, uint8 [shards, 32], in a finished store of format version 2."""

JOB = "job.json"
"""The job that a store was started with; `softlabels resume STORE` reads it."""

MAX_ARRAY_BYTES = 1 << 32
"""A basis of 4,096 vectors over half a million classes."""


def load_manifest(root: StoreRoot) -> Manifest:
    """Return the manifest of a finished store, else its plan.

    Raises:
        UnknownStoreError: neither exists. ManifestError, FormatVersionError.
    """
    for name in (MANIFEST, PLAN):
        try:
            return load_document(root, name)
        except (FileNotFoundError, NotADirectoryError):
            continue
    where = root.path if isinstance(root, OpenFolder) else root
    raise UnknownStoreError(f"there is no store at {where}: it has neither {MANIFEST} nor {PLAN}", where=str(where))


def load_plan(root: Path) -> Manifest:
    """Return the plan of the store at `root`; raise ManifestError if it is missing or damaged."""
    try:
        return load_document(root, PLAN)
    except FileNotFoundError as error:
        raise ManifestError(f"{root / PLAN} is missing: without it nothing can be added to the store") from error


def load_document(root: StoreRoot, name: str) -> Manifest:
    """Return the plan or manifest in the file of this name; raise FileNotFoundError, ManifestError, OSError."""
    raw = safe_read(root, name, max_bytes=MAX_DOCUMENT_BYTES)
    return Manifest.from_json(open_sealed(raw, what=str(root / name)))


def plan_digest(manifest: Manifest) -> str:
    """Return the digest of the plan that a manifest was made from; for a plan, its own digest."""
    return manifest.plan_sha256 or manifest.digest


def npy_bytes(array: NDArray[Any]) -> bytes:
    """Return an array as the contents of a `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def constant_files(encoding: Encoding) -> dict[str, bytes]:
    """Return the files of an encoding's learnt arrays, by path; none for most encodings."""
    return {CONSTANT_PATH.format(name=name): npy_bytes(array) for name, array in encoding.constants.items()}


def load_encoding(root: StoreRoot, manifest: Manifest) -> Encoding:
    """Return the encoding of a store's rows, with its learnt arrays.

    Raises:
        ManifestError: a learnt array is missing or damaged, or the store's arrays are not of this encoding.
    """
    paths = {name: CONSTANT_PATH.format(name=name) for name in manifest.encoding.constants}
    constants = {name: load_listed_npy(root, path, manifest) for name, path in paths.items()}
    return check_encoding(manifest, manifest.make_encoding(constants))


def load_listed_npy(root: StoreRoot, path: str, manifest: Manifest) -> NDArray[Any]:
    """Return the array in a file that the manifest lists; raise ManifestError unless it is the file that was listed."""
    try:
        raw = safe_read(root, path, max_bytes=MAX_ARRAY_BYTES)
        # Before np.load, which then parses only bytes that are what was written.
        if hashlib.sha256(raw).hexdigest() == manifest.metadata_sha256.get(path):
            loaded: NDArray[Any] = np.load(io.BytesIO(raw), allow_pickle=False)
            return loaded
    except ManifestError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise ManifestError(f"{root / path} cannot be read ({error}): run `softlabels repair`") from error
    raise ManifestError(f"{root / path} is not what was written: run `softlabels repair`, or restore it from a copy")
