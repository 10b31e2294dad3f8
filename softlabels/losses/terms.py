"""What are losses made of? The checks and the terms that more than one of them has.

Source: Hinton, Vinyals, Dean 2015, sections 2 and 2.1; the reference is `softlabels.softmath`.
"""

from __future__ import annotations

import math
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
    """A distillation loss and what it is made of, all scalars.

    Attributes:
        total: soft_weight soft + hard_weight hard; call `backward` on this.
        soft: what the loss makes of the soft targets, T² included; in plain distillation the cross-entropy.
        hard: mean cross-entropy with the labels at T = 1 over the labelled rows; 0 where there are none.
        kl: mean KL(p, q) at T in nats of the distributions that the loss compares, not times T², without gradient: 0
            when the student has learnt the targets, while a cross-entropy stops at the targets' own entropy.
    """

    total: Tensor
    soft: Tensor
    hard: Tensor
    kl: Tensor


class SoftRows(NamedTuple):
    """Targets and student as distributions at the targets' T.

    Attributes:
        logp_BC: of the targets, without gradient; the most negative number where p is 0.
        p_BC: of the targets, without gradient.
        logq_BC: of the student.
    """

    logp_BC: Tensor
    p_BC: Tensor
    logq_BC: Tensor

    def entropy(self) -> Tensor:
        """H(p) of each row, nats, [B]."""
        return -(self.logp_BC * self.p_BC).sum(dim=-1)

    def cross_entropy(self) -> Tensor:
        """-sum_i p_i log q_i of each row, nats, [B]."""
        # Where p = 0 a class adds nothing, even if the student rules it out too and log q is -inf.
        return -torch.where(self.p_BC == 0, 0.0, self.p_BC * self.logq_BC).sum(dim=-1)

    def kl(self, cross_entropy_B: Tensor) -> Tensor:
        """Mean KL(p, q), nats, without gradient, of what `cross_entropy` gave."""
        return (cross_entropy_B.detach().mean() - self.entropy().mean()).clamp_min(0.0)  # rounding may leave -1e-7


def soft_rows(z_BC: Tensor, targets: SoftTargetBatch) -> SoftRows:
    """Both sides at the targets' T, in the dtype of `z_BC`."""
    with torch.no_grad():
        logp_BC = torch.log_softmax(targets.tempered().to(z_BC.dtype), dim=-1)
        p_BC = logp_BC.exp()
        # In place, on what is ours alone: 0 times the most negative number is 0, and 0 times -inf is not.
        logp_BC.clamp_min_(torch.finfo(logp_BC.dtype).min)
    return SoftRows(logp_BC, p_BC, torch.log_softmax(z_BC / targets.temperature, dim=-1))


def hard_term(z_BC: Tensor, labels_B: Tensor | None) -> Tensor:
    """Cross-entropy with the labels at T = 1, its mean over the labelled rows; 0 without any."""
    if labels_B is None:
        return z_BC.new_zeros(())
    summed = functional.cross_entropy(z_BC, labels_B, ignore_index=UNLABELLED, reduction="sum")
    return summed / (labels_B != UNLABELLED).sum().clamp_min(1)


def weighted_sum(*, soft: Tensor, hard: Tensor, kl: Tensor, soft_weight: float, hard_weight: float) -> LossParts:
    """The parts with their total."""
    return LossParts(total=soft_weight * soft + hard_weight * hard, soft=soft, hard=hard, kl=kl)


def matched(student_logits_BC: Tensor, targets: SoftTargetBatch) -> Tensor:
    """The student's logits in the dtype the loss works in, once it is certain that they belong to these targets.

    Raises:
        ShapeMismatchError: another number of rows or classes than the targets have.
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
    """The teacher's own logits v_BC, up to a row constant.

    Args:
        targets: as a store gave them.
        dtype: of the result.
        purpose: what the logits are wanted for, for the message.
        otherwise: the loss that takes such targets, for the message.
    Raises:
        TemperatureLockedError: locked targets, a mean of probabilities for one, hold no teacher's logits.
        NonFiniteLogitsError: a row holds NaN or an infinity.
    """
    if targets.locked:
        raise TemperatureLockedError(
            f"these targets are locked to temperature {targets.captured_temperature}, as an arithmetic mean, a cut "
            f"or a sampled row is: they hold no teacher's logits to {purpose}. Use {otherwise}, or precompute whole "
            "rows of one teacher or of the geometric mean",
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
    """The weight of a term as a float; `RequestError` unless it is a finite number of 0 or more."""
    if isinstance(weight, Real) and not isinstance(weight, bool):
        try:
            value = float(weight)
        except OverflowError:
            value = math.inf
        if math.isfinite(value) and value >= 0:
            return value
    raise RequestError(
        f"{name} is {weight!r}; a term of the loss is weighed with a finite number of 0 or more", name=name
    )
