"""Which sample comes when in an epoch: a pure function of the store's digest, a seed and the epoch's number."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np

from softlabels.errors import RequestError
from softlabels.order.permutation import (
    LONGEST,
    BlockShuffle,
    InOrder,
    Permutation,
    Positions,
    keyed_permutation,
    subkeys,
)

ORDER_VERSION = b"softlabels-ord-1"
"""Sixteen bytes that enter every key. An order once published never changes; another algorithm has another name."""

WINDOW_BLOCKS = 16
"""Blocks that a block shuffle mixes unless told otherwise: of 1,024 rows of 2 KB, 32 MB that a reader has in hand."""

_LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True)
class EpochOrder:
    """The order in which an epoch visits a store's samples: each once, the same on every machine, for ever.

    It takes the same small memory whatever the number of samples, and any part of it costs only that part.

    Args:
        store_digest: the store's digest; another store has another order.
        samples: how many the store holds, 1 … 2⁴⁸.
        seed: 0 … 2⁶⁴ - 1, one a training run.
        epoch: 0 … 2⁶⁴ - 1; each has an order of its own.
        block: None shuffles all samples among each other. A number shuffles blocks of so many consecutive positions,
            then the samples in each window of `window_blocks` of these: for stores whose rows are dear to fetch one
            by one. A chunk's rows or a shard's are good blocks.
        window_blocks: how many blocks a reader is willing to have in hand at once.
        shuffle: False leaves the samples in the store's order.
    Raises:
        RequestError: a number outside these ranges, or a block without a shuffle.
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
            raise RequestError(
                "an epoch's order hangs on the store's digest, and this one is empty: pass the manifest's"
            )
        require_int("samples", self.samples, 1, LONGEST)
        require_int("seed", self.seed, 0, _LARGEST_SEED)
        require_int("epoch", self.epoch, 0, _LARGEST_SEED)
        require_int("window_blocks", self.window_blocks, 1, LONGEST)
        if self.block is not None:
            require_int("block", self.block, 1, LONGEST)
            if not self.shuffle:
                raise RequestError(
                    "a block is for shuffling, and shuffle is False: leave block out, the store's own order is as kind "
                    "to its chunks as can be",
                    block=self.block,
                )

    def __len__(self) -> int:
        return self.samples

    def positions(self, start: int, stop: int) -> Positions:
        """The positions in the store of the samples at the places [start, stop) of the epoch.

        Returns:
            int64, shape [stop - start].
        Raises:
            RequestError: not 0 ≤ start ≤ stop ≤ samples.
        """
        require_int("stop", stop, 0, self.samples)
        require_int("start", start, 0, stop)
        return self._permutation.forward(np.arange(start, stop, dtype=np.int64))

    def positions_at(self, places: Positions) -> Positions:
        """The positions in the store of the samples at any places of the epoch, in the order given.

        Args:
            places: int64, shape [B], each 0 ≤ place < samples; they may repeat.
        Returns:
            int64, shape [B].
        Raises:
            RequestError: a place outside the epoch.
        """
        return self._permutation.forward(self._checked("places", places))

    def index_of(self, positions: Positions) -> Positions:
        """The places in the epoch of the samples at these positions of the store: the inverse of `positions_at`.

        Args:
            positions: int64, shape [B], each 0 ≤ position < samples; they may repeat.
        Returns:
            int64, shape [B].
        Raises:
            RequestError: a position outside the store.
        """
        return self._permutation.backward(self._checked("positions", positions))

    def _checked(self, name: str, values: Positions) -> Positions:
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise RequestError(f"{name} must be a flat array of integers, not {values.dtype} of shape {values.shape}")
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < self.samples:
            raise RequestError(f"{name} must lie in 0 … {self.samples - 1}: this epoch has {self.samples} samples")
        return values.astype(np.int64, copy=False)

    @cached_property
    def _permutation(self) -> Permutation:
        if not self.shuffle:
            return InOrder()
        if self.block is None:
            return keyed_permutation(self.samples, subkeys(self._key, "samples"))
        return BlockShuffle(self.samples, self._key, block=self.block, window_blocks=self.window_blocks)

    @property
    def _key(self) -> bytes:
        """64 bytes that everything random about this epoch comes from."""
        digest = self.store_digest.encode()
        numbers = (len(digest), self.seed, self.epoch)
        material = b"".join(number.to_bytes(8, "little") for number in numbers) + digest
        return blake2b(material, person=ORDER_VERSION).digest()


def require_int(name: str, value: int, least: int, most: int) -> None:
    """Refuse what is not an integer in [least, most]; callers outside Python's types reach this from URLs and files."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be an integer, not {value!r}", name=name)
    if not least <= value <= most:
        raise RequestError(f"{name} must lie in {least} … {most}, not {value}", name=name)
