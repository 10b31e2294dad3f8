"""Hinton's objective: soft targets and labels at once, and logit matching, its high-temperature limit. Name `kd`.

Source: Hinton, Vinyals, Dean 2015, sections 2 and 2.1; the reference implementation is `softlabels.softmath`.
"""

from __future__ import annotations

from torch import Tensor

from softlabels.losses.standardisation import Deviation, standardised
from softlabels.losses.target_batch import SoftTargetBatch
from softlabels.losses.terms import LossParts, hard_term, loss_parts, matched, soft_rows, whole_logits


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
        standardise: compare z-scores with this standard deviation instead of logits (`losses.standardisation`); its
            authors use T = 2, soft_weight = 9 and hard_weight = 0.1 for CIFAR-100.
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
