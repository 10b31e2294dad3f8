"""Where does a key send each of the numbers 0 … n - 1? A shuffle that is computed, not stored.

A long range goes through a generalised Feistel network: a number x < n is written as (left, right) with
x = left · b + right, left < a, right < b, and each round adds a hash of one half to the other, modulo a or b in turn.
Whatever the hash, a round can be undone, so all of them together are a bijection on [0, a · b). The few numbers that
land in [n, a · b), fewer than 1 in √n, go through again until they land below n (cycle walking), which makes it a
bijection on [0, n). A short range is a table instead: there the table costs little, and it is a fair shuffle even
of three numbers, which no such network is.

Every constant here is part of the orders that have been published: a change of any is a new `ORDER_VERSION`
(`docs/adr/0006-epoch-order.md` describes the whole for another language).

Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002 (generalised Feistel, cycle walking).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import pairwise
from math import isqrt
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Positions: TypeAlias = NDArray[np.int64]
_Words: TypeAlias = NDArray[np.uint64]

TABLE_LIMIT = 4096
"""Ranges up to this long are tables: 16 KB with the inverse, made in 70 µs."""

ROUNDS = 12
"""Six for either half. At 4,097, the shortest range that the network meets, four rounds put neighbours beside each
other 1.9 times as often as chance; six cannot be told from a fair shuffle over 4,000 keys; twelve are twice that."""

LONGEST = 2**48
"""With halves below 2²⁴ the hash has 39 bits to spread over a half, so no value is favoured by more than 2⁻¹⁴."""

CHUNK = 16_384
"""Numbers taken through all rounds at a time, which the order does not hang on: what stays in a core's second-level
cache (measured: 12 million numbers a second in chunks of 1,024, 31 million in chunks of 16,384)."""

# The multipliers and the shift of MurmurHash3's 64-bit finaliser (Appleby, public domain).
_MULTIPLY_1 = np.uint64(0xFF51AFD7ED558CCD)
_MULTIPLY_2 = np.uint64(0xC4CEB9FE1A85EC53)
_SHIFT = np.uint64(33)


class Permutation(Protocol):
    """A bijection on [0, size) and its inverse, elementwise over int64 arrays of any order and number."""

    def forward(self, index: Positions) -> Positions:
        """Where each number goes."""
        ...

    def backward(self, value: Positions) -> Positions:
        """Which number came here: `backward(forward(x)) == x`."""
        ...


def subkeys(key: bytes, purpose: str) -> _Words:
    """As many 64-bit words as a permutation needs, of one key for one purpose.

    Args:
        key: at most 64 bytes.
        purpose: another purpose gives unrelated words.
    Returns:
        uint64, shape [ROUNDS].
    """
    digests = (blake2b(f"{purpose}/{i}".encode(), key=key).digest() for i in range(-(-ROUNDS // 8)))
    return np.frombuffer(b"".join(digests), dtype="<u8")[:ROUNDS].astype(np.uint64)


def keyed_permutation(size: int, words: _Words) -> Permutation:
    """The permutation of [0, size) that `subkeys` chose; 1 ≤ size ≤ LONGEST."""
    assert 1 <= size <= LONGEST, "EpochOrder checks its samples"
    return ShuffledTable(size, words) if size <= TABLE_LIMIT else FeistelNetwork(size, words)


class InOrder:
    """The permutation that moves nothing."""

    def forward(self, index: Positions) -> Positions:
        """Where each number goes: where it is."""
        return index.copy()

    def backward(self, value: Positions) -> Positions:
        """Which number came here: itself."""
        return value.copy()


class ShuffledTable:
    """A fair shuffle of a short range: the numbers sorted by 64-bit hashes, no two of which are equal."""

    def __init__(self, size: int, words: _Words) -> None:
        hashes = _mixed(_mixed(np.arange(size, dtype=np.uint64) + words[0]) ^ words[1])
        order = np.argsort(hashes)
        self._forward = order.astype(np.uint16)
        self._backward = np.empty(size, dtype=np.uint16)
        self._backward[order] = np.arange(size, dtype=np.uint16)

    def forward(self, index: Positions) -> Positions:
        """Where each number goes."""
        return self._forward[index].astype(np.int64)

    def backward(self, value: Positions) -> Positions:
        """Which number came here."""
        return self._backward[value].astype(np.int64)


class FeistelNetwork:
    """A shuffle of a range of any length, in a fixed amount of memory."""

    def __init__(self, size: int, words: _Words) -> None:
        self._size = np.uint64(size)
        # The smallest near-square that holds the range: a · b - size < a.
        self._left_size = isqrt(size - 1) + 1
        self._right_size = -(-size // self._left_size)
        self._words = words

    def forward(self, index: Positions) -> Positions:
        """Where each number goes."""
        return self._in_chunks(index, self._encipher)

    def backward(self, value: Positions) -> Positions:
        """Which number came here."""
        return self._in_chunks(value, self._decipher)

    def _in_chunks(self, values: Positions, once: Callable[[_Words], _Words]) -> Positions:
        moved = np.empty(values.shape, dtype=np.int64)
        for begin in range(0, values.size, CHUNK):
            part = once(values[begin : begin + CHUNK].astype(np.uint64))
            while (outside := np.flatnonzero(part >= self._size)).size:
                part[outside] = once(part[outside])
            moved[begin : begin + CHUNK] = part
        return moved

    def _encipher(self, values: _Words) -> _Words:
        left, right, scratch = self._halves(values)
        for i, word in enumerate(self._words):
            moving, fixed, size = (right, left, self._right_size) if i % 2 else (left, right, self._left_size)
            moving += _hash_below(size, fixed, word, scratch)
            # Both lie below `size`, so one subtraction reduces; where it is not due it wraps round to something huge.
            np.subtract(moving, np.uint64(size), out=scratch)
            np.minimum(moving, scratch, out=moving)
        return left * np.uint64(self._right_size) + right

    def _decipher(self, values: _Words) -> _Words:
        left, right, scratch = self._halves(values)
        for i, word in reversed(list(enumerate(self._words))):
            moving, fixed, size = (right, left, self._right_size) if i % 2 else (left, right, self._left_size)
            moving -= _hash_below(size, fixed, word, scratch)
            np.add(moving, np.uint64(size), out=scratch)
            np.minimum(moving, scratch, out=moving)
        return left * np.uint64(self._right_size) + right

    def _halves(self, values: _Words) -> tuple[_Words, _Words, _Words]:
        left = values // np.uint64(self._right_size)
        return left, values - left * np.uint64(self._right_size), np.empty_like(values)


def _hash_below(size: int, half: _Words, word: np.uint64, out: _Words) -> _Words:
    """A keyed hash of each number, spread over [0, size); `out` is written and returned.

    Murmur's finaliser less its first shift, which would find no bits above these halves' to bring down, and its
    last, which would only mend low bits that are not used here: the top bits alone are scaled to `size`.
    """
    spare_bits = np.uint64(64 - size.bit_length())
    np.bitwise_xor(half, word, out=out)
    np.multiply(out, _MULTIPLY_1, out=out)
    out ^= out >> _SHIFT
    np.multiply(out, _MULTIPLY_2, out=out)
    np.right_shift(out, np.uint64(64) - spare_bits, out=out)
    np.multiply(out, np.uint64(size), out=out)
    return np.right_shift(out, spare_bits, out=out)


def _mixed(words: _Words) -> _Words:
    """Murmur's 64-bit finaliser: a bijection, each bit of the result hanging on each bit given."""
    words = (words ^ (words >> _SHIFT)) * _MULTIPLY_1
    words = (words ^ (words >> _SHIFT)) * _MULTIPLY_2
    return words ^ (words >> _SHIFT)


#
# Three steps, each of them a bijection that is computed, not stored:
# 1. The samples are cut into blocks of consecutive positions (a chunk's or a shard's rows); the blocks are shuffled.
# 2. Consecutive shuffled blocks form a window.
# 3. The samples of a window are shuffled among each other, with a key of that window's own.
#
# The last block may be short, and then it lies anywhere among the shuffled ones. Every slot is given the same width
# and the short block's slot ends in a hole, so arithmetic stays simple: `_with_hole` and `_without_hole`.


class BlockShuffle:
    """A permutation of [0, samples) in which each window of places draws on `window_blocks` blocks of its own.

    Args:
        samples: how many, ≥ 1.
        key: bytes that decide the order.
        block: consecutive positions in a block, ≥ 1; the last block may have fewer.
        window_blocks: blocks in a window, ≥ 1; the last window may have fewer.
    """

    def __init__(self, samples: int, key: bytes, *, block: int, window_blocks: int) -> None:
        self._samples = samples
        self._key = key
        self._block = block = min(block, samples)
        blocks = -(-samples // block)
        self._hole = blocks * block - samples
        self._blocks = keyed_permutation(blocks, subkeys(key, "blocks"))
        short_slot = int(self._blocks.backward(np.array([blocks - 1]))[0])
        self._hole_begin = (short_slot + 1) * block - self._hole
        window_blocks = min(window_blocks, blocks)
        self._window = window_blocks * block
        self._short_window = short_slot // window_blocks

    def forward(self, index: Positions) -> Positions:
        """The position of the sample at each place of the order."""
        placed = np.empty_like(index)
        for window, where in _groups(self._window_of(index)):
            begin, shuffle = self._window_shuffle(window)
            placed[where] = shuffle.forward(index[where] - begin) + begin
        padded = self._with_hole(placed)
        slot = padded // self._block
        return padded + (_few(self._blocks.forward, slot) - slot) * self._block

    def backward(self, value: Positions) -> Positions:
        """The place in the order of the sample at each position."""
        block = value // self._block
        placed = self._without_hole(value + (_few(self._blocks.backward, block) - block) * self._block)
        index = np.empty_like(value)
        for window, where in _groups(self._window_of(placed)):
            begin, shuffle = self._window_shuffle(window)
            index[where] = shuffle.backward(placed[where] - begin) + begin
        return index

    def _with_hole(self, placed: Positions) -> Positions:
        return placed + np.where(placed >= self._hole_begin, self._hole, 0)

    def _without_hole(self, padded: Positions) -> Positions:
        return padded - np.where(padded >= self._hole_begin, self._hole, 0)

    def _window_of(self, placed: Positions) -> Positions:
        return self._with_hole(placed) // self._window

    def _window_shuffle(self, window: int) -> tuple[int, Permutation]:
        """Where a window begins, and the shuffle of what it holds."""
        begin = window * self._window - (self._hole if window > self._short_window else 0)
        full = self._window - (self._hole if window == self._short_window else 0)
        size = min(full, self._samples - begin)
        return begin, keyed_permutation(size, subkeys(self._key, f"window {window}"))


def _few(move: Callable[[Positions], Positions], numbers: Positions) -> Positions:
    """`move(numbers)`, where numbers that lie close together are moved once each: a walk has a block's many times."""
    if numbers.size == 0:
        return numbers
    first, last = int(numbers.min()), int(numbers.max())
    if last - first >= numbers.size:
        return move(numbers)
    return move(np.arange(first, last + 1))[numbers - first]


def _groups(windows: Positions) -> Iterator[tuple[int, Positions | slice]]:
    """Each window that occurs, and where: slices when windows come in order, as they do on every walk."""
    ordered = bool(np.all(windows[:-1] <= windows[1:]))
    by_window = None if ordered else np.argsort(windows, kind="stable")
    sorted_windows = windows if by_window is None else windows[by_window]
    edges = [0, *(np.flatnonzero(np.diff(sorted_windows)) + 1).tolist(), windows.size]
    for begin, end in pairwise(edges):
        if begin < end:
            yield int(sorted_windows[begin]), slice(begin, end) if by_window is None else by_window[begin:end]
