"""The order of an epoch's samples: a pure function of store digest, seed and epoch number."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np

from softlabels.errors import RequestError
from softlabels.order.permutation import LONGEST, BlockShuffle, KeyedPermutation, Positions, keyed_permutation, subkeys

ORDER_VERSION = b"softlabels-ord-1"
"""Sixteen bytes that enter every key. A published order never changes; another algorithm gets another name."""

WINDOW_BLOCKS = 16
"""Default number of blocks that a block shuffle mixes: with 1,024 rows of 2 KB each, 32 MB held by the reader."""

_LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True)
class EpochOrder:
    """Order in which an epoch visits a store's samples: each once, identical on every machine and in every version.

    Uses a small constant amount of memory; any part can be computed without the rest.

    Args:
        store_digest: digest of the store; another store has another order.
        samples: number of samples in the store, 1 … 2⁴⁸.
        seed: training-run seed, 0 … 2⁶⁴ - 1.
        epoch: epoch number, 0 … 2⁶⁴ - 1.
        block: None shuffles all samples globally. A number shuffles blocks of that many consecutive positions, then
            samples within each window of `window_blocks` blocks, for stores where random reads are expensive. The rows
            of a chunk or of a shard are good blocks.
        window_blocks: blocks that a reader holds in memory at once.
        shuffle: False keeps the store's order.
    Raises:
        RequestError: a number outside its range, or a block without a shuffle.
    """

    store_digest: str
    samples: int
    _: KW_ONLY
    seed: int
    epoch: int
    block: int | None = None
    window_blocks: int = WINDOW_BLOCKS
    shuffle: bool = True

    def __post_init__(self) -> None:
        if not self.store_digest:
            raise RequestError("the epoch order depends on the store's digest, which is empty: pass the manifest's")
        require_int("samples", self.samples, 1, LONGEST)
        require_int("seed", self.seed, 0, _LARGEST_SEED)
        require_int("epoch", self.epoch, 0, _LARGEST_SEED)
        require_int("window_blocks", self.window_blocks, 1, LONGEST)
        if self.block is not None:
            require_int("block", self.block, 1, LONGEST)
            if not self.shuffle:
                raise RequestError(
                    "block only applies to shuffling, and shuffle is False: leave block out; the store's own order "
                    "already reads chunk by chunk",
                    block=self.block,
                )

    def __len__(self) -> int:
        return self.samples

    def positions_at(self, indices: Positions) -> Positions:
        """Return the store positions of the samples at these indices of the epoch.

        Args:
            indices: int64, shape [B], each 0 ≤ index < samples; repeats are allowed.
        Returns:
            int64, shape [B].
        Raises:
            RequestError: an index outside the epoch.
        """
        if indices.ndim != 1 or indices.dtype.kind not in "iu":
            raise RequestError(f"indices must be a 1-D integer array, not {indices.dtype} of shape {indices.shape}")
        if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < self.samples:
            raise RequestError(f"indices must lie in 0 … {self.samples - 1}: this epoch has {self.samples} samples")
        indices = indices.astype(np.int64, copy=False)
        # A copy: the result never shares memory with the argument, as with a permutation.
        return indices.copy() if self._permutation is None else self._permutation.forward(indices)

    @cached_property
    def _permutation(self) -> KeyedPermutation | BlockShuffle | None:
        if not self.shuffle:
            return None
        digest = self.store_digest.encode()
        numbers = (len(digest), self.seed, self.epoch)
        material = b"".join(number.to_bytes(8, "little") for number in numbers) + digest
        key = blake2b(material, person=ORDER_VERSION).digest()
        if self.block is None:
            return keyed_permutation(self.samples, subkeys(key, "samples"))
        return BlockShuffle(self.samples, key, block=self.block, window_blocks=self.window_blocks)


def require_int(name: str, value: int, least: int, most: int) -> None:
    """Raise RequestError unless `value` is an integer in [least, most]; values arrive from URLs and files too."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be an integer, not {value!r}", name=name)
    if not least <= value <= most:
        raise RequestError(f"{name} must lie in {least} … {most}, not {value}", name=name)
