"""Is a kept row the one that was kept, and whose? Checksums over the row's bytes, its key, its field and its store.

Legend: B rows, W little-endian 64-bit words of a row.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from softlabels.ids import IdArray, to_fixed_bytes, utf8
from softlabels.manifest import Manifest
from softlabels.splitmix64 import finalise, sequence

Words = NDArray[np.uint64]

_FOLD = np.uint64(32)
_AT_ONCE = 8192
"""Words: 64 KiB, which the allocator also keeps for the next time."""


def seed_of(*parts: str) -> int:
    """A number below 2⁶⁴ that stands for these strings."""
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "little")


class RowChecks:
    """Checksums of one field's rows: a changed word always shows, anything else but once in 2⁶⁴.

    Args:
        words: W, of a row.
        seed: of the field and the store.
    """

    def __init__(self, words: int, seed: int) -> None:
        # Odd factors: no single changed word leaves the sum as it was.
        self._factors = sequence(seed, words) | np.uint64(1)
        self._seed = np.uint64(seed)

    def of(self, words_BW: Words, keys_B: Words) -> Words:
        """The checksums of these rows, [B], never 0: that is what a row has that was not kept."""
        sums = finalise(keys_B ^ self._seed)
        # A few rows at a time: what was just folded is still in the processor's cache when it is summed.
        at_once = max(1, _AT_ONCE // len(self._factors))
        folded = np.empty((min(at_once, len(sums)), len(self._factors)), dtype=np.uint64)
        for begin in range(0, len(sums), at_once):
            part_BW = words_BW[begin : begin + at_once]
            # Folded, because the highest bit of a word times any odd number is the same: two would cancel out.
            folded_BW = np.right_shift(part_BW, _FOLD, out=folded[: len(part_BW)])
            folded_BW ^= part_BW
            sums[begin : begin + at_once] += np.einsum("bw,w->b", folded_BW, self._factors)
        checks: Words = np.maximum(sums, np.uint64(1))
        return checks


class RowKeys:
    """What rows are found by: a sample's id and its view, as one number each, and a second one to be certain.

    Where ids count up, the first is the row's number in the store; elsewhere both are hashes, 128 bits together.

    Args:
        manifest: of a store that keeps one row, or one a view, for each sample.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._ids, self._layout = manifest.ids, manifest.layout
        width_words = -(-max(manifest.ids.width_bytes, 8) // 8)
        self._factors = [sequence(seed_of("row keys", which), width_words) | np.uint64(1) for which in ("1", "2")]

    @property
    def dense(self) -> bool:
        """Whether keys are row numbers."""
        return self._ids.dense_start is not None

    def of(self, ids: IdArray, views: NDArray[np.int64] | None) -> tuple[Words, Words] | None:
        """The keys of these samples' views, [B] each; None where some cannot be in the store, or no view was named."""
        if (views is None) != (self._layout.kind == "single") or (ids.dtype.kind == "U") != (self._ids.kind == "str"):
            return None
        if views is not None and (
            views.shape != ids.shape or bool(((views < 0) | (views >= self._layout.views)).any())
        ):
            return None
        if self._ids.dense_start is None:
            return self._hashed(ids, views)
        positions = ids.astype(np.int64, copy=False) - self._ids.dense_start
        if bool(((positions < 0) | (positions >= self._layout.samples)).any()):
            return None
        rows = (positions if views is None else positions * self._layout.views + views).astype(np.uint64)
        return rows, rows

    def _hashed(self, ids: IdArray, views: NDArray[np.int64] | None) -> tuple[Words, Words] | None:
        if ids.dtype.kind == "U":
            width = self._factors[0].size * 8
            if utf8(ids).dtype.itemsize > self._ids.width_bytes:
                return None
            words_BW = to_fixed_bytes(ids, width_bytes=width).view("<u8")
        else:
            words_BW = ids.astype(np.int64, copy=False).view(np.uint64)[:, None]
        first, second = (np.einsum("bw,w->b", finalise(words_BW), factors) for factors in self._factors)
        if views is not None:
            first += sequence(1, self._layout.views)[views]
            second += sequence(2, self._layout.views)[views]
        return np.maximum(finalise(first), np.uint64(1)), finalise(second)
