"""How far are the student's logits from the teacher's? Logit matching, the high-temperature limit of distillation.

Source: Hinton, Vinyals, Dean 2015, section 2.1.
"""

from __future__ import annotations

from torch import Tensor

from softlabels.losses.batch import SoftTargetBatch
from softlabels.losses.terms import matched, whole_logits


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
