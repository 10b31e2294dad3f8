"""How does a student learn in Lightning? By a module for its loss, and data whose place a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from softlabels.errors import MissingExtraError

try:
    from lightning.pytorch import LightningDataModule, LightningModule
except ImportError as error:
    raise MissingExtraError(
        "this needs lightning, which is not installed: `pip install softlabels[lightning]`", extra="lightning"
    ) from error

from torch import Tensor, nn
from torch.optim import Optimizer

from softlabels.losses import DistillationLoss
from softlabels_client.data.distillation_batch import DistillationBatch
from softlabels_client.data.loader import StatefulLoader
from softlabels_client.training.step import Loss, step_loss


class SoftTargetDataModule(LightningDataModule):
    """Batches for `Trainer.fit`, whose place every checkpoint of the trainer carries, in the middle of an epoch, too.

    The order is the loader's own: Lightning leaves it alone whatever `use_distributed_sampler` says, since the loader
    is no DataLoader and shares the epoch among the ranks by itself.

    Args:
        loader: from `data_loader` or `stream_loader`, without rank and world size.
        validation: what `val_dataloader` gives: a loader or several, as Lightning takes them.
    """

    def __init__(self, loader: StatefulLoader, *, validation: Any = ()) -> None:
        super().__init__()
        self._loader, self._validation = loader, validation

    def train_dataloader(self) -> StatefulLoader:
        """The loader."""
        return self._loader

    def val_dataloader(self) -> Any:
        """What was given for validation; nothing if nothing was."""
        return self._validation

    def state_dict(self) -> dict[str, Any]:
        """The loader's place, for the checkpoint."""
        return {"place": self._loader.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from the checkpoint's place, under any number of ranks and workers.

        Raises:
            StoreChangedError, FingerprintMismatchError, ConflictError: it is a place in another training.
        """
        self._loader.load_state_dict(state_dict["place"])


class DistillationModule(LightningModule):
    """A student and its distillation loss; a class to use as it is, or to inherit from.

    Args:
        student: maps inputs to logits_BC.
        optimizer: makes one for the parameters that it is given.
        loss: of logits and targets; the paper's objective when left out.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        loss: Loss | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.loss: Loss = DistillationLoss() if loss is None else loss
        self._optimizer = optimizer

    def forward(self, inputs: Tensor) -> Tensor:
        """logits_BC of the student."""
        logits_BC: Tensor = self.student(inputs)
        return logits_BC

    def training_step(self, batch: DistillationBatch, batch_idx: int) -> Tensor:
        """The loss of a batch, logged as `train_loss`."""
        loss = step_loss(self.student, batch, self.loss)
        self.log("train_loss", loss.detach(), batch_size=max(1, len(batch)))
        return loss

    def configure_optimizers(self) -> Optimizer:
        """The optimizer that was given, over all parameters."""
        return self._optimizer(self.parameters())
