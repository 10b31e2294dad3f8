"""How much of a target is about the label, how much about the other classes? Decoupled distillation (DKD).

With t the label of a row, the KL divergence of plain distillation is a sum (the paper's reformulation),

    KL(p, q) = TCKD + (1 - p_t) NCKD,    TCKD = KL((p_t, 1 - p_t), (q_t, 1 - q_t)),
                                         NCKD = KL(p without t, q without t), both made to sum to 1 again,

so that a teacher sure of the label mutes what it knows of the others. DKD weighs the two apart: alpha TCKD + beta NCKD.
Source: Zhao, Cui, Song, Qiu, Liang 2022, "Decoupled knowledge distillation", CVPR.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softlabels.errors import RequestError
from softlabels.losses.standardisation import Deviation, standardised
from softlabels.losses.target_batch import SoftTargetBatch
from softlabels.losses.terms import LossParts, SoftRows, check_weight, hard_term, matched, soft_rows, weighted_sum
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
    """soft_weight T² (alpha TCKD + beta NCKD) + hard_weight CE(label, q at T = 1), means over the rows.

    An unlabelled row cannot be taken apart: it has alpha T² KL(p, q), the plain term that DKD is made from. Where the
    teacher gives all to the label (a cut row may) there are no other classes to learn, and NCKD is 0. Locked targets
    are as good as any: both terms are of probabilities at one T. The authors raise soft_weight from 0 to 1 over the
    first epochs (20 on CIFAR-100, 1 on ImageNet); that is the caller's to do.

    Args:
        student_logits_BC: raw outputs of the student, not tempered, on the targets' device.
        targets: as a store gave them, with labels; they carry T.
        alpha: of TCKD.
        beta: of NCKD; 0.5 to 8 in the authors' configurations.
        hard_weight: of the labels; 1 in the authors' configurations.
        soft_weight: of both soft terms.
        standardise: compare z-scores, of this standard deviation, instead of logits (`losses.standardised`).
    Raises:
        RequestError: targets without labels; targets on another device; a weight that is negative or not finite.
        ShapeMismatchError, EmptyBatchError, TemperatureLockedError, NonFiniteLogitsError: as `distillation_loss`.
    """
    hard_share, soft_share = check_weight("hard_weight", hard_weight), check_weight("soft_weight", soft_weight)
    target_share, other_share = check_weight("alpha", alpha), check_weight("beta", beta)
    z_BC = matched(student_logits_BC, targets)
    labels_B = targets.labels_B
    if labels_B is None:
        raise RequestError(
            "decoupled distillation takes a target apart at its label, and these targets have none: train from inputs "
            "that bring labels, precompute with labels, or use distillation_loss, which needs none"
        )
    compared_BC, aims = (z_BC, targets) if standardise is None else standardised(z_BC, targets, standardise)
    rows = soft_rows(compared_BC, aims)
    tckd_B, nckd_B = _decoupled(rows, labels_B.clamp_min(0))
    cross_entropy_B = rows.cross_entropy()
    plain_B = cross_entropy_B - rows.entropy()
    apart_B = target_share * tckd_B + other_share * nckd_B
    soft = targets.temperature**2 * torch.where(labels_B != UNLABELLED, apart_B, target_share * plain_B).mean()
    hard = hard_term(z_BC, labels_B)
    return weighted_sum(
        soft=soft, hard=hard, kl=rows.kl(cross_entropy_B), soft_weight=soft_share, hard_weight=hard_share
    )


def _decoupled(rows: SoftRows, target_B: Tensor) -> tuple[Tensor, Tensor]:
    # (TCKD, NCKD) of each row. In logarithms throughout: 1 - q_t of a sure student would be 0 in float32.
    at_B1 = target_B.unsqueeze(-1)
    lowest = torch.finfo(rows.logp_BC.dtype).min
    with torch.no_grad():
        logp_others_BC = rows.logp_BC.scatter(-1, at_B1, lowest)
        logp_rest_B1 = torch.logsumexp(logp_others_BC, dim=-1, keepdim=True)
        logp_hat_BC = logp_others_BC - logp_rest_B1
        # Nothing is left where only classes of p = 0 are; and what is left is never the label itself.
        p_hat_BC = torch.where(logp_others_BC > lowest / 2, logp_hat_BC.exp(), 0.0)
    # A finite number in the label's place, as -inf has no gradient where nothing else is left.
    logq_others_BC = rows.logq_BC.scatter(-1, at_B1, lowest)
    logq_rest_B1 = torch.logsumexp(logq_others_BC, dim=-1, keepdim=True)
    logq_hat_BC = torch.log_softmax(logq_others_BC, dim=-1)
    nckd_B = torch.where(p_hat_BC == 0, 0.0, p_hat_BC * (logp_hat_BC - logq_hat_BC)).sum(dim=-1)
    on_target_B1 = _term(rows.logp_BC.gather(-1, at_B1), rows.logq_BC.gather(-1, at_B1))
    return (on_target_B1 + _term(logp_rest_B1, logq_rest_B1)).squeeze(-1), nckd_B


def _term(logp: Tensor, logq: Tensor) -> Tensor:
    # p log(p/q), and 0 where p is 0.
    p = logp.exp()
    return torch.where(p == 0, 0.0, p * (logp - logq))
