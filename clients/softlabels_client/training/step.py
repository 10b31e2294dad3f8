"""What does one step of a student minimise, also on a rank that no sample was left for?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from softlabels.errors import MissingExtraError, RequestError
from softlabels.losses import SoftTargetBatch, make_loss
from softlabels.softmath import UNLABELLED
from softlabels.transfer_set import TransferSet
from softlabels_client.data.distillation_batch import DistillationBatch
from softlabels_client.training.optimization import make_optimizer, set_learning_rate
from softlabels_client.training.settings import DistillSettings
from softlabels_client.training.training_state import load_optimizer, load_student, student_tree

Loss: TypeAlias = Callable[[Tensor, SoftTargetBatch], Tensor]
"""Of logits_BC and targets a scalar, for instance `softlabels.losses.DistillationLoss`."""


def step_loss(student: Callable[[Tensor], Tensor], batch: DistillationBatch, loss: Loss) -> Tensor:
    """The loss of one batch; 0 for an empty one, with a gradient of zeros, since other ranks wait for this one's.

    Args:
        student: maps inputs to logits_BC.
        batch: on the student's device.
        loss: of logits and targets.
    """
    logits_BC = student(batch.inputs)
    return loss(logits_BC, batch.targets) if len(batch) else logits_BC.sum() * 0.0


try:
    import torch
    from torch import nn
except ImportError as error:
    raise MissingExtraError(
        "testing a student needs torch, which is not installed: `pip install softlabels[torch]`", extra="torch"
    ) from error


@torch.no_grad()
def count_errors(student: nn.Module, samples: TransferSet, *, batch_size: int = 2_000) -> int:
    """How many labelled samples the student's most probable class gets wrong; in eval mode, its mode left as it was.

    Args:
        student: maps a batch of inputs to logits_BC.
        samples: a test set; unlabelled samples are passed over.
        batch_size: rows at a time.
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
        guesses = student(torch.from_numpy(np.array(batch.inputs)).to(device)).argmax(dim=1).cpu().numpy()
        known = batch.labels != UNLABELLED
        labelled += int(known.sum())
        wrong += int((guesses != batch.labels)[known].sum())
    student.train(was_training)
    if not labelled:
        raise RequestError(f"no sample of {samples.name!r} has a label, so errors cannot be counted on it")
    return wrong


try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise MissingExtraError(
        "training a student needs torch, which is not installed: `pip install softlabels[torch]`", extra="torch"
    ) from error


_MIXED = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Learner:
    """A student and what moves it.

    Args:
        student: moved to the device.
        settings: see there.
    Raises:
        RequestError: no such device, loss or option of it. ReferenceLoadError: an optimiser that cannot be made.
    """

    def __init__(self, student: nn.Module, settings: DistillSettings) -> None:
        self.device = _device(settings.device)
        self.student = student.to(self.device)
        self._mixed = _MIXED.get(settings.precision)
        self._max_norm = settings.max_gradient_norm
        weights = {} if settings.hard_weight is None else {"hard_weight": settings.hard_weight}
        self._loss = make_loss(settings.loss, **{**weights, **settings.loss_args})
        self._optimizer = make_optimizer(student, settings)
        self._optimizer.zero_grad()  # gradients that the caller left on the student are none of this training's
        # Scales the loss so that float16's gradients do not vanish, and passes over a step whose gradients overflow.
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self._mixed is torch.float16)

    @property
    def learning_rate(self) -> float:
        """Of the optimiser's first group, at the last step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def backward(self, batch: DistillationBatch, share: float) -> Tensor:
        """Add the gradients of a batch, of which the step's loss is a `share`.

        Returns:
            [2] the batch's mean loss and divergence, on the device: reading them would make the host wait for it.
        """
        on_device = batch.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, self._mixed, enabled=self._mixed is not None):
            logits_BC = self.student(on_device.inputs)
        loss = self._loss.parts(logits_BC, on_device.targets)
        self._scaler.scale(loss.total * share).backward()  # type: ignore[no-untyped-call]
        return torch.stack((loss.total.detach(), loss.kl))

    def step(self, rate_factor: float) -> None:
        """Move the student by the gradients added since the last step, at this share of the peak learning rate."""
        set_learning_rate(self._optimizer, rate_factor)
        if self._max_norm is not None:
            self._scaler.unscale_(self._optimizer)
            nn.utils.clip_grad_norm_(self.student.parameters(), self._max_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()

    def tree(self) -> dict[str, Any]:
        """Weights, optimiser and scaler, as `softlabels_client.training.checkpoint` keeps them."""
        return {
            **student_tree(self.student),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load(self, tree: dict[str, Any]) -> None:
        """Be again what `tree` was taken of."""
        load_student(self.student, tree)
        load_optimizer(self._optimizer, tree["optimizer"])
        self._scaler.load_state_dict(tree["scaler"])


def _device(name: str) -> torch.device:
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise RequestError(f"device is {name!r}; choose 'auto', 'cpu', 'cuda' or another that torch knows") from error
