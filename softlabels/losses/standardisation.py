"""Logit standardisation: losses over z-scores, which compare logits without their scale.

The student learns the teacher's relations between classes, not logits of the same range. Z-scores are divided by a base
temperature, here the T that the targets carry, and T² multiplies the soft term; the hard term uses the student's own
logits. The paper's algorithm 1 divides by the deviation of all C classes (`population`). The authors' published code
uses the sample's, with C - 1, which amounts to a T larger by sqrt(C/(C - 1)) (`sample`), and adds 1e-7 to it, which is
not done here.
Source: Sun, Ren, Li, Wang, Cao 2024, "Logit standardization in knowledge distillation", CVPR, algorithms 1 and 2.
"""

from __future__ import annotations

import copy
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from softlabels.documents import did_you_mean
from softlabels.errors import RequestError
from softlabels.losses.target_batch import SoftTargetBatch
from softlabels.losses.terms import whole_logits

Deviation = Literal["population", "sample"]


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
    scored = copy.copy(targets)  # not made anew, which would repeat the checks
    object.__setattr__(scored, "logits_BC", standardise_logits(v_BC, deviation=deviation))
    object.__setattr__(scored, "captured_temperature", 1.0)
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
