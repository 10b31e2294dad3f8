"""Sampled rows and their peers at equal bytes: distance of a few kept classes from the whole row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from softlabels.encodings import Encoding, rng_keys

Rows = NDArray[np.float32]


def sampled_error(encoding: Encoding, rows: Rows, p_BC: NDArray[np.float64], *, repeats: int) -> tuple[float, float]:
    """RMS over positions and repeats of ‖q - p‖, and the z-score of the mean error along a fixed direction."""
    direction_C = np.random.default_rng(1).choice([-1.0, 1.0], size=p_BC.shape[1])
    squares, along = [], []
    for repeat in range(max(8, repeats)):
        keys = rng_keys("bench", np.arange(len(rows)), repeat)
        for start in range(0, len(rows), 16):
            part = slice(start, start + 16)
            encoded = encoding.encode(rows[part], keys_B=keys[part])
            error_BC = np.exp(encoding.decode(encoded).astype(np.float64)) - p_BC[part]
            squares.append(np.square(error_BC).sum(axis=1))
            along.append(error_BC @ direction_C)
    found = np.concatenate(along)
    return float(np.sqrt(np.concatenate(squares).mean())), float(found.mean() / (found.std() / np.sqrt(len(found))))


def renormalised_error(p_BC: NDArray[np.float64], kept: int) -> float:
    """RMS of ‖q - p‖ for the `kept` largest scaled to sum to 1 (4 bytes each: id and value)."""
    ordered = -np.sort(-p_BC, axis=1)
    mass_B1 = ordered[:, :kept].sum(axis=1, keepdims=True)
    inside = np.square(ordered[:, :kept] * (1 / mass_B1 - 1)).sum(axis=1)
    return float(np.sqrt((inside + np.square(ordered[:, kept:]).sum(axis=1)).mean()))


def importance_error(p_BC: NDArray[np.float64], distinct: int, *, repeats: int) -> float:
    """RMS of ‖q - p‖ for independent draws from p, as many as give `distinct` ids (4 bytes each: id and count)."""
    rng = np.random.default_rng(2)
    squares = []
    for p_C in p_BC:
        upto = np.cumsum(p_C)
        for _ in range(max(2, repeats // 8)):
            ids = np.searchsorted(upto, rng.random(20 * distinct + 2000) * upto[-1], side="right")
            _, first = np.unique(ids, return_index=True)
            first.sort()
            ids = ids[: first[distinct]] if len(first) > distinct else ids
            found, counts = np.unique(np.minimum(ids, len(p_C) - 1), return_counts=True)
            q = counts / len(ids)
            squares.append(np.square(p_C).sum() - np.square(p_C[found]).sum() + np.square(q - p_C[found]).sum())
    return float(np.sqrt(np.mean(squares)))
