"""SplitMix64: hashing of 64-bit integers, and random numbers that depend on a counter instead of a generator's state.

The random numbers of a row are a function of (store, sample, view), so an interrupted capture that resumes on another
machine or with another batch size draws the same numbers, bit for bit. Stores, fingerprints and cache files depend on
every constant here.
Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", OOPSLA; passes BigCrush.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.ids import IdArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2⁶⁴ divided by the golden ratio: the increment of the generator's counter."""

_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def finalise(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the generator's output for each counter: a bijection on uint64 that maps 0 to 0."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * _FIRST
        x = (x ^ (x >> np.uint64(27))) * _SECOND
        return np.asarray(x ^ (x >> np.uint64(31)), dtype=np.uint64)


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the generator's next output for each state: a hash of 64-bit integers."""
    with np.errstate(over="ignore"):
        return finalise(x + GOLDEN)


def sequence(seed: int, count: int) -> NDArray[np.uint64]:
    """Return the first outputs of the generator with this seed, shape [count]."""
    with np.errstate(over="ignore"):
        return finalise(np.uint64(seed) + GOLDEN * np.arange(1, count + 1, dtype=np.uint64))


def rng_keys(store: str, ids: IdArray, views: NDArray[np.integer[Any]] | int = 0) -> NDArray[np.uint64]:
    """Return one random-number key for each row, shape [B].

    Args:
        store: name that identifies the capture and stays the same when it resumes.
        ids: sample ids, shape [B].
        views: view numbers, shape [B], or one number for all rows.
    """
    digest = blake2b(store.encode(), digest_size=8, person=b"softlabels/draw").digest()
    base = np.uint64(int.from_bytes(digest, "little"))
    if ids.dtype.kind == "U":
        hashed = [blake2b(str(id_).encode(), digest_size=8).digest() for id_ in ids]
        numbers = np.frombuffer(b"".join(hashed), dtype="<u8").astype(np.uint64)
    else:
        numbers = ids.astype(np.int64).view(np.uint64)
    per_view = splitmix64(np.broadcast_to(np.asarray(views, dtype=np.int64), ids.shape).view(np.uint64))
    return splitmix64(splitmix64(numbers ^ base) + per_view)


def uniforms(keys_B: NDArray[np.uint64], stream: int) -> NDArray[np.float64]:
    """Return one number in [0, 1) for each key, a multiple of 2⁻⁵³; different streams are independent."""
    with np.errstate(over="ignore"):
        mixed = splitmix64(keys_B + GOLDEN * np.uint64(stream + 1))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
