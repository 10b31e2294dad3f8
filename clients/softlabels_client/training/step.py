"""Parts of a training step: loss of a batch, optimizer, learning-rate schedule, and errors on labelled samples.

Legend: B rows, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

from softlabels.errors import ReferenceLoadError, RequestError, SoftLabelsError
from softlabels.extras import needs_extra
from softlabels.references import load_reference
from softlabels.softmath import UNLABELLED
from softlabels.transfer_set import TransferSet
from softlabels_client.data.loader import DistillationBatch
from softlabels_client.training.settings import OPTIMIZERS, DistillSettings

with needs_extra("torch", "training a student"):
    import torch
    from torch import Tensor, nn
    from torch.optim.lr_scheduler import LambdaLR

    from softlabels.losses import LossParts, SoftTargetBatch

Loss: TypeAlias = Callable[[Tensor, SoftTargetBatch], Tensor]
"""Maps logits_BC and targets to a scalar, for example `softlabels.losses.DistillationLoss`."""

ONE_CYCLE_WARM_UP = 0.2
"""Fraction of all steps in which a one-cycle schedule rises to its peak."""


class ErrorCount(NamedTuple):
    """Result of a test: `errors` wrong predictions among `samples` labelled samples."""

    errors: int
    samples: int

    @property
    def accuracy(self) -> float:
        """Correct predictions in percent."""
        return 100.0 * (self.samples - self.errors) / self.samples


def step_loss(student: Callable[[Tensor], Tensor], batch: DistillationBatch, loss: Loss) -> Tensor:
    """Return the loss of one batch, on the student's device; 0 with gradients of zero for an empty batch.

    At the end of an epoch a rank may have no samples left, while the other ranks wait for its gradients.
    """
    logits_BC = student(batch.inputs)
    return loss(logits_BC, batch.targets) if len(batch) else logits_BC.sum() * 0.0


@torch.no_grad()
def batch_sums(loss: LossParts, logits_BC: Tensor, targets: SoftTargetBatch) -> Tensor:
    """Return [4] sums over a batch's rows: loss, KL to the targets, correct predictions, labelled rows."""
    # They stay on the device: reading them for every batch would make the host wait for it.
    means = torch.stack((loss.total, loss.kl)) * len(logits_BC)
    counts = means.new_zeros(2)
    if targets.labels_B is not None:
        labelled_B = targets.labels_B != UNLABELLED
        correct_B = (logits_BC.argmax(dim=1) == targets.labels_B) & labelled_B
        counts = torch.stack((correct_B.sum(), labelled_B.sum())).to(means)
    return torch.cat((means, counts))


@torch.no_grad()
def measure_errors(student: nn.Module, samples: TransferSet, *, batch_size: int = 2_000) -> ErrorCount:
    """Test the student in eval mode on the labelled samples; its mode is restored afterwards.

    Raises:
        RequestError: no sample is labelled.
    """
    device = next((parameter.device for parameter in student.parameters()), torch.device("cpu"))
    was_training = student.training
    student.eval()
    wrong = labelled = 0
    for start in range(0, len(samples), batch_size):
        batch = samples.take(np.arange(start, min(start + batch_size, len(samples)), dtype=np.int64))
        if batch.labels is None:
            continue
        predicted_B = student(torch.from_numpy(np.array(batch.inputs)).to(device)).argmax(dim=1).cpu().numpy()
        known_B = batch.labels != UNLABELLED
        labelled += int(known_B.sum())
        wrong += int((predicted_B != batch.labels)[known_B].sum())
    student.train(was_training)
    if not labelled:
        raise RequestError(f"no sample of {samples.name!r} has a label, so errors cannot be counted on it")
    return ErrorCount(wrong, labelled)


def count_errors(student: nn.Module, samples: TransferSet, *, batch_size: int = 2_000) -> int:
    """Return how many labelled samples the student predicts wrongly; see `measure_errors`."""
    return measure_errors(student, samples, batch_size=batch_size).errors


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
        # The peak rate, which LambdaLR multiplies; groups with rates of their own keep their ratios.
        group["initial_lr"] = group["lr"]
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

    # GradScaler skips a step whose gradients overflow, often the first one, and the scheduler would warn that it was
    # stepped before the optimizer (https://github.com/pytorch/pytorch/issues/44511).
    optimizer._opt_called = True  # type: ignore[attr-defined]
    return LambdaLR(optimizer, factor, last_epoch=done_steps - 1)


def one_cycle(done: float, warm_up: float = ONE_CYCLE_WARM_UP) -> float:
    """Return the factor on the peak rate after this fraction of all steps: a linear rise from 0, then a cosine to 0."""
    if done < warm_up:
        return done / warm_up
    return 0.5 * (1.0 + math.cos(math.pi * ((done - warm_up) / (1.0 - warm_up))))
