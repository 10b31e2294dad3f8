"""Where arrays lie that an encoding learnt for one store: small files beside the rows, named by their SHA-256."""

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
from softlabels.store.confined import read_confined
from softlabels.store.index import npy_bytes

FOLDER = "encoding"

MAX_CONSTANT_BYTES = 1 << 32
"""A basis of 4,096 vectors over half a million classes."""


def constant_path(name: str) -> str:
    """Where the learnt array of that name lies, relative to the store."""
    return f"{FOLDER}/{name}.npy"


def constant_files(encoding: Encoding) -> dict[str, bytes]:
    """The files that hold an encoding's learnt arrays, by path; none for most encodings."""
    return {constant_path(name): npy_bytes(array) for name, array in encoding.constants.items()}


def load_encoding(root: Path, manifest: Manifest) -> Encoding:
    """The encoding of a store's rows, with what it learnt.

    Raises:
        ManifestError: a learnt array is missing or not what was written, or the rows are not this encoding's.
    """
    constants = {name: _load(root, manifest, name) for name in manifest.encoding.constants}
    return check_encoding(manifest, manifest.make_encoding(constants))


def _load(root: Path, manifest: Manifest, name: str) -> NDArray[Any]:
    path = constant_path(name)
    try:
        raw = read_confined(root, path, most_bytes=MAX_CONSTANT_BYTES)
        if hashlib.sha256(raw).hexdigest() != manifest.metadata_sha256.get(path):
            raise ManifestError(
                f"{root / path} is not what was written: no row of this store can be decoded without it"
            )
        loaded: NDArray[Any] = np.load(io.BytesIO(raw), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(f"{root / path} cannot be read ({error}): restore it from a copy of the store") from error
    return loaded
