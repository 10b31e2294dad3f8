"""Learning a `Basis` encoding from a pilot of real rows, for a given row size.

Directions are the principal components of the pilot's rows (minus each row's mean, since logits are free up to a
constant). Bits are assigned one by one to the direction whose expected squared error shrinks most: reverse
water-filling (Cover and Thomas 2006, § 10.3.3) in whole bits. A pilot overstates the variance of its first components
on other rows and understates that of the last, so variances are corrected by how a basis of three quarters of the pilot
does on the last quarter.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.encodings.basis import EXACT, Basis, largest_sum
from softlabels.encodings.bit_packing import BitPacking
from softlabels.encodings.quantised import FLOOR, UNITS, WIDEST, distortion, levels_of
from softlabels.errors import EncodingError
from softlabels.softmath import kl_divergence, log_soften

MIN_PILOT_ROWS = 16
_INT16_MAX = 32767


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Principal components of a pilot.

    Attributes:
        directions_RC: orthonormal, by decreasing variance.
        variances_R: variances of the coefficients, corrected to rows outside the pilot.
        reach_R: largest absolute coefficient in the pilot.
        mean_C: mean row.
        depth: largest distance of a row's median below its maximum.
    """

    directions_RC: NDArray[np.float64]
    variances_R: NDArray[np.float64]
    reach_R: NDArray[np.float64]
    mean_C: NDArray[np.float64]
    depth: float


def spectrum_of(pilot_BC: NDArray[np.floating[Any]]) -> Spectrum:
    """Return the principal components of rows of logits.

    Raises:
        EncodingError: too few rows, or one that is not finite.
    """
    rows = np.asarray(pilot_BC, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < MIN_PILOT_ROWS or not np.isfinite(rows).all():
        raise EncodingError(
            f"a basis is learnt from at least {MIN_PILOT_ROWS} finite rows of logits, not from an array of shape "
            f"{list(rows.shape)}: give a larger pilot, or use an encoding that learns nothing ('q8')",
            rows=[],
        )
    depth = float((rows.max(axis=1) - np.median(rows, axis=1)).max())
    centred = rows - rows.mean(axis=1, keepdims=True)
    mean_C = centred.mean(axis=0)
    directions, variances = _principal(centred - mean_C)
    variances = variances * _held_out_correction(centred, len(variances))
    reach_R = np.abs((centred - mean_C) @ directions.T).max(axis=0)
    return Spectrum(directions_RC=directions, variances_R=variances, reach_R=reach_R, mean_C=mean_C, depth=depth)


def learn_basis(
    pilot_BC: NDArray[np.floating[Any]],
    *,
    row_bytes: int,
    temperatures: Sequence[float] = (1.0, 4.0),
    max_rank: int | None = None,
    goals: Mapping[float, float] | None = None,
    heads: Sequence[int] = (2, 3, 4, 6, 8, 16, 24),
    residuals: Sequence[int] = (0, 2, 3, 4, 5, 6),
    refine: int = 4,
) -> Basis:
    """Return the basis encoding that fits into `row_bytes` per row and does best on a held-out fifth of the pilot.

    Args:
        pilot_BC: rows of logits as a store keeps them; thousands are better than hundreds.
        row_bytes: upper limit of a row's size.
        temperatures: temperatures at which KL is measured; their geometric mean is minimised.
        goals: wanted KL by temperature, instead of `temperatures`: the largest KL/goal is minimised.
        max_rank: upper limit of directions; decoding time grows with it.
        heads: sizes of the head to try.
        residuals: bits of the residual to try, 0 for none.
        refine: see `Basis`.
    Raises:
        EncodingError: the pilot is too small or not finite, or nothing fits into `row_bytes`.
    """
    pilot = np.asarray(pilot_BC, dtype=np.float64)
    held_out = max(1, len(pilot) // 5)
    limits: dict[str, Any] = {"row_bytes": row_bytes, "max_rank": max_rank, "refine": refine}
    spectrum = spectrum_of(pilot[:-held_out])
    choices: list[tuple[float, int, int]] = []
    for residual_bits, head in product(residuals, heads):
        tried = build_basis(spectrum, head=head, residual_bits=residual_bits, **limits)
        if tried is not None:
            choices.append((_score(tried, pilot[-held_out:], temperatures, goals), head, residual_bits))
    if not choices:
        raise EncodingError(
            f"no basis of {pilot.shape[1]} classes fits into {row_bytes} bytes a row: allow more", rows=[]
        )
    _, head, residual_bits = min(choices)
    final = build_basis(spectrum_of(pilot), head=head, residual_bits=residual_bits, **limits)
    assert final is not None, "the same sizes have just fitted"
    return final


def build_basis(
    spectrum: Spectrum, *, row_bytes: int, head: int, residual_bits: int, max_rank: int | None = None, refine: int = 4
) -> Basis | None:
    """Return the basis encoding of these sizes, or None if they leave no bits for coefficients."""
    classes = spectrum.mean_C.size
    if head >= classes:
        return None
    empty = Basis(
        classes=classes,
        head=head,
        head_bits=8 if row_bytes < 200 else 12,
        depth=float(np.float32(min(FLOOR, 1.25 * max(spectrum.depth, 1e-3)))),
        residual_bits=residual_bits,
        unit_log2=0,
        refine=refine,
        basis_RC=np.zeros((0, classes), np.int16),
        mean_C=np.zeros(classes, np.int32),
        widths_R=np.zeros(0, np.uint8),
    )
    budget = row_bytes - empty.size_bytes
    widths = allocate(spectrum.variances_R[:max_rank], budget) if budget > 0 else empty.widths_R
    if not len(widths):
        return None
    unit_log2, basis_RC, mean_C = _as_integers(spectrum, widths)
    return replace(empty, unit_log2=unit_log2, basis_RC=basis_RC, mean_C=mean_C, widths_R=widths)


def allocate(variances_R: NDArray[np.float64], budget_bytes: int) -> NDArray[np.uint8]:
    """Return the bits of each coefficient, decreasing, with the least expected squared error in so many bytes."""
    widths = np.zeros(len(variances_R), dtype=np.uint8)
    gains = [(-variance * (1.0 - distortion(1)), j) for j, variance in enumerate(variances_R) if variance > 0]
    heapq.heapify(gains)
    order: list[int] = []
    while gains and len(order) < 8 * budget_bytes:
        _, j = heapq.heappop(gains)
        widths[j] += 1
        order.append(j)
        if widths[j] < WIDEST:
            gain = distortion(int(widths[j])) - distortion(int(widths[j]) + 1)
            heapq.heappush(gains, (-variances_R[j] * gain, j))
    # Bit planes end on whole bytes, so the last few bits may not fit and are taken back.
    while order and BitPacking(tuple(int(w) for w in widths[widths > 0])).size_bytes > budget_bytes:
        widths[order.pop()] -= 1
    # Sorted, because the last bit taken back may leave a direction without bits before others with some.
    used = int((widths > 0).sum())
    return np.sort(widths)[::-1][:used].copy()


def _principal(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return orthonormal directions and variances, decreasing; directions without variance are left out."""
    _, sizes, directions = np.linalg.svd(rows, full_matrices=False)
    kept = sizes > max(1e-6 * float(sizes[0]), 1e-9)
    # Signs are normalised, so that one pilot always gives one basis.
    signs = np.sign(directions[np.arange(len(directions)), np.abs(directions).argmax(axis=1)])
    return (directions * signs[:, None])[kept], sizes[kept] ** 2 / len(rows)


def _held_out_correction(centred: NDArray[np.float64], rank: int) -> NDArray[np.float64]:
    """Return factors that correct variances along the pilot's own directions to variances on other rows."""
    cut = 3 * len(centred) // 4
    mean_C = centred[:cut].mean(axis=0)
    directions, variances = _principal(centred[:cut] - mean_C)
    if not len(directions):
        return np.ones(rank)
    elsewhere = (((centred[cut:] - mean_C) @ directions.T) ** 2).mean(axis=0)
    span = max(1, len(variances) // 32)
    smooth = np.ones(span) / span
    ratio = np.convolve(elsewhere, smooth, "same") / np.maximum(np.convolve(variances, smooth, "same"), 1e-12)
    at = np.linspace(0, len(ratio) - 1, rank)
    return np.clip(np.interp(at, np.arange(len(ratio)), ratio), 0.25, 16.0)


def _as_integers(spectrum: Spectrum, widths_R: NDArray[np.uint8]) -> tuple[int, NDArray[np.int16], NDArray[np.int32]]:
    """Return basis and mean in the finest power-of-two unit in which sums stay below 2²⁴ and entries fit int16."""
    rank = len(widths_R)
    widest = np.array([levels_of(int(width))[-1] / UNITS for width in widths_R])
    # At 5 bits and more tails are heavy: the outermost level covers the largest coefficient of the pilot.
    high_rate = widths_R >= 5
    deviation_R = np.sqrt(spectrum.variances_R[:rank])
    deviation_R = np.where(high_rate, np.maximum(deviation_R, spectrum.reach_R[:rank] / widest), deviation_R)
    scaled = spectrum.directions_RC[:rank] * (deviation_R / UNITS)[:, None]
    for unit_log2 in range(-40, 1):
        basis = np.rint(scaled * 2.0**-unit_log2)
        mean = np.rint(spectrum.mean_C * 2.0**-unit_log2)
        if np.abs(basis).max() <= _INT16_MAX and largest_sum(basis, mean, widths_R) < EXACT:
            return unit_log2, basis.astype(np.int16), mean.astype(np.int32)
    raise EncodingError("the pilot's logits span too wide a range for a basis of integers: check the teacher", rows=[])


def _score(
    encoding: Basis, rows: NDArray[np.float64], temperatures: Sequence[float], goals: Mapping[float, float] | None
) -> float:
    decoded = encoding.decode(encoding.encode(rows)).astype(np.float64)
    if goals:
        return max(_mean_kl(rows, decoded, T) / goal for T, goal in goals.items())
    return sum(float(np.log(_mean_kl(rows, decoded, T) + 1e-12)) for T in temperatures)


def _mean_kl(rows: NDArray[np.float64], decoded: NDArray[np.float64], temperature: float) -> float:
    exact, kept = log_soften(rows, temperature=temperature), log_soften(decoded, temperature=temperature)
    return float(kl_divergence(exact, kept).mean())
