"""Reference mathematics of soft targets: pure NumPy functions that every faster version is tested against.

Shapes: B rows, C classes, M members. `logits_` are natural-log units free up to a row constant, `logp_` are
log-probabilities, `p_` and `q_` probabilities (p the target's, q the student's).
Arithmetic is in float64; float16 and float32 return float32, float64 returns float64; one number a row is float64.
A logit of -inf is a class of probability 0. A row with NaN, +inf or no finite entry has no distribution: the result is
NaN, never something plausible.
Source, where nothing else is named: Hinton, Vinyals, Dean 2015, sections 2 and 2.1.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import RequestError, ShapeMismatchError, TemperatureError

FloatArray = NDArray[np.floating[Any]]
Mean = Literal["none", "arithmetic", "geometric"]

UNLABELLED = -1
"""Hard label of a sample that has none."""

_NAMED_AT_MOST = 8  # an error names this many offenders, so that a whole bad batch still reads as one sentence


def check_temperature(temperature: object) -> float:
    """Return the temperature as a float; raise TemperatureError unless it is a finite number above 0 (not True)."""
    number = finite(temperature)
    if number is not None and number > 0:
        return number
    raise TemperatureError(
        f"the temperature is {temperature!r}; logits are divided by it, so give a finite number above 0, for example "
        "4.0 (1.0 leaves the distribution as it is)",
        temperature=repr(temperature),
    )


def check_mean(mean: object) -> Mean:
    """Return the name of the mean; raise RequestError with the known names for any other."""
    for known in get_args(Mean):
        if mean == known:
            return cast(Mean, known)
    raise RequestError(f"there is no mean {mean!r}; choose 'none', 'arithmetic' or 'geometric'", mean=repr(mean))


def is_locked(mean: Mean, members: int) -> bool:
    """Return whether the mean is locked to the temperature it was taken at.

    One member, and a geometric mean, is one vector of logits and re-tempers exactly to any T. The log of an
    arithmetic mean of two or more members is not: tempering does not commute with adding probabilities.
    """
    return check_mean(mean) == "arithmetic" and members > 1


def check_weights(weights_M: Sequence[float] | FloatArray | None, members: int) -> NDArray[np.float64]:
    """Return the members' weights, scaled to sum to 1; None for equal weights.

    Raises:
        ShapeMismatchError: not one weight a member.
        RequestError: a weight that is not finite and above 0 (a member of weight 0 is to be left out instead).
    """
    if members < 1:
        raise ShapeMismatchError("a mean needs at least one member and there is none", members=members)
    weights = [1.0] * members if weights_M is None else list(weights_M)
    if len(weights) != members:
        raise ShapeMismatchError(
            f"there are {len(weights)} weights and {members} members: give one weight a member",
            weights=len(weights),
            members=members,
        )
    # Invalid weights become 0, which the check below refuses.
    share = np.array([max(finite(weight) or 0.0, 0.0) for weight in weights])
    share /= share.max() or 1.0  # first, so that the sum cannot overflow
    share /= share.sum() or 1.0
    if not (share > 0).all():
        raise RequestError(
            f"the members' weights are {weights}; each has to be a finite number above 0 and not vanish beside the "
            "others: leave a member out rather than weigh it 0",
            weights=[repr(weight) for weight in weights],
        )
    return share


def check_labels(labels_B: NDArray[Any], *, rows: int, classes: int) -> NDArray[np.int64]:
    """Return hard labels as int64, each a class or -1 for unlabelled.

    Raises:
        ShapeMismatchError: not one label a row.
        RequestError: not integers, or some outside [-1, classes), which the message names.
    """
    labels = np.asarray(labels_B)
    if labels.shape != (rows,):
        raise ShapeMismatchError(
            f"the labels have shape {list(labels.shape)} and the batch has {rows} rows: give one label a row, "
            f"{UNLABELLED} where there is none",
            labels=list(labels.shape),
            rows=rows,
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise RequestError(f"the labels are {labels.dtype}; a label is a class number, so give integers")
    bad_rows = np.flatnonzero((labels < UNLABELLED) | (labels >= classes))
    if bad_rows.size:
        named = {int(row): int(labels[row]) for row in bad_rows[:_NAMED_AT_MOST]}
        more = f" and {bad_rows.size - len(named)} more" if bad_rows.size > len(named) else ""
        listed = ", ".join(f"{label} in row {row}" for row, label in named.items())
        raise RequestError(
            f"these targets have {classes} classes, so a label is 0 to {classes - 1}, or {UNLABELLED} for unlabelled; "
            f"the batch holds {listed}{more}. Check that data and teacher share one list of classes",
            rows=list(named),
            labels=list(named.values()),
            classes=classes,
        )
    return labels.astype(np.int64, copy=False)


def soften(logits_BC: FloatArray, *, temperature: float) -> FloatArray:
    """Return soft targets: p_i = exp(z_i/T) / sum_j exp(z_j/T), eq. 1.

    Args:
        logits_BC: [..., classes].
        temperature: dimensionless, above 0; 1 leaves the distribution as the teacher gave it.
    Returns:
        p_BC, the same shape; each row sums to 1 within 1e-6.
    Raises:
        TemperatureError: the temperature is not a finite number above 0.
    """
    return _like(np.exp(_log_softmax(logits_BC, temperature)), logits_BC)


def log_soften(logits_BC: FloatArray, *, temperature: float) -> FloatArray:
    """Return log-probabilities at a temperature: the log of `soften`, exact where that underflows."""
    return _like(_log_softmax(logits_BC, temperature), logits_BC)


def retemper(logits_BC: FloatArray, *, captured: float, temperature: float) -> FloatArray:
    """Return rows at `captured` re-tempered to `temperature`: softmax at T = 1 of the result is the target.

    The largest entry of each row is 0. `is_locked` says whether targets may be re-tempered at all.
    """
    have, want = check_temperature(captured), check_temperature(temperature)
    z = _shifted(logits_BC)
    # Without the multiplication and division, which may round.
    if have == want:
        return _like(z, logits_BC)
    with np.errstate(over="ignore"):
        return _like(z * have / want, logits_BC)


def mean_arithmetic(
    logits_MBC: FloatArray, *, temperature: float, weights_M: Sequence[float] | FloatArray | None = None
) -> FloatArray:
    """Return the log of the weighted arithmetic mean of the members' distributions at one temperature.

    Returns:
        logp_BC; locked to `temperature` where there are two members or more.
    """
    z = _members(logits_MBC)
    share_M = check_weights(weights_M, len(z))
    logp_MBC = _log_softmax(z, temperature) + np.log(share_M)[:, None, None]
    peak_BC = np.maximum(logp_MBC.max(axis=0), np.finfo(np.float64).min)  # all members at -inf: no -inf minus -inf
    # log(0) = -inf is meant: a class to which every member gives probability 0.
    with np.errstate(divide="ignore"):
        return _like(np.log(np.exp(logp_MBC - peak_BC).sum(axis=0)) + peak_BC, logits_MBC)


def mean_geometric(logits_MBC: FloatArray, *, weights_M: Sequence[float] | FloatArray | None = None) -> FloatArray:
    """Return the weighted geometric mean of the members' distributions: the mean of their logits.

    Returns:
        logits_BC; softened at any T they are the normalised geometric mean of the members' distributions at that T.
    """
    z = _members(logits_MBC)
    # Weights are above 0, so that a logit of -inf stays one: 0 times -inf is NaN.
    return _like((z * check_weights(weights_M, len(z))[:, None, None]).sum(axis=0), logits_MBC)


def kl_divergence(logp_BC: FloatArray, logq_BC: FloatArray) -> NDArray[np.float64]:
    """Return KL(p, q) of each row, nats, [B]; inf where q = 0 < p.

    Summed as p log(p/q) - p + q. For rows that sum to 1 the result is the same, but no term is negative, and a row
    whose sum is off by e adds e²/2 instead of e: float32 rows differ visibly down to 1e-12 instead of 1e-7.
    """
    logp, logq = _rows(logp_BC), _rows(logq_BC)
    if logp.shape != logq.shape:
        raise ShapeMismatchError(
            f"the rows compared have shapes {list(logp.shape)} and {list(logq.shape)}: they have to be the same",
            left=list(logp.shape),
            right=list(logq.shape),
        )
    p, q = np.exp(logp), np.exp(logq)
    with np.errstate(invalid="ignore", over="ignore"):
        gap = logq - logp
        small = p * (np.expm1(gap) - gap)  # where p and q almost agree, q - p would lose its digits
        # Where p = 0, `gap` may be infinite or NaN, and p · gap would be NaN; the limit of p log p is 0.
        large = q - p - np.where(p == 0, 0.0, p * gap)
        return np.asarray(np.where(np.abs(gap) < 1, small, large).sum(axis=-1), dtype=np.float64)


def finite(value: object) -> float | None:
    """Return a real number as a float; None if it is no number, True, not finite or beyond float64."""
    with contextlib.suppress(OverflowError):
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value)
    return None


def _rows(logits_BC: FloatArray) -> NDArray[np.float64]:
    z = np.asarray(logits_BC, dtype=np.float64)
    if z.ndim == 0 or z.shape[-1] == 0:
        raise ShapeMismatchError(
            f"expected rows of at least one class, got shape {list(z.shape)}: give [rows, classes]", shape=list(z.shape)
        )
    return z


def _members(logits_MBC: FloatArray) -> NDArray[np.float64]:
    z = _rows(logits_MBC)
    if z.ndim != 3:
        raise ShapeMismatchError(
            f"expected [members, rows, classes], got shape {list(z.shape)}: stack the members first",
            shape=list(z.shape),
        )
    return z


def _shifted(logits_BC: FloatArray) -> NDArray[np.float64]:
    z = _rows(logits_BC)
    # The row maximum of a row with +inf, or of -inf alone, is infinite: inf - inf gives the NaN that the module
    # docstring promises, without a warning.
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray(z - z.max(axis=-1, keepdims=True), dtype=np.float64)


def _log_softmax(logits_BC: FloatArray, temperature: float) -> NDArray[np.float64]:
    asked = check_temperature(temperature)
    with np.errstate(over="ignore"):  # shifted first: a huge gap over a tiny T ends at -inf, a probability of 0
        z = _shifted(logits_BC) / asked
    return np.asarray(z - np.log(np.exp(z).sum(axis=-1, keepdims=True)), dtype=np.float64)


def _like(values: NDArray[np.float64], given: FloatArray) -> FloatArray:
    half_or_single = np.asarray(given).dtype in (np.float16, np.float32)
    with np.errstate(over="ignore"):
        return values.astype(np.float32) if half_or_single else values


def has_nan(array: NDArray[Any]) -> bool:
    """Return whether an array holds NaN, from its bits: ten times as fast as `isnan` of float16."""
    if array.dtype.kind != "f":
        return False
    bits = array.view(f"u{array.itemsize}")
    infinity = np.array(np.inf, dtype=array.dtype).view(bits.dtype)[()]
    # Without the sign, NaN is whatever is above infinity. By pieces that stay in the processor's cache.
    flat, piece = bits.reshape(-1), 1 << 16
    sign = bits.dtype.type(1 << (8 * array.itemsize - 1))
    return any(bool(((flat[i : i + piece] & ~sign) > infinity).any()) for i in range(0, len(flat), piece))
