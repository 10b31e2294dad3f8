"""Optimizer and learning-rate schedule of a student's training, made from its settings."""

from __future__ import annotations

import math

from softlabels.errors import ReferenceLoadError, SoftLabelsError
from softlabels.extras import needs_extra
from softlabels.references import load_reference
from softlabels_client.training.settings import OPTIMIZERS, DistillSettings

with needs_extra("torch", "training a student"):
    import torch
    from torch import nn
    from torch.optim.lr_scheduler import LambdaLR

ONE_CYCLE_WARM_UP = 0.2
"""Fraction of all steps in which a one-cycle schedule rises to its peak."""


def make_optimizer(student: nn.Module, settings: DistillSettings) -> torch.optim.Optimizer:
    """Return the optimizer that the settings name, over all of the student's parameters.

    Raises:
        ReferenceLoadError: it does not accept these arguments, or the reference does not return an optimizer.
    """
    arguments = {"lr": settings.learning_rate, **settings.optimizer_args}
    if settings.weight_decay or settings.optimizer in OPTIMIZERS:
        arguments["weight_decay"] = settings.weight_decay
    if settings.optimizer == "sgd":
        arguments = {"momentum": settings.momentum, "nesterov": settings.momentum > 0, **arguments}
    known = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
    make = known.get(settings.optimizer) or load_reference(settings.optimizer)
    try:
        made = make(student.parameters(), **arguments)
    except SoftLabelsError:
        raise
    except Exception as error:  # whatever an optimizer or a user's function raises
        raise ReferenceLoadError(
            f"optimizer {settings.optimizer!r} cannot be made from the parameters and {arguments}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(made, torch.optim.Optimizer):
        raise ReferenceLoadError(
            f"optimizer {settings.optimizer!r} returned a {type(made).__name__}, not a torch.optim.Optimizer"
        )
    for group in made.param_groups:
        group["initial_lr"] = group["lr"]  # the peak rate; groups with rates of their own keep their ratios
    return made


def make_scheduler(
    optimizer: torch.optim.Optimizer, settings: DistillSettings, *, steps_per_epoch: int, done_steps: int = 0
) -> LambdaLR:
    """Return the learning-rate scheduler, to be stepped after every optimizer step.

    The rate is a pure function of the step, so a resumed training needs no state of the scheduler. `OneCycleLR` cannot
    combine a linear rise with a cosine decay, and `SequentialLR` cannot begin one between two steps.

    Args:
        optimizer: from `make_optimizer`; its current rates are set.
        settings: see `DistillSettings.schedule`.
        steps_per_epoch: optimizer steps per epoch.
        done_steps: optimizer steps that a resumed training has done.
    """

    def factor(step: int) -> float:
        return rate_factor(settings, step, steps_per_epoch)

    # GradScaler skips a step whose gradients overflow, often the first one, and the scheduler would warn that it was
    # stepped before the optimizer (https://github.com/pytorch/pytorch/issues/44511).
    optimizer._opt_called = True  # type: ignore[attr-defined]
    return LambdaLR(optimizer, factor, last_epoch=done_steps - 1)


def rate_factor(settings: DistillSettings, step: int, steps_per_epoch: int) -> float:
    """Return the factor on the peak learning rate at a step, counted from 0."""
    done = step / (settings.epochs * steps_per_epoch)
    default_warm_up = ONE_CYCLE_WARM_UP if settings.schedule == "one_cycle" else 0.0
    warm_up = default_warm_up if settings.warm_up is None else settings.warm_up
    if settings.schedule in ("one_cycle", "cosine"):
        return one_cycle(done, warm_up)
    rise = done / warm_up if done < warm_up else 1.0
    if settings.schedule == "constant":
        return rise
    done_epochs = step // steps_per_epoch
    return math.prod(settings.step_factor for epoch in settings.step_epochs if done_epochs >= epoch) * rise


def one_cycle(done: float, warm_up: float = ONE_CYCLE_WARM_UP) -> float:
    """Return the factor on the peak rate after a fraction of all steps: a linear rise from 0, then a cosine to 0.

    Args:
        done: fraction of all steps, 0 … 1.
        warm_up: fraction in which the rate rises, 0 … 1.
    """
    if done < warm_up:
        return done / warm_up
    return 0.5 * (1.0 + math.cos(math.pi * ((done - warm_up) / (1.0 - warm_up))))
