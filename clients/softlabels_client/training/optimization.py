"""Which optimiser moves the student's weights, and how fast at each step?"""

from __future__ import annotations

from softlabels.errors import MissingExtraError, ReferenceLoadError, SoftLabelsError

try:
    import torch
    from torch import nn
except ImportError as error:
    raise MissingExtraError(
        "training a student needs torch, which is not installed: `pip install softlabels[torch]`", extra="torch"
    ) from error

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

from softlabels.references import load_reference
from softlabels_client.training.settings import DistillSettings


def make_optimizer(student: nn.Module, settings: DistillSettings) -> torch.optim.Optimizer:
    """The optimiser that the settings name, over all of the student's parameters.

    Raises:
        ReferenceLoadError: it cannot be made of these arguments, or what the reference makes is no optimiser.
    """
    arguments = {"lr": settings.learning_rate, **settings.optimizer_args}
    if settings.weight_decay or settings.optimizer in ("sgd", "adamw", "adam"):
        arguments["weight_decay"] = settings.weight_decay
    if settings.optimizer == "sgd":
        arguments = {"momentum": settings.momentum, "nesterov": settings.momentum > 0, **arguments}
    known = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
    make = known.get(settings.optimizer) or load_reference(settings.optimizer)
    try:
        made = make(student.parameters(), **arguments)
    except SoftLabelsError:
        raise
    except Exception as error:  # whatever an optimiser, or a user's function, raises
        raise ReferenceLoadError(
            f"optimizer {settings.optimizer!r} cannot be made of the parameters and {arguments}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(made, torch.optim.Optimizer):
        raise ReferenceLoadError(
            f"optimizer {settings.optimizer!r} made a {type(made).__name__}, no torch.optim.Optimizer"
        )
    for group in made.param_groups:
        group["initial_lr"] = group["lr"]  # groups of a maker's own keep their ratios to each other
    return made


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Make the next step use `factor` times each group's own peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def rate_factor(settings: DistillSettings, step: int, steps_an_epoch: int) -> float:
    """The factor on the peak learning rate at a step, counted from 0."""
    done_share = step / (settings.epochs * steps_an_epoch)
    own_warm_up = ONE_CYCLE_WARM_UP if settings.schedule == "one_cycle" else 0.0
    warm_up = own_warm_up if settings.warm_up is None else settings.warm_up
    if settings.schedule == "step":
        fallen = stepped(step // steps_an_epoch, settings.step_epochs, settings.step_factor)
        return fallen * warmed_up(done_share, warm_up, constant)
    return warmed_up(done_share, warm_up, constant if settings.schedule == "constant" else cosine)


Schedule: TypeAlias = Callable[[float], float]
"""The factor on the peak rate after a share of all steps."""

ONE_CYCLE_WARM_UP = 0.2
"""Share of all steps in which a one-cycle schedule rises to its peak."""


def one_cycle(done_share: float) -> float:
    """The factor after `done_share` of all steps: a linear rise for a fifth of them, then a cosine's fall to 0."""
    return warmed_up(done_share, ONE_CYCLE_WARM_UP, cosine)


def cosine(done_share: float) -> float:
    """The factor after `done_share` of all steps: from 1 to 0 along half a cosine."""
    return 0.5 * (1.0 + math.cos(math.pi * done_share))


def constant(done_share: float) -> float:
    """The factor is 1 all along."""
    return 1.0


def warmed_up(done_share: float, warm_up: float, rest: Schedule) -> float:
    """The factor of a schedule that begins after a linear rise from 0, for a share `warm_up` of all steps."""
    if done_share < warm_up:
        return done_share / warm_up
    return rest((done_share - warm_up) / (1.0 - warm_up))


def stepped(done_epochs: int, at_epochs: Sequence[int], factor: float) -> float:
    """The factor after so many whole epochs: one multiplication by `factor` for each of `at_epochs` that is reached."""
    return math.prod(factor for epoch in at_epochs if done_epochs >= epoch)
