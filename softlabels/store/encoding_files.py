"""Encoding files: arrays that an encoding learnt for one store, kept beside the rows and verified by SHA-256."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.encodings import Encoding
from softlabels.errors import ManifestError
from softlabels.manifest import Manifest, check_encoding
from softlabels.store.safe_open import safe_read
from softlabels.store.sample_index import npy_bytes

MAX_CONSTANT_BYTES = 1 << 32
"""A basis of 4,096 vectors over half a million classes."""


def constant_files(encoding: Encoding) -> dict[str, bytes]:
    """Return the files of an encoding's learnt arrays, by path; none for most encodings."""
    return {_path(name): npy_bytes(array) for name, array in encoding.constants.items()}


def load_encoding(root: Path, manifest: Manifest) -> Encoding:
    """Return the encoding of a store's rows, with its learnt arrays.

    Raises:
        ManifestError: a learnt array is missing or damaged, or the store's arrays are not of this encoding.
    """
    constants = {name: _load(root, manifest, name) for name in manifest.encoding.constants}
    return check_encoding(manifest, manifest.make_encoding(constants))


def _path(name: str) -> str:
    return f"encoding/{name}.npy"


def _load(root: Path, manifest: Manifest, name: str) -> NDArray[Any]:
    path = _path(name)
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
