"""The paper's objective and its gradients in closed form, float64: what the losses and `softmath` are tested against.

Shapes and names as in `softlabels.softmath`. Source: Hinton, Vinyals, Dean 2015, sections 2 and 2.1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.softmath import UNLABELLED, FloatArray, check_labels, check_temperature, log_soften, retemper, soften

Array = NDArray[np.float64]


def shift_rows(logits_BC: FloatArray) -> FloatArray:
    """Return the same distributions with each row's largest logit at 0, as stores hold them; the dtype of `soften`."""
    return retemper(logits_BC, captured=1.0, temperature=1.0)


def zero_mean(logits_BC: FloatArray) -> Array:
    """Return the same distributions with each row's mean at 0, as section 2.1 needs."""
    z = np.asarray(logits_BC, dtype=np.float64)
    centred: Array = z - z.mean(axis=-1, keepdims=True)
    return centred


def soft_cross_entropy(logp_BC: FloatArray, logq_BC: FloatArray) -> Array:
    """Return -sum_i p_i log q_i of each row, nats, [B]; a class with p = 0 adds nothing even where q = 0."""
    p, logq = np.exp(np.asarray(logp_BC, np.float64)), np.asarray(logq_BC, np.float64)
    with np.errstate(invalid="ignore"):
        return np.asarray(0.0 - np.where(p == 0, 0.0, p * logq).sum(axis=-1), dtype=np.float64)


def entropy(logp_BC: FloatArray) -> Array:
    """Return H(p) of each row, nats, [B]."""
    return soft_cross_entropy(logp_BC, logp_BC)


def hard_cross_entropy(student_logits_BC: FloatArray, labels_B: NDArray[Any]) -> float:
    """Return the mean of -log q_label at T = 1 over the labelled rows, nats; 0 if no row is labelled."""
    logq = log_soften(np.asarray(student_logits_BC, np.float64), temperature=1.0)
    labels = check_labels(labels_B, rows=len(logq), classes=logq.shape[-1])
    rows = np.flatnonzero(labels != UNLABELLED)
    return float(-logq[rows, labels[rows]].mean()) if rows.size else 0.0


def distillation_objective(
    student_logits_BC: FloatArray,
    logp_BC: FloatArray,
    *,
    temperature: float,
    labels_B: NDArray[Any] | None = None,
    hard_weight: float = 0.5,
    soft_weight: float = 1.0,
) -> float:
    """Return soft_weight T² CE(p, q at T) + hard_weight CE(y, q at 1), each a mean over rows; eq. 1 and section 2."""
    logq = log_soften(np.asarray(student_logits_BC, np.float64), temperature=temperature)
    soft = temperature**2 * float(soft_cross_entropy(logp_BC, logq).mean())
    hard = 0.0 if labels_B is None else hard_cross_entropy(student_logits_BC, labels_B)
    return soft_weight * soft + hard_weight * hard


def soft_gradient(student_logits_BC: FloatArray, logp_BC: FloatArray, *, temperature: float) -> Array:
    """Return d CE(p, q) / dz = (q - p)/T of each row, eq. 2: before T² and before the mean over rows."""
    q = soften(np.asarray(student_logits_BC, np.float64), temperature=temperature)
    return np.asarray((q - np.exp(np.asarray(logp_BC, np.float64))) / temperature, np.float64)


def hard_gradient(student_logits_BC: FloatArray, labels_B: NDArray[Any]) -> Array:
    """Return d CE(y, q) / dz = q - y of each row at T = 1; 0 for unlabelled rows."""
    gradient: Array = np.array(soften(np.asarray(student_logits_BC, np.float64), temperature=1.0), np.float64)
    labels = check_labels(labels_B, rows=len(gradient), classes=gradient.shape[-1])
    gradient[labels == UNLABELLED] = 0.0
    rows = np.flatnonzero(labels != UNLABELLED)
    gradient[rows, labels[rows]] -= 1.0
    return gradient


def logit_matching_gradient_limit(
    student_logits_BC: FloatArray, teacher_logits_BC: FloatArray, *, temperature: float
) -> Array:
    """Return (z - v)/(N T²), both zero-meaned, N classes: the limit of `soft_gradient` as T grows, eq. 4."""
    gap = zero_mean(student_logits_BC) - zero_mean(teacher_logits_BC)
    limit: Array = gap / (gap.shape[-1] * check_temperature(temperature) ** 2)
    return limit
