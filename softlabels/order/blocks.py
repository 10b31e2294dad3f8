"""Where does each sample go when the reader should touch only a few blocks of consecutive samples at a time?

Three steps, each of them a bijection that is computed, not stored:
1. The samples are cut into blocks of consecutive positions (a chunk's or a shard's rows); the blocks are shuffled.
2. Consecutive shuffled blocks form a window.
3. The samples of a window are shuffled among each other, with a key of that window's own.

The last block may be short, and then it lies anywhere among the shuffled ones. Every slot is given the same width
and the short block's slot ends in a hole, so arithmetic stays simple: `_with_hole` and `_without_hole`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np

from softlabels.order.permutation import Permutation, Positions, keyed_permutation, subkeys


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
