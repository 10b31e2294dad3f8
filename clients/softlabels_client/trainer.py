"""How does a student learn from soft targets? One plain loop: fetch, forward, distillation loss, step.

Legend: B rows, C classes.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from softlabels.errors import MissingExtraError, RequestError

try:
    import torch
    from torch import nn
except ImportError as error:
    raise MissingExtraError(
        "training a student needs torch, which is not installed: `pip install softlabels[torch]`", extra="torch"
    ) from error

from softlabels.losses import distillation_loss
from softlabels.progress import QUIET, Progress
from softlabels_client.datasets import SoftTargetDataset, data_loader
from softlabels_client.prefetch import one_ahead
from softlabels_client.settings import DistillSettings

WARM_UP_SHARE = 0.2
"""Share of all steps in which a one-cycle schedule rises to its peak."""


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """What came of a training.

    Attributes:
        losses: mean of the whole loss over each epoch's rows, as the student was while it learnt them.
        divergences: mean KL(target, student) at T over each epoch's rows, nats: 0 when the targets are learnt.
        errors: what `evaluate` returned after each epoch; empty without it.
        seconds: of the whole training, evaluation included.
    """

    losses: tuple[float, ...]
    divergences: tuple[float, ...]
    errors: tuple[float, ...]
    seconds: float


def distill(
    student: nn.Module,
    dataset: SoftTargetDataset,
    settings: DistillSettings,
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    progress: Progress = QUIET,
) -> DistillResult:
    """Train `student` in place on the data set's soft targets; the same arguments give the same weights on one machine.

    Args:
        student: maps a batch of inputs to logits_BC, one a class of the store.
        dataset: inputs paired with targets, which carry the temperature.
        settings: see there.
        evaluate: called after each epoch with the student in eval mode and without gradients.
        progress: advanced by the rows of each step.
    Raises:
        ShapeMismatchError: the student's classes are not the store's.
        FingerprintMismatchError, UnknownIdError: the inputs are not those that the targets were computed for.
        RequestError: the loss is no number any more: the training diverged.
    """
    started_s = time.monotonic()
    device = _device(settings.device)
    student.to(device)
    loader = data_loader(dataset, batch_size=settings.batch_size, seed=settings.seed, workers=settings.workers)
    optimizer = _optimizer(student, settings)
    losses: list[float] = []
    divergences: list[float] = []
    errors: list[float] = []
    step, steps = 0, settings.epochs * len(loader)
    with _seeded(settings.seed, device):
        for epoch in range(settings.epochs):
            student.train()
            total = torch.zeros(2, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
            for batch in loader if settings.workers else one_ahead(loader):
                on_device = batch.to(device, non_blocking=True)
                _set_learning_rate(optimizer, settings.learning_rate * _factor(settings, step / steps))
                with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
                    logits_BC = student(on_device.inputs)
                loss = distillation_loss(logits_BC, on_device.targets, hard_weight=settings.hard_weight)
                optimizer.zero_grad()
                loss.total.backward()  # type: ignore[no-untyped-call]
                if settings.max_gradient_norm is not None:
                    nn.utils.clip_grad_norm_(student.parameters(), settings.max_gradient_norm)
                optimizer.step()
                # Summed on the device: reading a figure at each step would make the host wait for it.
                total += len(batch) * torch.stack((loss.total.detach(), loss.kl))
                step += 1
                progress.advance(len(batch))
            mean_loss, mean_divergence = (total / len(dataset)).tolist()
            losses.append(_finite(mean_loss, epoch))
            divergences.append(mean_divergence)
            if evaluate is not None:
                errors.append(_evaluated(student, evaluate))
            progress.note(_summary(epoch, settings, losses, errors))
    return DistillResult(
        losses=tuple(losses),
        divergences=tuple(divergences),
        errors=tuple(errors),
        seconds=time.monotonic() - started_s,
    )


def one_cycle(done_share: float) -> float:
    """The factor on the peak learning rate after `done_share` of all steps: a linear rise, then a cosine fall to 0."""
    if done_share < WARM_UP_SHARE:
        return done_share / WARM_UP_SHARE
    return 0.5 * (1.0 + math.cos(math.pi * (done_share - WARM_UP_SHARE) / (1.0 - WARM_UP_SHARE)))


def _device(name: str) -> torch.device:
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise RequestError(f"device is {name!r}; choose 'auto', 'cpu', 'cuda' or another that torch knows") from error


def _optimizer(student: nn.Module, settings: DistillSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(student.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        student.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
        weight_decay=settings.weight_decay,
    )


def _set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _factor(settings: DistillSettings, done_share: float) -> float:
    return one_cycle(done_share) if settings.schedule == "one_cycle" else 1.0


def _finite(loss: float, epoch: int) -> float:
    if math.isfinite(loss):
        return loss
    raise RequestError(
        f"the loss is {loss} in epoch {epoch + 1}: the training diverged; try a smaller learning_rate, and look at the "
        "student's own inputs and outputs"
    )


@torch.no_grad()
def _evaluated(student: nn.Module, evaluate: Callable[[nn.Module], float]) -> float:
    student.eval()
    return float(evaluate(student))


def _summary(epoch: int, settings: DistillSettings, losses: list[float], errors: list[float]) -> str:
    tested = f", errors {errors[-1]:g}" if errors else ""
    return f"epoch {epoch + 1} of {settings.epochs}, loss {losses[-1]:.4f}{tested}"


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    # Dropout draws from torch's global generators: they are seeded here, and given their state back afterwards.
    devices: list[Any] = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
