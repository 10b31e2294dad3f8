"""Which losses can be had by name? Each as a module with checked options, for command lines and frameworks."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from inspect import signature
from typing import Any

from torch import Tensor, nn

from softlabels.errors import RequestError
from softlabels.losses.correlation import relation_loss
from softlabels.losses.decoupled import decoupled_loss
from softlabels.losses.distillation import distillation_loss
from softlabels.losses.standardisation import Deviation, check_deviation
from softlabels.losses.target_batch import SoftTargetBatch
from softlabels.losses.terms import LossParts, check_weight


class NamedLoss(nn.Module):
    """A loss with its options, for frameworks that want a module with one scalar out; it has no parameters.

    Every option is an attribute of its own name and may be changed between steps, to warm a loss up for one:
    `loss.soft_weight = min(epoch / 20, 1)`.
    """

    hard_weight: float
    soft_weight: float

    def __init__(self, function: Callable[..., LossParts], **options: object) -> None:
        super().__init__()
        self._function = function
        for name, value in options.items():
            setattr(self, name, _checked(name, value))
        self._names = tuple(options)

    @property
    def options(self) -> dict[str, Any]:
        """The options by name, as they now are."""
        return {name: getattr(self, name) for name in self._names}

    def parts(self, student_logits_BC: Tensor, targets: SoftTargetBatch) -> LossParts:
        """The loss and what it is made of."""
        return self._function(student_logits_BC, targets, **self.options)

    def forward(self, student_logits_BC: Tensor, targets: SoftTargetBatch) -> Tensor:
        """The total; `parts` has the rest."""
        return self.parts(student_logits_BC, targets).total

    def extra_repr(self) -> str:
        """The options, for `print(module)`."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class DistillationLoss(NamedLoss):
    """`distillation_loss` as a module, by the name `kd`; its options are that function's."""

    standardise: Deviation | None

    def __init__(
        self, *, hard_weight: float = 0.5, soft_weight: float = 1.0, standardise: Deviation | None = None
    ) -> None:
        super().__init__(distillation_loss, hard_weight=hard_weight, soft_weight=soft_weight, standardise=standardise)


class DecoupledLoss(NamedLoss):
    """`decoupled_loss` as a module, by the name `dkd`; its options are that function's."""

    alpha: float
    beta: float
    standardise: Deviation | None

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        hard_weight: float = 1.0,
        soft_weight: float = 1.0,
        standardise: Deviation | None = None,
    ) -> None:
        super().__init__(
            decoupled_loss,
            alpha=alpha,
            beta=beta,
            hard_weight=hard_weight,
            soft_weight=soft_weight,
            standardise=standardise,
        )


class RelationLoss(NamedLoss):
    """`relation_loss` as a module, by the name `dist`; its options are that function's."""

    beta: float
    gamma: float

    def __init__(
        self, *, beta: float = 2.0, gamma: float = 2.0, hard_weight: float = 1.0, soft_weight: float = 1.0
    ) -> None:
        super().__init__(relation_loss, beta=beta, gamma=gamma, hard_weight=hard_weight, soft_weight=soft_weight)


_BY_NAME: dict[str, type[NamedLoss]] = {"kd": DistillationLoss, "dkd": DecoupledLoss, "dist": RelationLoss}

LOSS_NAMES: tuple[str, ...] = tuple(_BY_NAME)
"""Every name that `make_loss` takes."""


def make_loss(name: str, **options: Any) -> NamedLoss:
    """The loss of this name.

    Args:
        name: one of `LOSS_NAMES`: plain distillation, decoupled distillation, or correlations.
        options: as the loss's class takes them; those left out are its defaults.
    Raises:
        RequestError: no such loss or option, and the nearest there is; or a value that cannot be.
    """
    if not isinstance(name, str) or name not in _BY_NAME:
        raise RequestError(
            f"there is no loss {name!r}{_nearest(name, LOSS_NAMES)}; known are {', '.join(LOSS_NAMES)}", name=repr(name)
        )
    kind = _BY_NAME[name]
    known = tuple(signature(kind).parameters)
    for option in options:
        if option not in known:
            raise RequestError(
                f"loss {name!r} has no option {option!r}{_nearest(option, known)}; it takes {', '.join(known)}",
                option=option,
            )
    return kind(**options)


def _nearest(name: object, known: tuple[str, ...]) -> str:
    near = get_close_matches(str(name).lower(), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _checked(name: str, value: object) -> object:
    if name != "standardise":
        return check_weight(name, value)
    return None if value is None else check_deviation(value)
