"""Does the student rank as the teacher does? Correlations of probabilities, within rows and within classes (DIST).

A correlation of 1 asks for the teacher's relations and leaves the student its own scale. With Pearson's rho,

    inter = mean over rows i of 1 - rho(p_i, q_i),  intra = mean over classes j of the same over the batch's rows.

T² stands before both as in the authors' published code. Unlike a divergence a correlation hardly falls with T, so
that at high T the soft term grows as T²: soft_weight = 1/T² takes that back.
Source: Huang, You, Wang, Qian, Xu 2022, "Knowledge distillation from a stronger teacher", NeurIPS.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softlabels.losses.standardisation import varies
from softlabels.losses.target_batch import SoftTargetBatch
from softlabels.losses.terms import LossParts, check_weight, hard_term, matched, soft_rows, weighted_sum


def relation_loss(
    student_logits_BC: Tensor,
    targets: SoftTargetBatch,
    *,
    beta: float = 2.0,
    gamma: float = 2.0,
    hard_weight: float = 1.0,
    soft_weight: float = 1.0,
) -> LossParts:
    """soft_weight T² (beta inter + gamma intra) + hard_weight CE(label, q at T = 1).

    A correlation needs values that vary. Where the teacher's do not (every class of a batch of one row, a class that
    is cut from every row) there is no relation to keep: it adds 0, and the mean is still over all B rows and C classes.
    Where the student's alone do not, the correlation counts as 0 and gives no gradient. Locked targets are as good as
    any, since probabilities at one T are all that is compared.

    Args:
        student_logits_BC: raw outputs of the student, not tempered, on the targets' device.
        targets: as a store gave them; they carry T (in the authors' configurations 1 for ImageNet, 4 for CIFAR-100).
        beta: of the relations between a row's classes; this and gamma are 2 in the authors' configurations.
        gamma: of the relations between the batch's rows, class by class; larger batches show more of them.
        hard_weight: of the labels; 1 in the authors' configurations.
        soft_weight: of both soft terms.
    Raises:
        RequestError: targets on another device, or a weight that is negative or not finite.
        ShapeMismatchError, EmptyBatchError: as `distillation_loss`.
    """
    hard_share, soft_share = check_weight("hard_weight", hard_weight), check_weight("soft_weight", soft_weight)
    inter_share, intra_share = check_weight("beta", beta), check_weight("gamma", gamma)
    z_BC = matched(student_logits_BC, targets)
    rows = soft_rows(z_BC, targets)
    q_BC = rows.logq_BC.exp()
    inter, intra = _distance(rows.p_BC, q_BC, dim=1), _distance(rows.p_BC, q_BC, dim=0)
    soft = targets.temperature**2 * (inter_share * inter + intra_share * intra)
    hard = hard_term(z_BC, targets.labels_B)
    with torch.no_grad():
        kl = rows.kl(rows.cross_entropy())
    return weighted_sum(soft=soft, hard=hard, kl=kl, soft_weight=soft_share, hard_weight=hard_share)


def _distance(p_BC: Tensor, q_BC: Tensor, *, dim: int) -> Tensor:
    # The mean of 1 - rho along `dim`; a mean over what the other dimension counts.
    to_learn, p_gaps = _unit_gaps(p_BC, dim)
    _, q_gaps = _unit_gaps(q_BC, dim)
    return torch.where(to_learn, 1 - (p_gaps * q_gaps).sum(dim, keepdim=True), 0.0).mean()


def _unit_gaps(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    # (whether the values vary, their differences from the mean made a unit vector; zeros where they do not)
    gaps = values - values.mean(dim, keepdim=True)
    varied = varies(values, gaps, dim=dim)
    # By the largest first, which the unit vector does not depend on: squares of rare classes would come out as 0.
    largest = torch.where(varied, gaps.detach().abs().amax(dim, keepdim=True), 1.0)
    scaled = torch.where(varied, gaps, 0.0) / largest
    squares = scaled.square().sum(dim, keepdim=True)
    return varied, scaled / torch.where(varied, squares, 1.0).sqrt()
