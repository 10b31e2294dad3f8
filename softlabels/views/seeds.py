"""Which random numbers make a view: seeds that follow from (store, sample, view) alone, the same on every machine."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from softlabels.ids import IdArray


def view_seeds(key: str, ids: IdArray, views_B: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The seed of each view, by counter and not by sequence: a resumed or reordered run draws the same ones.

    Args:
        key: the store's `views.seed_key`.
        ids: [B] sample ids.
        views_B: [B] the views' numbers, from 0.
    Returns:
        uint64, shape [B], below 2^63 so that every library takes them: BLAKE2b of key, id and view.
    """
    seeds = np.empty(len(ids), dtype=np.uint64)
    for row, (sample_id, view) in enumerate(zip(ids.tolist(), views_B.tolist(), strict=True)):
        kind = "i" if isinstance(sample_id, int) else "s"
        text = f"{key}\0{kind}{sample_id}\0{view}".encode()
        seeds[row] = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
    return seeds
