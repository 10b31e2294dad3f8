"""How are logits compared without their scale? Standardisation: z-scores of teacher and student alike.

A student is asked for the teacher's relations between classes, not for logits of the same range. The z-scores are
divided by a base temperature, which here is the T that the targets carry, and T² stays in front of the soft term; the
hard term sees the student's own logits. The paper's algorithm 1 divides by the deviation of all C classes
(`population`); the authors' published code takes the sample's, with C - 1, which comes to a T larger by
sqrt(C/(C - 1)) (`sample`), and adds 1e-7 to it, which is not done here.
Source: Sun, Ren, Li, Wang, Cao 2024, "Logit standardization in knowledge distillation", CVPR, algorithms 1 and 2.
"""

from __future__ import annotations

import copy
from difflib import get_close_matches
from typing import Literal, get_args

import torch
from torch import Tensor

from softlabels.errors import RequestError
from softlabels.losses.target_batch import SoftTargetBatch
from softlabels.losses.terms import whole_logits

Deviation = Literal["population", "sample"]


def standardise_logits(logits_BC: Tensor, *, deviation: Deviation = "population") -> Tensor:
    """Z-scores of each row: mean 0, standard deviation 1; neither a row constant nor a row's scale changes them.

    A constant row, all classes alike but for rounding, has no scale: it comes back as zeros, and no gradient passes.

    Args:
        logits_BC: finite, floating point.
        deviation: `population` divides the squares' sum by C, as the paper does; `sample` by C - 1.
    Raises:
        RequestError: no such deviation.
    """
    kind = check_deviation(deviation)
    gap_BC = logits_BC - logits_BC.mean(dim=-1, keepdim=True)
    varied_B1 = varies(logits_BC, gap_BC, dim=-1)
    gap_BC = torch.where(varied_B1, gap_BC, 0.0)
    classes = logits_BC.shape[-1]
    variance_B1 = gap_BC.square().sum(dim=-1, keepdim=True) / (classes if kind == "population" else max(classes - 1, 1))
    return gap_BC / torch.where(varied_B1, variance_B1, 1.0).sqrt()  # chosen before the root: that of 0 has no slope


def standardised(z_BC: Tensor, targets: SoftTargetBatch, deviation: Deviation) -> tuple[Tensor, SoftTargetBatch]:
    """Student and targets as z-scores, the targets still at their T and with their labels.

    Raises:
        TemperatureLockedError: locked targets, a mean of probabilities for one, hold no teacher's logits.
        NonFiniteLogitsError: a target row holds NaN or an infinity, as one of cut classes does.
        RequestError: no such deviation.
    """
    v_BC = whole_logits(targets, dtype=z_BC.dtype, purpose="standardise", otherwise="a loss without `standardise`")
    scored = copy.copy(targets)  # already checked
    object.__setattr__(scored, "logits_BC", standardise_logits(v_BC, deviation=deviation))
    object.__setattr__(scored, "captured_temperature", 1.0)
    return standardise_logits(z_BC, deviation=deviation), scored


def varies(values: Tensor, gaps: Tensor, *, dim: int) -> Tensor:
    """Whether values differ from their mean along `dim` by more than rounding leaves, or are NaN; keeps `dim`."""
    rounding = 8 * torch.finfo(values.dtype).eps  # a mean of equal values is off by an eps or so
    largest, scale = (part.detach().abs().amax(dim, keepdim=True) for part in (gaps, values))
    return ~(largest <= rounding * scale)


def check_deviation(deviation: object) -> Deviation:
    """The deviation's name, or `RequestError` with the nearest one there is."""
    for known in get_args(Deviation):
        if deviation == known:
            return known  # type: ignore[no-any-return]
    near = get_close_matches(str(deviation), get_args(Deviation), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise RequestError(
        f"there is no standard deviation {deviation!r}{hint}; choose 'population' (the paper's algorithm) or 'sample' "
        "(the authors' code)",
        deviation=repr(deviation),
    )
