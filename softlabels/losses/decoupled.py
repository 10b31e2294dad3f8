"""Decoupled distillation (DKD): separate weights for the label and for the other classes. Name `dkd`.

With t the label of a row, the KL divergence of distillation is a sum (the paper's reformulation),

    KL(p, q) = TCKD + (1 - p_t) NCKD,    TCKD = KL((p_t, 1 - p_t), (q_t, 1 - q_t)),
                                         NCKD = KL(p without t, q without t), both normalised to sum to 1,

so a teacher that is sure of the label suppresses what it knows of the others. DKD weighs the terms separately:
alpha TCKD + beta NCKD.
Source: Zhao, Cui, Song, Qiu, Liang 2022, "Decoupled knowledge distillation", CVPR.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softlabels.errors import RequestError
from softlabels.losses.standardisation import Deviation, standardised
from softlabels.losses.target_batch import SoftTargetBatch
from softlabels.losses.terms import LossParts, SoftRows, check_weight, loss_parts, matched, soft_rows
from softlabels.softmath import UNLABELLED


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
    tckd_B, nckd_B = _terms(rows, labels_B.clamp_min(0))
    whole_B = rows.cross_entropy_B - rows.entropy_B()
    split_B = target_share * tckd_B + other_share * nckd_B
    soft = targets.temperature**2 * torch.where(labels_B != UNLABELLED, split_B, target_share * whole_B).mean()
    return loss_parts(z_BC, targets, rows, soft=soft, soft_weight=soft_weight, hard_weight=hard_weight)


def _terms(rows: SoftRows, target_B: Tensor) -> tuple[Tensor, Tensor]:
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
