"""Correlations of teacher's and student's probabilities, within rows and within classes (DIST). Name `dist`.

A correlation of 1 preserves the teacher's relations and leaves the student its own scale. With Pearson's rho,

    inter = mean over rows i of 1 - rho(p_i, q_i),  intra = mean over classes j of the same over the batch's rows.

T² multiplies both, as in the authors' published code. Unlike a divergence, a correlation hardly falls with T, so at
high T the soft term grows as T²; soft_weight = 1/T² cancels that.
Source: Huang, You, Wang, Qian, Xu 2022, "Knowledge distillation from a stronger teacher", NeurIPS.
"""

from __future__ import annotations

import torch
from torch import Tensor

from softlabels.losses.standardisation import varies
from softlabels.losses.target_batch import SoftTargetBatch
from softlabels.losses.terms import LossParts, check_weight, loss_parts, matched, soft_rows


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
