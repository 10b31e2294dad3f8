"""The distillation losses: Hinton's objective (`kd`), logit matching, decoupled (`dkd`) and correlations (`dist`).

Hinton, Vinyals, Dean 2015, sections 2 and 2.1: soft targets and labels at once, and logit matching, the limit of high
temperatures. The reference implementation is `softlabels.softmath`.

Zhao, Cui, Song, Qiu, Liang 2022, "Decoupled knowledge distillation", CVPR (DKD): with t the label of a row, the KL
divergence of distillation is a sum,

    KL(p, q) = TCKD + (1 - p_t) NCKD,    TCKD = KL((p_t, 1 - p_t), (q_t, 1 - q_t)),
                                         NCKD = KL(p without t, q without t), both normalised to sum to 1,

so a teacher that is sure of the label suppresses what it knows of the others. DKD weighs the terms separately.

Huang, You, Wang, Qian, Xu 2022, "Knowledge distillation from a stronger teacher", NeurIPS (DIST): a correlation of 1
preserves the teacher's relations and leaves the student its own scale. With Pearson's rho,

    inter = mean over rows i of 1 - rho(p_i, q_i),  intra = mean over classes j of the same over the batch's rows.

T² multiplies both, as in the authors' published code. Unlike a divergence, a correlation hardly falls with T, so at
high T the soft term grows as T²; soft_weight = 1/T² cancels that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softlabels.errors import RequestError
from softlabels.losses.target_batch import SoftTargetBatch
from softlabels.losses.terms import (
    Deviation,
    LossParts,
    SoftRows,
    check_weight,
    hard_term,
    loss_parts,
    matched,
    soft_rows,
    standardised,
    varies,
    whole_logits,
)
from softlabels.softmath import UNLABELLED


def distillation_loss(
    student_logits_BC: Tensor,
    targets: SoftTargetBatch,
    *,
    hard_weight: float = 0.5,
    soft_weight: float = 1.0,
    standardise: Deviation | None = None,
) -> LossParts:
    """Return soft_weight T² CE(p, q at T) + hard_weight CE(label, q at T = 1).

    The soft term is the cross-entropy, as in the paper. The KL divergence, which has the same gradient and differs by
    the targets' entropy, is reported beside it. Unlabelled rows have the soft term alone.

    Args:
        student_logits_BC: raw outputs of the student, not tempered, on the targets' device.
        targets: targets as a store returned them; they carry T.
        hard_weight: weight of the labels; the paper recommends a considerably lower weight than the soft one.
        soft_weight: weight of the soft term.
        standardise: compare z-scores with this standard deviation instead of logits (`standardise_logits`); its authors
            use T = 2, soft_weight = 9 and hard_weight = 0.1 for CIFAR-100.
    Raises:
        ShapeMismatchError: the number of rows or classes differs from the targets'.
        EmptyBatchError: no rows.
        RequestError: targets on another device, a weight that is negative or not finite, or an unknown deviation.
        TemperatureLockedError, NonFiniteLogitsError: targets without a teacher's logits cannot be standardised.
    """
    z_BC = matched(student_logits_BC, targets)
    rows = soft_rows(*standardised(z_BC, targets, standardise))
    soft = targets.temperature**2 * rows.cross_entropy_B.mean()
    return loss_parts(z_BC, targets, rows, soft=soft, soft_weight=soft_weight, hard_weight=hard_weight)


def soft_loss(student_logits_BC: Tensor, targets: SoftTargetBatch) -> Tensor:
    """Return the soft term alone: T² times the batch mean of CE(p, q), both at the targets' T.

    The gradient of the cross-entropy falls as 1/T²; T² keeps its balance with the hard term when T changes.
    """
    return targets.temperature**2 * soft_rows(matched(student_logits_BC, targets), targets).cross_entropy_B.mean()


def hard_loss(student_logits_BC: Tensor, targets: SoftTargetBatch) -> Tensor:
    """Return the hard term alone: mean cross-entropy with the labels at T = 1 over labelled rows; 0 without any."""
    return hard_term(matched(student_logits_BC, targets), targets.labels_B)


def logit_matching_loss(student_logits_BC: Tensor, targets: SoftTargetBatch) -> Tensor:
    """Return half the mean squared difference of zero-meaned logits over rows and classes (Caruana).

    Its gradient is (z - v)/N per row of N classes, the limit of the gradient of `soft_loss`, T² included, for large T.

    Raises:
        TemperatureLockedError: locked targets, for example a mean of probabilities, hold no teacher's logits.
        NonFiniteLogitsError: a target row holds NaN or an infinity and so has no mean.
        ShapeMismatchError, EmptyBatchError, RequestError: as in `distillation_loss`.
    """
    z_BC = matched(student_logits_BC, targets)
    v_BC = whole_logits(targets, dtype=z_BC.dtype, purpose="match", otherwise="distillation_loss")
    gap_BC = (z_BC - z_BC.mean(dim=-1, keepdim=True)) - (v_BC - v_BC.mean(dim=-1, keepdim=True))
    return 0.5 * gap_BC.square().mean()


def decoupled_loss(
    student_logits_BC: Tensor,
    targets: SoftTargetBatch,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    hard_weight: float = 1.0,
    soft_weight: float = 1.0,
    standardise: Deviation | None = None,
) -> LossParts:
    """Return soft_weight T² (alpha TCKD + beta NCKD) + hard_weight CE(label, q at T = 1), means over the rows.

    An unlabelled row cannot be decomposed: it contributes alpha T² KL(p, q). If the teacher gives the label all of the
    mass (a truncated row may), NCKD is 0. Locked targets work as well as others, since both terms are of probabilities
    at one T. The authors raise soft_weight from 0 to 1 over the first epochs (20 on CIFAR-100, 1 on ImageNet), which is
    left to the caller.

    Args:
        student_logits_BC, soft_weight, standardise: as in `distillation_loss`.
        targets: targets with labels.
        alpha: weight of TCKD.
        beta: weight of NCKD; 0.5 to 8 in the authors' configurations.
        hard_weight: weight of the labels; 1 in the authors' configurations.
    Raises:
        RequestError: targets without labels. The other errors are those of `distillation_loss`.
    """
    target_share, other_share = check_weight("alpha", alpha), check_weight("beta", beta)
    z_BC = matched(student_logits_BC, targets)
    labels_B = targets.labels_B
    if labels_B is None:
        raise RequestError(
            "decoupled distillation splits a target at its label, and these targets have none: train from inputs with "
            "labels, precompute with labels, or use distillation_loss, which needs none"
        )
    rows = soft_rows(*standardised(z_BC, targets, standardise))
    tckd_B, nckd_B = _decoupled_terms(rows, labels_B.clamp_min(0))
    whole_B = rows.cross_entropy_B - rows.entropy_B()
    split_B = target_share * tckd_B + other_share * nckd_B
    soft = targets.temperature**2 * torch.where(labels_B != UNLABELLED, split_B, target_share * whole_B).mean()
    return loss_parts(z_BC, targets, rows, soft=soft, soft_weight=soft_weight, hard_weight=hard_weight)


def _decoupled_terms(rows: SoftRows, target_B: Tensor) -> tuple[Tensor, Tensor]:
    # (TCKD, NCKD) of each row. In logarithms throughout: 1 - q_t of a confident student would be 0 in float32.
    at_B1 = target_B.unsqueeze(-1)
    lowest = torch.finfo(rows.logp_BC.dtype).min
    with torch.no_grad():
        logp_others_BC = rows.logp_BC.scatter(-1, at_B1, lowest)
        logp_rest_B1 = torch.logsumexp(logp_others_BC, dim=-1, keepdim=True)
        logp_hat_BC = logp_others_BC - logp_rest_B1
        # Classes of p = 0 stay at 0 even if nothing else is left, and so does the label.
        p_hat_BC = torch.where(logp_others_BC > lowest / 2, logp_hat_BC.exp(), 0.0)
    # A finite number in the label's place: -inf would have a gradient of NaN if no other class is left.
    logq_others_BC = rows.logq_BC.scatter(-1, at_B1, lowest)
    logq_rest_B1 = torch.logsumexp(logq_others_BC, dim=-1, keepdim=True)
    logq_hat_BC = torch.log_softmax(logq_others_BC, dim=-1)
    nckd_B = torch.where(p_hat_BC == 0, 0.0, p_hat_BC * (logp_hat_BC - logq_hat_BC)).sum(dim=-1)
    on_target_B1 = _kl_term(rows.logp_BC.gather(-1, at_B1), rows.logq_BC.gather(-1, at_B1))
    return (on_target_B1 + _kl_term(logp_rest_B1, logq_rest_B1)).squeeze(-1), nckd_B


def _kl_term(logp: Tensor, logq: Tensor) -> Tensor:
    # p log(p/q), and 0 where p is 0.
    p = logp.exp()
    return torch.where(p == 0, 0.0, p * (logp - logq))


def relation_loss(
    student_logits_BC: Tensor,
    targets: SoftTargetBatch,
    *,
    beta: float = 2.0,
    gamma: float = 2.0,
    hard_weight: float = 1.0,
    soft_weight: float = 1.0,
) -> LossParts:
    """Return soft_weight T² (beta inter + gamma intra) + hard_weight CE(label, q at T = 1).

    A correlation needs values that vary. Where the teacher's do not (a batch of one row, a class truncated in every
    row), the term is 0, and the mean is still over all B rows and C classes. Where only the student's do not, the
    correlation counts as 0 and has no gradient. Locked targets work as well as others, since only probabilities at one
    T are compared.

    Args:
        student_logits_BC, soft_weight: as in `distillation_loss`.
        targets: targets; T is 1 for ImageNet and 4 for CIFAR-100 in the authors' configurations.
        beta: weight of the relations between a row's classes; like gamma 2 in the authors' configurations.
        gamma: weight of the relations between the batch's rows, class by class; larger batches show more of them.
        hard_weight: weight of the labels; 1 in the authors' configurations.
    Raises:
        RequestError, ShapeMismatchError, EmptyBatchError: as in `distillation_loss`.
    """
    inter_share, intra_share = check_weight("beta", beta), check_weight("gamma", gamma)
    z_BC = matched(student_logits_BC, targets)
    rows = soft_rows(z_BC, targets)
    q_BC = rows.logq_BC.exp()
    inter, intra = _distance(rows.p_BC, q_BC, dim=1), _distance(rows.p_BC, q_BC, dim=0)
    soft = targets.temperature**2 * (inter_share * inter + intra_share * intra)
    return loss_parts(z_BC, targets, rows, soft=soft, soft_weight=soft_weight, hard_weight=hard_weight)


def _distance(p_BC: Tensor, q_BC: Tensor, *, dim: int) -> Tensor:
    # 1 - rho along `dim`, averaged over the other dimension.
    teacher_varies, p_gaps = _unit_gaps(p_BC, dim)
    _, q_gaps = _unit_gaps(q_BC, dim)
    return torch.where(teacher_varies, 1 - (p_gaps * q_gaps).sum(dim, keepdim=True), 0.0).mean()


def _unit_gaps(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    # (whether the values vary, their differences from the mean as a unit vector, zeros where they do not vary)
    gaps = values - values.mean(dim, keepdim=True)
    varied = varies(values, gaps, dim=dim)
    # Divided by the largest first, which leaves the unit vector as it is: squares of rare classes would underflow to 0.
    largest = torch.where(varied, gaps.detach().abs().amax(dim, keepdim=True), 1.0)
    scaled = torch.where(varied, gaps, 0.0) / largest
    squares = scaled.square().sum(dim, keepdim=True)
    return varied, scaled / torch.where(varied, squares, 1.0).sqrt()
