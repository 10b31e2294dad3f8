"""How is an idx file read, the format that MNIST comes in? Strictly: every byte is accounted for or it is refused.

The format, big-endian: two zero bytes, one byte for the element type (0x08 = unsigned byte, the only one here), one
byte for the number of dimensions, a 4-byte size for each dimension, then the elements in C order and nothing more.
Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits".
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import DataUnavailableError, TruncatedError

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
