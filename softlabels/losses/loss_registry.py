"""Losses by name, as modules with checked options, for command lines and training frameworks."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any, ClassVar

from torch import Tensor, nn

from softlabels.documents import did_you_mean
from softlabels.errors import RequestError
from softlabels.losses.distillation import decoupled_loss, distillation_loss, relation_loss
from softlabels.losses.target_batch import SoftTargetBatch
from softlabels.losses.terms import Deviation, LossParts, check_deviation, check_weight


class NamedLoss(nn.Module):
    """A loss function with its options, as a module with one scalar output and no parameters.

    The options are the keyword arguments of the class's function. Each is an attribute that may be changed between
    steps, for example for a warm-up: `loss.soft_weight = min(epoch / 20, 1)`.

    Raises:
        RequestError: an unknown option, or a value out of range.
    """

    name: ClassVar[str]
    function: ClassVar[Callable[..., LossParts]]

    hard_weight: float
    soft_weight: float

    def __init__(self, **options: object) -> None:
        super().__init__()
        parameters = signature(type(self).function).parameters.values()
        defaults = {each.name: each.default for each in parameters if each.kind is Parameter.KEYWORD_ONLY}
        for option in options:
            if option not in defaults:
                raise RequestError(
                    f"loss {self.name!r} has no option {option!r}{did_you_mean(option, defaults)}; it takes "
                    f"{', '.join(defaults)}",
                    option=option,
                )
        for option, value in {**defaults, **options}.items():
            if option != "standardise":
                value = check_weight(option, value)
            elif value is not None:
                value = check_deviation(value)
            setattr(self, option, value)
        self._names = tuple(defaults)

    @property
    def options(self) -> dict[str, Any]:
        """The current options by name."""
        return {name: getattr(self, name) for name in self._names}

    def parts(self, student_logits_BC: Tensor, targets: SoftTargetBatch) -> LossParts:
        """Return the loss and its terms."""
        return type(self).function(student_logits_BC, targets, **self.options)

    def forward(self, student_logits_BC: Tensor, targets: SoftTargetBatch) -> Tensor:
        """Return the total loss; `parts` returns its terms too."""
        return self.parts(student_logits_BC, targets).total

    def extra_repr(self) -> str:
        """Return the options, for `print(module)`."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class DistillationLoss(NamedLoss):
    """`distillation_loss` as a module."""

    name: ClassVar[str] = "kd"
    function: ClassVar[Callable[..., LossParts]] = staticmethod(distillation_loss)

    standardise: Deviation | None


class DecoupledLoss(NamedLoss):
    """`decoupled_loss` as a module."""

    name: ClassVar[str] = "dkd"
    function: ClassVar[Callable[..., LossParts]] = staticmethod(decoupled_loss)

    alpha: float
    beta: float
    standardise: Deviation | None


class RelationLoss(NamedLoss):
    """`relation_loss` as a module."""

    name: ClassVar[str] = "dist"
    function: ClassVar[Callable[..., LossParts]] = staticmethod(relation_loss)

    beta: float
    gamma: float


_BY_NAME: dict[str, type[NamedLoss]] = {kind.name: kind for kind in (DistillationLoss, DecoupledLoss, RelationLoss)}

LOSS_NAMES: tuple[str, ...] = tuple(_BY_NAME)
"""Every name that `make_loss` takes."""


def make_loss(name: str, **options: Any) -> NamedLoss:
    """Return the loss of this name.

    Args:
        name: one of `LOSS_NAMES`: distillation, decoupled distillation, or correlations.
        options: keyword arguments of the loss function; those left out keep its defaults.
    Raises:
        RequestError: an unknown loss or option, with the nearest known one, or a value out of range.
    """
    if not isinstance(name, str) or name not in _BY_NAME:
        raise RequestError(
            f"there is no loss {name!r}{did_you_mean(name, LOSS_NAMES)}; known are {', '.join(LOSS_NAMES)}",
            name=repr(name),
        )
    return _BY_NAME[name](**options)
