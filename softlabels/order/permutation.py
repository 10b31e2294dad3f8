"""Keyed permutations of 0 … n - 1 that are computed, not stored, and the block shuffle built from them.

- `ShuffledTable`, up to 4,096 numbers: numbers sorted by a keyed hash. Small, and a fair shuffle even of three numbers.
- `FeistelNetwork`, beyond: x < n is written as (left, right) with x = left · b + right, left < a, right < b; each round
  adds a keyed hash of one half to the other, modulo a or b in turn. Every round can be undone, so together they are a
  bijection on [0, a · b). Results in [n, a · b), fewer than 1 in √n, are sent through again until they fall below n
  (cycle walking), which makes it a bijection on [0, n).
- `BlockShuffle`: blocks of consecutive positions are shuffled, then samples within each window of blocks.

Every constant here is part of the published orders: changing one requires a new `ORDER_VERSION`
(docs/adr/0006-epoch-order.md describes the algorithm for implementations in other languages).

Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002 (generalised Feistel, cycle walking).
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from itertools import pairwise
from math import isqrt
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Positions: TypeAlias = NDArray[np.int64]
_Words: TypeAlias = NDArray[np.uint64]

TABLE_LIMIT = 4096
"""Longest range that is a table: 8 KB, built in 70 µs."""

ROUNDS = 12
"""Six for each half. At 4,097, the shortest range of the network, four rounds keep neighbours together 1.9 times as
often as chance; six cannot be told from a fair shuffle over 4,000 keys; twelve double that."""

LONGEST = 2**48
"""Longest range. Halves stay below 2²⁴, so the 39 bits of hash favour no value by more than 2⁻¹⁴."""

CHUNK = 16_384
"""Numbers processed at a time; does not affect the order. Fits in a core's L2 cache: measured 12 million numbers a
second in chunks of 1,024, 31 million in chunks of 16,384."""

# The multipliers and the shift of MurmurHash3's 64-bit finaliser (Appleby, public domain).
_MULTIPLY_1 = np.uint64(0xFF51AFD7ED558CCD)
_MULTIPLY_2 = np.uint64(0xC4CEB9FE1A85EC53)
_SHIFT = np.uint64(33)


def subkeys(key: bytes, purpose: str) -> _Words:
    """Return the 64-bit words of one permutation.

    Args:
        key: at most 64 bytes.
        purpose: label that makes the words independent of those for other purposes.
    Returns:
        uint64, shape [ROUNDS].
    """
    digests = (blake2b(f"{purpose}/{i}".encode(), key=key).digest() for i in range(-(-ROUNDS // 8)))
    return np.frombuffer(b"".join(digests), dtype="<u8")[:ROUNDS].astype(np.uint64)


def keyed_permutation(size: int, words: _Words) -> KeyedPermutation:
    """Return the permutation of [0, size) for these `subkeys`; 1 ≤ size ≤ LONGEST."""
    assert 1 <= size <= LONGEST, "EpochOrder checks its samples"
    return ShuffledTable(size, words) if size <= TABLE_LIMIT else FeistelNetwork(size, words)


class ShuffledTable:
    """Fair shuffle of a short range: numbers sorted by 64-bit hashes, which are all different."""

    def __init__(self, size: int, words: _Words) -> None:
        hashes = _murmur(_murmur(np.arange(size, dtype=np.uint64) + words[0]) ^ words[1])
        self._table = np.argsort(hashes).astype(np.uint16)

    def forward(self, index: Positions) -> Positions:
        """Return the image of each number."""
        return self._table[index].astype(np.int64)

    def backward(self, value: Positions) -> Positions:
        """Return the preimage of each number."""
        return np.argsort(self._table)[value]


class FeistelNetwork:
    """Shuffle of a range of any length in a fixed amount of memory."""

    def __init__(self, size: int, words: _Words) -> None:
        self._size = np.uint64(size)
        # The smallest near-square that holds the range: a · b - size < a.
        self._left_size = isqrt(size - 1) + 1
        self._right_size = -(-size // self._left_size)
        self._words = words

    def forward(self, index: Positions) -> Positions:
        """Return the image of each number."""
        return self._in_chunks(index, undo=False)

    def backward(self, value: Positions) -> Positions:
        """Return the preimage of each number."""
        return self._in_chunks(value, undo=True)

    def _in_chunks(self, values: Positions, *, undo: bool) -> Positions:
        moved = np.empty(values.shape, dtype=np.int64)
        for begin in range(0, values.size, CHUNK):
            part = self._encipher(values[begin : begin + CHUNK].astype(np.uint64), undo)
            # This ends: the cycle of a bijection that starts below `size` comes back below it.
            while (outside := np.flatnonzero(part >= self._size)).size:
                part[outside] = self._encipher(part[outside], undo)
            moved[begin : begin + CHUNK] = part
        return moved

    def _encipher(self, values: _Words, undo: bool) -> _Words:
        left, scratch = values // np.uint64(self._right_size), np.empty_like(values)
        right = values - left * np.uint64(self._right_size)
        rounds = list(enumerate(self._words))
        for i, word in reversed(rounds) if undo else rounds:
            moving, fixed, size = (right, left, self._right_size) if i % 2 else (left, right, self._left_size)
            hashed = _hash_below(size, fixed, word, scratch)
            # Modulo size: both terms are below it, so adding or subtracting `size` once is enough; where that is not
            # needed, the other of the two numbers has wrapped to a huge one, which `minimum` drops.
            if undo:
                moving -= hashed
                np.add(moving, np.uint64(size), out=scratch)
            else:
                moving += hashed
                np.subtract(moving, np.uint64(size), out=scratch)
            np.minimum(moving, scratch, out=moving)
        return left * np.uint64(self._right_size) + right


KeyedPermutation: TypeAlias = ShuffledTable | FeistelNetwork


class BlockShuffle:
    """Permutation of [0, samples) in which each window of indices maps to `window_blocks` blocks and to no others.

    Blocks of consecutive positions (a chunk's or a shard's rows) are shuffled; consecutive shuffled blocks form a
    window; samples are shuffled within each window, with that window's own key. The last block may be short and is
    shuffled to anywhere: every block then gets a slot of equal width, and the short block's slot ends in a gap.

    Args:
        samples: number of samples, ≥ 1.
        key: bytes that determine the order.
        block: consecutive positions per block, ≥ 1; the last block may have fewer.
        window_blocks: blocks per window, ≥ 1; the last window may have fewer.
    """

    def __init__(self, samples: int, key: bytes, *, block: int, window_blocks: int) -> None:
        self._samples = samples
        self._key = key
        self._block = block = min(block, samples)
        blocks = -(-samples // block)
        self._gap = blocks * block - samples
        self._blocks = keyed_permutation(blocks, subkeys(key, "blocks"))
        short_slot = int(self._blocks.backward(np.array([blocks - 1]))[0])
        self._gap_begin = (short_slot + 1) * block - self._gap
        window_blocks = min(window_blocks, blocks)
        self._window = window_blocks * block
        self._short_window = short_slot // window_blocks

    def forward(self, index: Positions) -> Positions:
        """Return the position of the sample at each index of the order."""
        placed = np.empty_like(index)
        for window, where in _groups(self._skip_gap(index) // self._window):
            begin, shuffle = self._window_shuffle(window)
            placed[where] = shuffle.forward(index[where] - begin) + begin
        padded = self._skip_gap(placed)
        slot = padded // self._block
        return padded + (_forward_distinct(self._blocks, slot) - slot) * self._block

    def _skip_gap(self, index: Positions) -> Positions:
        return index + np.where(index >= self._gap_begin, self._gap, 0)

    def _window_shuffle(self, window: int) -> tuple[int, KeyedPermutation]:
        """Return the first index of a window and the shuffle of its samples."""
        begin = window * self._window - (self._gap if window > self._short_window else 0)
        full = self._window - (self._gap if window == self._short_window else 0)
        size = min(full, self._samples - begin)
        return begin, keyed_permutation(size, subkeys(self._key, f"window {window}"))


def _forward_distinct(permutation: KeyedPermutation, numbers: Positions) -> Positions:
    """Return `permutation.forward(numbers)`, computing repeated numbers in a narrow range once each."""
    if numbers.size == 0:
        return numbers
    first, last = int(numbers.min()), int(numbers.max())
    if last - first >= numbers.size:
        return permutation.forward(numbers)
    return permutation.forward(np.arange(first, last + 1))[numbers - first]


def _groups(windows: Positions) -> Iterator[tuple[int, Positions | slice]]:
    """Yield each window that occurs and its indices: slices where windows are in order, as in sequential iteration."""
    ordered = bool(np.all(windows[:-1] <= windows[1:]))
    by_window = None if ordered else np.argsort(windows, kind="stable")
    sorted_windows = windows if by_window is None else windows[by_window]
    edges = [0, *(np.flatnonzero(np.diff(sorted_windows)) + 1).tolist(), windows.size]
    for begin, end in pairwise(edges):
        if begin < end:
            yield int(sorted_windows[begin]), slice(begin, end) if by_window is None else by_window[begin:end]


def _hash_below(size: int, half: _Words, word: np.uint64, out: _Words) -> _Words:
    """Write a keyed hash of each number, spread over [0, size), into `out` and return it.

    MurmurHash3's finaliser without its first shift, since halves have no high bits to fold down, and without its last,
    which would only improve low bits: only the top bits are used, scaled to `size`.
    """
    spare_bits = np.uint64(64 - size.bit_length())
    np.bitwise_xor(half, word, out=out)
    np.multiply(out, _MULTIPLY_1, out=out)
    out ^= out >> _SHIFT
    np.multiply(out, _MULTIPLY_2, out=out)
    # Keeps the top `spare_bits` bits, so that the product with `size` stays below 2^64.
    np.right_shift(out, np.uint64(64) - spare_bits, out=out)
    np.multiply(out, np.uint64(size), out=out)
    return np.right_shift(out, spare_bits, out=out)


def _murmur(words: _Words) -> _Words:
    """Return MurmurHash3's 64-bit finaliser of each word, a bijection; every input bit affects every output bit."""
    words = (words ^ (words >> _SHIFT)) * _MULTIPLY_1
    words = (words ^ (words >> _SHIFT)) * _MULTIPLY_2
    return words ^ (words >> _SHIFT)
