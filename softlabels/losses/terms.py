"""Checks and terms that several losses share, and z-scores, which compare logits without their scale.

Source: Hinton, Vinyals, Dean 2015, sections 2 and 2.1; the reference implementation is `softlabels.softmath`.

With z-scores the student learns the teacher's relations between classes, not logits of the same range. They are divided
by a base temperature, here the T that the targets carry, and T² multiplies the soft term; the hard term uses the
student's own logits. The paper's algorithm 1 divides by the deviation of all C classes (`population`). The authors'
published code uses the sample's, with C - 1, which amounts to a T larger by sqrt(C/(C - 1)) (`sample`), and adds 1e-7
to it, which is not done here.
Source: Sun, Ren, Li, Wang, Cao 2024, "Logit standardization in knowledge distillation", CVPR, algorithms 1 and 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional

from softlabels.documents import did_you_mean
from softlabels.errors import (
    EmptyBatchError,
    NonFiniteLogitsError,
    RequestError,
    ShapeMismatchError,
    TemperatureLockedError,
)
from softlabels.losses.target_batch import SoftTargetBatch, widened
from softlabels.softmath import UNLABELLED, finite

Deviation = Literal["population", "sample"]


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
    value = finite(weight)
    if value is not None and value >= 0:
        return value
    raise RequestError(f"{name} is {weight!r}; the weight of a loss term is a finite number of at least 0", name=name)


def standardise_logits(logits_BC: Tensor, *, deviation: Deviation = "population") -> Tensor:
    """Return the z-scores of each row: mean 0, standard deviation 1, whatever the row's offset and scale.

    A row whose classes are equal up to rounding has no scale: it becomes zeros, without a gradient.

    Args:
        logits_BC: finite, floating point.
        deviation: `population` divides the sum of squares by C, as the paper does; `sample` by C - 1.
    Raises:
        RequestError: unknown deviation.
    """
    kind = check_deviation(deviation)
    gap_BC = logits_BC - logits_BC.mean(dim=-1, keepdim=True)
    varied_B1 = varies(logits_BC, gap_BC, dim=-1)
    gap_BC = torch.where(varied_B1, gap_BC, 0.0)
    classes = logits_BC.shape[-1]
    variance_B1 = gap_BC.square().sum(dim=-1, keepdim=True) / (classes if kind == "population" else max(classes - 1, 1))
    # Selected before the root, because the root of 0 has no gradient.
    return gap_BC / torch.where(varied_B1, variance_B1, 1.0).sqrt()


def standardised(z_BC: Tensor, targets: SoftTargetBatch, deviation: Deviation | None) -> tuple[Tensor, SoftTargetBatch]:
    """Return student and targets as z-scores, or as they are if the deviation is None. The targets keep T and labels.

    Raises:
        TemperatureLockedError: locked targets, for example a mean of probabilities, hold no teacher's logits.
        NonFiniteLogitsError: a target row holds NaN or an infinity, as truncated rows do.
        RequestError: unknown deviation.
    """
    if deviation is None:
        return z_BC, targets
    v_BC = whole_logits(targets, dtype=z_BC.dtype, purpose="standardise", otherwise="a loss without `standardise`")
    scored = targets.with_fields(logits_BC=standardise_logits(v_BC, deviation=deviation), captured_temperature=1.0)
    return standardise_logits(z_BC, deviation=deviation), scored


def varies(values: Tensor, gaps: Tensor, *, dim: int) -> Tensor:
    """Tell whether values differ from their mean along `dim` by more than rounding, or are NaN; `dim` is kept."""
    rounding = 8 * torch.finfo(values.dtype).eps  # the mean of equal values is off by about one eps
    largest, scale = (part.detach().abs().amax(dim, keepdim=True) for part in (gaps, values))
    return ~(largest <= rounding * scale)


def check_deviation(deviation: object) -> Deviation:
    """Return the deviation. Raise RequestError unless it is a known one."""
    if not isinstance(deviation, str) or deviation not in get_args(Deviation):
        raise RequestError(
            f"there is no standard deviation {deviation!r}{did_you_mean(deviation, get_args(Deviation))}; choose "
            "'population' (the paper's algorithm) or 'sample' (the authors' code)",
            deviation=repr(deviation),
        )
    return cast(Deviation, deviation)
