"""How does a student take one step? Forward in the chosen precision, loss, gradients, an optimiser's step.

Legend: B rows, C classes.
"""

from __future__ import annotations

from typing import Any

from softlabels.errors import MissingExtraError, RequestError

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise MissingExtraError(
        "training a student needs torch, which is not installed: `pip install softlabels[torch]`", extra="torch"
    ) from error

from softlabels.losses import make_loss
from softlabels_client.data.distillation_batch import DistillationBatch
from softlabels_client.training.optimizers import make_optimizer, set_learning_rate
from softlabels_client.training.settings import DistillSettings
from softlabels_client.training.training_state import load_optimizer, load_student, student_tree

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
        """Weights, optimiser and scaler, as `softlabels_client.training.tensor_trees` keeps them."""
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
