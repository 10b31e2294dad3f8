"""How does a student learn from soft targets and labels at once? The objective of the first paper.

Source: Hinton, Vinyals, Dean 2015, sections 2 and 2.1; the reference is `softlabels.softmath`.
"""

from __future__ import annotations

from torch import Tensor

from softlabels.losses.standardisation import Deviation, standardised
from softlabels.losses.target_batch import SoftTargetBatch
from softlabels.losses.terms import LossParts, check_weight, hard_term, matched, soft_rows, weighted_sum, whole_logits


def distillation_loss(
    student_logits_BC: Tensor,
    targets: SoftTargetBatch,
    *,
    hard_weight: float = 0.5,
    soft_weight: float = 1.0,
    standardise: Deviation | None = None,
) -> LossParts:
    """The paper's objective: soft_weight T² CE(p, q at T) + hard_weight CE(label, q at T = 1).

    The soft term is the cross-entropy, as in the paper; the KL divergence differs from it by the targets' entropy,
    which no gradient sees, and is reported beside it. Unlabelled rows have the soft term alone.

    Args:
        student_logits_BC: raw outputs of the student, not tempered, on the targets' device.
        targets: as a store gave them; they carry T.
        hard_weight: for the labels; the paper wants it considerably lower than the soft one.
        soft_weight: for the soft term.
        standardise: compare z-scores, of this standard deviation, instead of logits (`losses.standardised`); its
            authors take T = 2, soft_weight = 9 and hard_weight = 0.1 for CIFAR-100.
    Raises:
        ShapeMismatchError: another number of rows or classes than the targets have.
        EmptyBatchError: no rows.
        RequestError: targets on another device, a weight that is negative or not finite, or no such deviation.
        TemperatureLockedError, NonFiniteLogitsError: targets that are no teacher's logits cannot be standardised.
    """
    hard_share, soft_share = check_weight("hard_weight", hard_weight), check_weight("soft_weight", soft_weight)
    z_BC = matched(student_logits_BC, targets)
    compared_BC, aims = (z_BC, targets) if standardise is None else standardised(z_BC, targets, standardise)
    rows = soft_rows(compared_BC, aims)
    cross_entropy_B = rows.cross_entropy()
    soft = targets.temperature**2 * cross_entropy_B.mean()
    hard = hard_term(z_BC, targets.labels_B)
    return weighted_sum(
        soft=soft, hard=hard, kl=rows.kl(cross_entropy_B), soft_weight=soft_share, hard_weight=hard_share
    )


def soft_loss(student_logits_BC: Tensor, targets: SoftTargetBatch) -> Tensor:
    """The soft term alone: T² times the batch mean of CE(p, q), both at the targets' T.

    The gradient of the cross-entropy falls as 1/T²; T² keeps its balance with the hard term when T changes.
    """
    return targets.temperature**2 * soft_rows(matched(student_logits_BC, targets), targets).cross_entropy().mean()


def hard_loss(student_logits_BC: Tensor, targets: SoftTargetBatch) -> Tensor:
    """The hard term alone: cross-entropy with the labels at T = 1, its mean over the labelled rows; 0 without any."""
    return hard_term(matched(student_logits_BC, targets), targets.labels_B)


def logit_matching_loss(student_logits_BC: Tensor, targets: SoftTargetBatch) -> Tensor:
    """Half the mean squared difference of zero-meaned logits over rows and classes (Caruana).

    Its gradient (z - v)/N a row, N classes, is what that of `soft_loss` tends to as T grows, T² included.

    Raises:
        TemperatureLockedError: locked targets, a mean of probabilities for one, hold no teacher's logits.
        NonFiniteLogitsError: a target row holds NaN or an infinity and so has no mean.
        ShapeMismatchError, EmptyBatchError, RequestError: as `distillation_loss`.
    """
    z_BC = matched(student_logits_BC, targets)
    v_BC = whole_logits(targets, dtype=z_BC.dtype, purpose="match", otherwise="distillation_loss")
    gap_BC = (z_BC - z_BC.mean(dim=-1, keepdim=True)) - (v_BC - v_BC.mean(dim=-1, keepdim=True))
    return 0.5 * gap_BC.square().mean()
