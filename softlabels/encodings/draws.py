"""Where do random numbers of a sampled row come from, so that the same row always gets the same ones?

They are a function of (store, sample, view) and of nothing else: no state, no order. A capture that is cut and resumed,
on another machine or with another batch size, draws the same again, bit for bit. The mixing function is SplitMix64
(Steele, Lea, Flood 2014), whose counter form passes BigCrush.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.ids import IdArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def draw_keys(store: str, ids: IdArray, views: NDArray[np.integer[Any]] | int = 0) -> NDArray[np.uint64]:
    """One key a row, uint64 [B].

    Args:
        store: what names the capture and stays the same when it resumes.
        ids: [B] sample ids.
        views: [B] view numbers, or one for all.
    """
    base = np.uint64(
        int.from_bytes(blake2b(store.encode(), digest_size=8, person=b"softlabels/draw").digest(), "little")
    )
    if ids.dtype.kind == "U":
        hashed = [blake2b(str(id_).encode(), digest_size=8).digest() for id_ in ids]
        numbers = np.frombuffer(b"".join(hashed), dtype="<u8").astype(np.uint64)
    else:
        numbers = ids.astype(np.int64).view(np.uint64)
    per_view = mix(np.broadcast_to(np.asarray(views, dtype=np.int64), ids.shape).view(np.uint64))
    return mix(mix(numbers ^ base) + per_view)


def uniforms(keys_B: NDArray[np.uint64], stream: int) -> NDArray[np.float64]:
    """Uniform in [0, 1), one a key, on a grid of 2⁻⁵³; streams are independent of each other."""
    with np.errstate(over="ignore"):
        mixed = mix(keys_B + _GOLDEN * np.uint64(stream + 1))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's step: each number to one that looks random."""
    with np.errstate(over="ignore"):
        x = x + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * _FIRST
        x = (x ^ (x >> np.uint64(27))) * _SECOND
        return np.asarray(x ^ (x >> np.uint64(31)), dtype=np.uint64)
