"""Checks and terms that several losses share.

Source: Hinton, Vinyals, Dean 2015, sections 2 and 2.1; the reference implementation is `softlabels.softmath`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from softlabels.errors import (
    EmptyBatchError,
    NonFiniteLogitsError,
    RequestError,
    ShapeMismatchError,
    TemperatureLockedError,
)
from softlabels.losses.target_batch import SoftTargetBatch, widened
from softlabels.softmath import UNLABELLED


class LossParts(NamedTuple):
    """A distillation loss and its terms, all scalars.

    Attributes:
        total: soft_weight soft + hard_weight hard; call `backward` on this.
        soft: loss on the soft targets, T² included; in Hinton's objective the cross-entropy.
        hard: mean cross-entropy with the labels at T = 1 over the labelled rows; 0 if there are none.
        kl: mean KL(p, q) at T in nats, without T² and without gradient, of the distributions that the loss compares: 0
            when the student has learnt the targets, whereas the cross-entropy stops at the targets' entropy.
    """

    total: Tensor
    soft: Tensor
    hard: Tensor
    kl: Tensor


@dataclass(frozen=True, eq=False)
class SoftRows:
    """Targets and student as distributions at the targets' T.

    Attributes:
        logp_BC: log-probabilities of the targets, without gradient; the lowest finite number where p is 0.
        p_BC: probabilities of the targets, without gradient.
        logq_BC: log-probabilities of the student.
    """

    logp_BC: Tensor
    p_BC: Tensor
    logq_BC: Tensor

    def entropy_B(self) -> Tensor:
        """Return H(p) of each row, nats."""
        return -(self.logp_BC * self.p_BC).sum(dim=-1)

    @cached_property
    def cross_entropy_B(self) -> Tensor:
        """-sum_i p_i log q_i of each row, nats."""
        # A class of p = 0 adds nothing, even if the student gives it 0 as well and log q is -inf.
        return -torch.where(self.p_BC == 0, 0.0, self.p_BC * self.logq_BC).sum(dim=-1)

    def kl(self) -> Tensor:
        """Return the mean KL(p, q), nats, without gradient."""
        with torch.no_grad():
            # Rounding may leave -1e-7.
            return (self.cross_entropy_B.mean() - self.entropy_B().mean()).clamp_min(0.0)


def soft_rows(z_BC: Tensor, targets: SoftTargetBatch) -> SoftRows:
    """Return both distributions at the targets' T, in the dtype of `z_BC`."""
    with torch.no_grad():
        logp_BC = torch.log_softmax(targets.tempered().to(z_BC.dtype), dim=-1)
        p_BC = logp_BC.exp()
        # 0 times the lowest finite number is 0, but 0 times -inf is NaN.
        logp_BC.clamp_min_(torch.finfo(logp_BC.dtype).min)
    return SoftRows(logp_BC, p_BC, torch.log_softmax(z_BC / targets.temperature, dim=-1))


def hard_term(z_BC: Tensor, labels_B: Tensor | None) -> Tensor:
    """Return the mean cross-entropy with the labels at T = 1 over the labelled rows; 0 without any."""
    if labels_B is None:
        return z_BC.new_zeros(())
    summed = functional.cross_entropy(z_BC, labels_B, ignore_index=UNLABELLED, reduction="sum")
    return summed / (labels_B != UNLABELLED).sum().clamp_min(1)


def loss_parts(
    z_BC: Tensor, targets: SoftTargetBatch, rows: SoftRows, *, soft: Tensor, soft_weight: float, hard_weight: float
) -> LossParts:
    """Return a loss with this soft term, the hard term beside it, and the KL divergence of the rows."""
    hard = hard_term(z_BC, targets.labels_B)
    total = check_weight("soft_weight", soft_weight) * soft + check_weight("hard_weight", hard_weight) * hard
    return LossParts(total=total, soft=soft, hard=hard, kl=rows.kl())


def matched(student_logits_BC: Tensor, targets: SoftTargetBatch) -> Tensor:
    """Return the student's logits in the dtype of the loss, after checks against the targets.

    Raises:
        ShapeMismatchError: the number of rows or classes differs from the targets'.
        EmptyBatchError: no rows.
        RequestError: targets on another device.
    """
    student, stored = list(student_logits_BC.shape), list(targets.logits_BC.shape)
    if len(student) != 2 or student[1] != stored[1]:
        raise ShapeMismatchError(
            f"the student gives shape {student} and the targets have {stored[1]} classes: give the student's last "
            f"layer {stored[1]} outputs, in the order of the teacher's classes, and pass [rows, classes]",
            student=student,
            targets=stored,
        )
    if student[0] != stored[0]:
        raise ShapeMismatchError(
            f"the student gives {student[0]} rows and there are targets for {stored[0]}: ask for the targets of "
            "exactly the ids that the student saw",
            student=student,
            targets=stored,
        )
    if student[0] == 0:
        raise EmptyBatchError("the batch has no rows, so a mean over it is not a number: skip it")
    if student_logits_BC.device != targets.logits_BC.device:
        raise RequestError(
            f"the student's logits are on {student_logits_BC.device} and the targets on {targets.logits_BC.device}: "
            "move them once with targets.to(device)"
        )
    return widened(student_logits_BC)


def whole_logits(targets: SoftTargetBatch, *, dtype: torch.dtype, purpose: str, otherwise: str) -> Tensor:
    """Return the teacher's own logits v_BC, up to a row constant.

    Args:
        targets: targets as a store returned them.
        dtype: type of the result.
        purpose: verb for the message, for example "match".
        otherwise: loss that accepts such targets, for the message.
    Raises:
        TemperatureLockedError: locked targets, for example a mean of probabilities, hold no teacher's logits.
        NonFiniteLogitsError: a row holds NaN or an infinity.
    """
    if targets.locked:
        raise TemperatureLockedError(
            f"these targets are locked to temperature {targets.captured_temperature}, as arithmetic means, truncated "
            f"and sampled rows are: they hold no teacher's logits to {purpose}. Use {otherwise}, or precompute all "
            "classes of one teacher or of the geometric mean",
            captured=targets.captured_temperature,
        )
    v_BC = targets.logits_BC.to(dtype) * targets.captured_temperature
    unsound_B = ~torch.isfinite(v_BC).all(dim=-1)
    if bool(unsound_B.any()):
        rows = unsound_B.nonzero().flatten().tolist()
        raise NonFiniteLogitsError(
            f"target rows {rows[:8]} hold NaN or an infinity, so they have no mean to {purpose} about: use "
            f"{otherwise}, which takes -inf as a probability of 0",
            rows=rows[:8],
        )
    return v_BC


def check_weight(name: str, weight: object) -> float:
    """Return the weight of a term as a float; raise RequestError unless it is finite and not negative."""
    if isinstance(weight, Real) and not isinstance(weight, bool):
        try:
            value = float(weight)
        except OverflowError:
            value = math.inf
        if math.isfinite(value) and value >= 0:
            return value
    raise RequestError(f"{name} is {weight!r}; the weight of a loss term is a finite number of at least 0", name=name)
