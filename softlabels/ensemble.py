"""Ensemble means of teachers' logits, arithmetic or geometric, on the device of the first member.

The reference is `softlabels.softmath`; this computes the same in float32, within 1e-6 (1 + max |z/T|) of it, without
stacking the members. Shapes: B rows, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softlabels.errors import RequestError, TeacherError, TeacherShapeError
from softlabels.softmath import Mean, check_mean, check_temperature, check_weights, is_locked


@dataclass(frozen=True, kw_only=True, eq=False)
class Combined:
    """Ensemble mean of one batch.

    Attributes:
        logits_BC: float32, each row's largest entry 0; softmax(logits_BC) is the target at `captured_temperature`.
        locked: whether the target exists only at that temperature.
    """

    logits_BC: Tensor
    captured_temperature: float
    locked: bool


@torch.no_grad()
def combine(
    logits: Sequence[Tensor],
    *,
    mean: Mean,
    temperature: float,
    weights: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
) -> Combined:
    """Average the members' distributions over one batch.

    One member and the geometric mean keep logits at captured T = 1, which re-temper exactly. The arithmetic mean of
    two or more keeps log-probabilities at `temperature`, locked.

    Args:
        logits: one [B, C] tensor a member, any float dtype; copied to the device of the first.
        mean: kind of mean; "none" takes exactly one member.
        temperature: temperature of an arithmetic mean; other results do not depend on it.
        weights: one positive weight a member; None for equal weights.
        names: names of the members for messages.
    Raises:
        TeacherShapeError: the members' shapes differ or are not [rows, classes].
        TeacherError: a member's output is not floating point.
        TemperatureError, RequestError, ShapeMismatchError: bad temperature, mean or weights.
    Source: Hinton, Vinyals, Dean 2015, section 1: arithmetic or geometric mean.
    """
    kind, wanted = check_mean(mean), check_temperature(temperature)
    _check_members(logits, names)
    shares = check_weights(weights, len(logits)).tolist()
    if kind == "none" and len(logits) > 1:
        raise RequestError(
            f"there are {len(logits)} members and the mean is 'none': choose 'geometric', which gives targets "
            "at every temperature, or 'arithmetic', which gives them at one",
            members=len(logits),
        )
    locked = is_locked(kind, len(logits))
    mixed_BC = _log_of_mean(logits, shares, wanted) if locked else _mean_of_logits(logits, shares)
    return Combined(logits_BC=_shifted(mixed_BC), captured_temperature=wanted if locked else 1.0, locked=locked)


def _mean_of_logits(logits: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    # Shifted first: each member has an arbitrary row constant, and a large one would cost precision in the mean.
    total_BC = _shifted(logits[0]) * shares[0]
    for member_BC, share in zip(logits[1:], shares[1:], strict=True):
        total_BC += _shifted(member_BC).to(total_BC.device) * share
    return total_BC


def _log_of_mean(logits: Sequence[Tensor], shares: Sequence[float], temperature: float) -> Tensor:
    total_BC = torch.log_softmax(_shifted(logits[0]) / temperature, dim=-1) + math.log(shares[0])
    for member_BC, share in zip(logits[1:], shares[1:], strict=True):
        logp_BC = torch.log_softmax(_shifted(member_BC).to(total_BC.device) / temperature, dim=-1)
        total_BC = torch.logaddexp(total_BC, logp_BC + math.log(share))
    return total_BC


def _shifted(logits_BC: Tensor) -> Tensor:
    # float64 is kept until the shift: two logits near 1e9 that differ by 1 are equal in float32.
    wide_BC = logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
    return (wide_BC - wide_BC.amax(dim=-1, keepdim=True)).float()


def _check_members(logits: Sequence[Tensor], names: Sequence[str] | None) -> None:
    if not logits:
        raise TeacherShapeError("there is no member to average: an ensemble has at least one")
    named = [f"member {i}" if names is None else f"member {i} ({names[i]})" for i in range(len(logits))]
    shapes = [list(member.shape) for member in logits]
    listed = ", ".join(f"{name}: {shape}" for name, shape in zip(named, shapes, strict=True))
    if any(len(shape) != 2 or shape[1] == 0 for shape in shapes):
        raise TeacherShapeError(
            f"a teacher has to return logits of shape [rows, classes], one row a sample; here {listed}",
            shapes=shapes,
        )
    if any(shape != shapes[0] for shape in shapes):
        raise TeacherShapeError(
            f"the members' shapes differ, so their rows cannot be averaged: {listed}. They need the same batch and one "
            "list of classes",
            shapes=shapes,
        )
    for name, member in zip(named, logits, strict=True):
        if not member.is_floating_point():
            raise TeacherError(
                f"{name} returns {member.dtype}, not floating-point logits: return the values before any argmax",
                dtype=str(member.dtype),
            )
