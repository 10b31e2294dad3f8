"""What does a student minimise? Losses over a batch of soft targets that knows its own temperature.

Shapes: B rows, C classes. p is the target's distribution, q the student's, T the targets' temperature, z the student's
logits, v the teacher's. Every loss here has the form `loss(student_logits_BC, targets, *, weights...)`: T comes with
the targets and can never be passed beside them, so T² can be applied neither twice nor for another T. A further loss
is one more function of that form, made of `soft_loss` and `hard_loss` where it shares their terms.
Arithmetic is float32, or float64 for a float64 student; half-precision students are raised first.
Source: Hinton, Vinyals, Dean 2015, sections 2 and 2.1; the reference is `softlabels.softmath`.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from softlabels.errors import (
    EmptyBatchError,
    NonFiniteLogitsError,
    RequestError,
    ShapeMismatchError,
    TemperatureLockedError,
)
from softlabels.softmath import UNLABELLED, check_labels, check_temperature
from softlabels.targets import SoftTargets, refuse_if_locked


@dataclass(frozen=True, kw_only=True, eq=False)
class SoftTargetBatch:
    """One batch of targets as tensors, with all that a loss needs to know of them.

    Attributes:
        logits_BC: rows tempered with `captured_temperature`, floating point, free up to a row constant.
        temperature: the T that the loss works at.
        captured_temperature: the T that the rows are tempered with; softmax(logits_BC captured/T) is the target at T.
        locked: whether the targets exist at the captured temperature only.
        labels_B: int64 classes, -1 for unlabelled; None where no row has one.
    Raises:
        ShapeMismatchError, RequestError: rows or labels that cannot be; labels outside [-1, C) are named.
        TemperatureError, TemperatureLockedError: a bad temperature, or another than the captured one of locked targets.
    """

    logits_BC: Tensor
    temperature: float
    captured_temperature: float
    locked: bool
    labels_B: Tensor | None = None

    def __post_init__(self) -> None:
        if self.logits_BC.ndim != 2 or self.logits_BC.shape[1] == 0 or not self.logits_BC.is_floating_point():
            raise ShapeMismatchError(
                f"targets are floating-point [rows, classes]; these are {self.logits_BC.dtype} of shape "
                f"{list(self.logits_BC.shape)}",
                shape=list(self.logits_BC.shape),
            )
        object.__setattr__(self, "temperature", check_temperature(self.temperature))
        object.__setattr__(self, "captured_temperature", check_temperature(self.captured_temperature))
        refuse_if_locked(self.temperature, captured=self.captured_temperature, locked=self.locked)
        if self.labels_B is not None:
            rows, classes = self.logits_BC.shape
            # Once, here: in the loss it would make the host wait for the accelerator at every step.
            labels_B = check_labels(self.labels_B.detach().cpu().numpy(), rows=rows, classes=classes)
            if self.labels_B.dtype != torch.int64:
                object.__setattr__(self, "labels_B", torch.from_numpy(labels_B).to(self.labels_B.device))

    @classmethod
    def from_soft_targets(cls, targets: SoftTargets, *, device: torch.device | str | None = None) -> SoftTargetBatch:
        """What a store's batch becomes for torch, at the temperature it carries.

        Args:
            targets: as a store gave them.
            device: where rows are decoded: their encoded bytes go there, a fraction of what decoded ones would be, from
                pinned memory where it is an accelerator. None decodes with NumPy on the host.
        """
        logits_BC = torch.from_numpy(_writable(targets.logits())) if device is None else _decoded_on(device, targets)
        made = cls(
            logits_BC=logits_BC,
            temperature=targets.temperature,
            captured_temperature=targets.captured_temperature,
            locked=targets.locked,
            labels_B=None if targets.labels is None else torch.tensor(targets.labels, dtype=torch.int64),
        )
        return made if device is None else made.to(device, non_blocking=True)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SoftTargetBatch:
        """The same batch on another device."""
        moved = copy.copy(self)  # already checked, and checking on an accelerator would wait for it
        object.__setattr__(moved, "logits_BC", self.logits_BC.to(device, non_blocking=non_blocking))
        if self.labels_B is not None:
            object.__setattr__(moved, "labels_B", self.labels_B.to(device, non_blocking=non_blocking))
        return moved

    def tempered(self) -> Tensor:
        """logits_BC whose softmax is the target at `temperature`; float32, or float64 where the rows are."""
        wide_BC = _widened(self.logits_BC)
        if self.captured_temperature == self.temperature:
            return wide_BC
        return wide_BC * (self.captured_temperature / self.temperature)

    def log_p(self) -> Tensor:
        """logp_BC of the target at `temperature`."""
        return torch.log_softmax(self.tempered(), dim=-1)


def _decoded_on(device: torch.device | str, targets: SoftTargets) -> Tensor:
    """logits_BC as kept, decoded on a device from its encoded bytes."""
    where = torch.device(device)
    if targets.members is not None:
        # Members are averaged at the temperature first, which the reference does on the host.
        return torch.from_numpy(_writable(targets.logits())).to(where)
    moved = {name: _moved(array, where) for name, array in targets.encoded.items()}
    return targets.encoding.decode_torch(moved)


def _moved(array: NDArray[Any], device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.from_numpy(_writable(array)).to(device)
    pinned = torch.empty(array.shape, dtype=torch.from_numpy(np.empty(0, array.dtype)).dtype, pin_memory=True)
    np.copyto(pinned.numpy(), array)
    return pinned.to(device, non_blocking=True)


def _writable(array: NDArray[Any]) -> NDArray[Any]:
    """The array, copied where it is a view on a reply: torch has no read-only tensors."""
    return array if array.flags.writeable else array.copy()


class LossParts(NamedTuple):
    """A distillation loss and what it is made of, all scalars.

    Attributes:
        total: soft_weight soft + hard_weight hard; call `backward` on this.
        soft: T² times the mean cross-entropy with the soft targets at T.
        hard: mean cross-entropy with the labels at T = 1 over the labelled rows; 0 where there are none.
        kl: mean KL(p, q) at T in nats, not times T², without gradient: 0 when the student has learnt the targets,
            while the cross-entropy stops at the targets' own entropy.
    """

    total: Tensor
    soft: Tensor
    hard: Tensor
    kl: Tensor


def distillation_loss(
    student_logits_BC: Tensor, targets: SoftTargetBatch, *, hard_weight: float = 0.5, soft_weight: float = 1.0
) -> LossParts:
    """The paper's objective: soft_weight T² CE(p, q at T) + hard_weight CE(label, q at T = 1).

    The soft term is the cross-entropy, as in the paper; the KL divergence differs from it by the targets' entropy,
    which no gradient sees, and is reported beside it. Unlabelled rows have the soft term alone.

    Args:
        student_logits_BC: raw outputs of the student, not tempered, on the targets' device.
        targets: as a store gave them; they carry T.
        hard_weight: for the labels; the paper wants it considerably lower than the soft one.
        soft_weight: for the soft term.
    Raises:
        ShapeMismatchError: another number of rows or classes than the targets have.
        EmptyBatchError: no rows.
        RequestError: targets on another device, or a weight that is negative or not finite.
    """
    hard_share, soft_share = _check_weight("hard_weight", hard_weight), _check_weight("soft_weight", soft_weight)
    z_BC = _matched(student_logits_BC, targets)
    entropy, cross_entropy = _soft_terms(z_BC, targets)
    soft = targets.temperature**2 * cross_entropy
    hard = _hard_term(z_BC, targets.labels_B)
    kl = (cross_entropy.detach() - entropy).clamp_min(0.0)  # rounding may leave -1e-7
    return LossParts(total=soft_share * soft + hard_share * hard, soft=soft, hard=hard, kl=kl)


def soft_loss(student_logits_BC: Tensor, targets: SoftTargetBatch) -> Tensor:
    """The soft term alone: T² times the batch mean of CE(p, q), both at the targets' T.

    The gradient of the cross-entropy falls as 1/T²; T² keeps its balance with the hard term when T changes.
    """
    return targets.temperature**2 * _soft_terms(_matched(student_logits_BC, targets), targets)[1]


def hard_loss(student_logits_BC: Tensor, targets: SoftTargetBatch) -> Tensor:
    """The hard term alone: cross-entropy with the labels at T = 1, its mean over the labelled rows; 0 without any."""
    return _hard_term(_matched(student_logits_BC, targets), targets.labels_B)


def logit_matching_loss(student_logits_BC: Tensor, targets: SoftTargetBatch) -> Tensor:
    """Half the mean squared difference of zero-meaned logits over rows and classes (Caruana).

    Its gradient (z - v)/N a row, N classes, is what that of `soft_loss` tends to as T grows, T² included.

    Raises:
        TemperatureLockedError: locked targets, a mean of probabilities for one, hold no teacher's logits.
        NonFiniteLogitsError: a target row holds NaN or an infinity and so has no mean.
        ShapeMismatchError, EmptyBatchError, RequestError: as `distillation_loss`.
    Source: Hinton, Vinyals, Dean 2015, section 2.1.
    """
    z_BC = _matched(student_logits_BC, targets)
    if targets.locked:
        raise TemperatureLockedError(
            f"these targets are locked to temperature {targets.captured_temperature}, as an arithmetic mean, a cut "
            "or a sampled row is: they hold no teacher's logits to match. Use distillation_loss, or precompute whole "
            "rows of one teacher or of the geometric mean",
            captured=targets.captured_temperature,
        )
    v_BC = targets.logits_BC.to(z_BC.dtype) * targets.captured_temperature
    unsound_B = ~torch.isfinite(v_BC).all(dim=-1)
    if bool(unsound_B.any()):
        rows = unsound_B.nonzero().flatten().tolist()
        raise NonFiniteLogitsError(
            f"target rows {rows[:8]} hold NaN or an infinity, so they have no mean to match logits about: use "
            "distillation_loss, which takes -inf as a probability of 0",
            rows=rows[:8],
        )
    gap_BC = (z_BC - z_BC.mean(dim=-1, keepdim=True)) - (v_BC - v_BC.mean(dim=-1, keepdim=True))
    return 0.5 * gap_BC.square().mean()


class DistillationLoss(nn.Module):
    """`distillation_loss` for frameworks that want a module with one scalar out.

    Args:
        hard_weight: as `distillation_loss`.
        soft_weight: as `distillation_loss`.
    """

    def __init__(self, *, hard_weight: float = 0.5, soft_weight: float = 1.0) -> None:
        super().__init__()
        self.hard_weight = _check_weight("hard_weight", hard_weight)
        self.soft_weight = _check_weight("soft_weight", soft_weight)

    def forward(self, student_logits_BC: Tensor, targets: SoftTargetBatch) -> Tensor:
        """The total; call `distillation_loss` for its parts."""
        weights = {"hard_weight": self.hard_weight, "soft_weight": self.soft_weight}
        return distillation_loss(student_logits_BC, targets, **weights).total

    def extra_repr(self) -> str:
        """The weights, for `print(module)`."""
        return f"hard_weight={self.hard_weight}, soft_weight={self.soft_weight}"


def _soft_terms(z_BC: Tensor, targets: SoftTargetBatch) -> tuple[Tensor, Tensor]:
    # (entropy of p, cross-entropy of p and q), batch means in nats at the targets' T.
    with torch.no_grad():
        logp_BC = torch.log_softmax(targets.tempered().to(z_BC.dtype), dim=-1)
        p_BC = logp_BC.exp()
        # In place, on what is ours alone: 0 times the most negative number is 0, and 0 times -inf is not.
        entropy = -(logp_BC.clamp_min_(torch.finfo(logp_BC.dtype).min) * p_BC).sum(dim=-1).mean()
    logq_BC = torch.log_softmax(z_BC / targets.temperature, dim=-1)
    # Where p = 0 a class adds nothing, even if the student rules it out too and log q is -inf.
    return entropy, -torch.where(p_BC > 0, p_BC * logq_BC, 0.0).sum(dim=-1).mean()


def _hard_term(z_BC: Tensor, labels_B: Tensor | None) -> Tensor:
    if labels_B is None:
        return z_BC.new_zeros(())
    summed = functional.cross_entropy(z_BC, labels_B, ignore_index=UNLABELLED, reduction="sum")
    return summed / (labels_B != UNLABELLED).sum().clamp_min(1)


def _matched(student_logits_BC: Tensor, targets: SoftTargetBatch) -> Tensor:
    # The student's logits in the dtype the loss works in, once it is certain that they belong to these targets.
    student, stored = list(student_logits_BC.shape), list(targets.logits_BC.shape)
    if len(student) != 2 or student[1] != stored[1]:
        raise ShapeMismatchError(
            f"the student gives shape {student} and the targets have {stored[1]} classes: give the student's last "
            f"layer {stored[1]} outputs, in the order of the teacher's classes, and pass [rows, classes]",
            student=student,
            targets=stored,
        )
    if student[0] != stored[0]:
        raise ShapeMismatchError(
            f"the student gives {student[0]} rows and there are targets for {stored[0]}: ask for the targets of "
            "exactly the ids that the student saw",
            student=student,
            targets=stored,
        )
    if student[0] == 0:
        raise EmptyBatchError("the batch has no rows, so a mean over it is not a number: skip it")
    if student_logits_BC.device != targets.logits_BC.device:
        raise RequestError(
            f"the student's logits are on {student_logits_BC.device} and the targets on {targets.logits_BC.device}: "
            "move them once with targets.to(device)"
        )
    return _widened(student_logits_BC)


def _widened(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _check_weight(name: str, weight: float) -> float:
    if not (math.isfinite(weight) and weight >= 0):
        raise RequestError(
            f"{name} is {weight}; a term of the loss is weighed with a finite number of 0 or more", name=name
        )
    return float(weight)
