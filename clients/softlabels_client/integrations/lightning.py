"""Lightning: a module with the distillation loss, and a data module whose sampler state is in every checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from softlabels.extras import needs_extra

with needs_extra("lightning", "training with Lightning"):
    from lightning.pytorch import LightningDataModule, LightningModule
    from torch import Tensor, nn
    from torch.optim import Optimizer

from softlabels.losses import DistillationLoss
from softlabels_client.data.loader import DistillationBatch, StatefulLoader
from softlabels_client.training.step import Loss, step_loss


class SoftTargetDataModule(LightningDataModule):
    """Batches for `Trainer.fit`; every checkpoint, also in the middle of an epoch, holds the sampler state.

    The loader shards each epoch by rank itself. Lightning does not replace its sampler, whatever
    `use_distributed_sampler` says, since the loader is not a DataLoader.

    Args:
        loader: from `data_loader` or `stream_loader`, without rank and world size.
        validation: result of `val_dataloader`: one loader or several, as Lightning takes them.
    """

    def __init__(self, loader: StatefulLoader, *, validation: Any = ()) -> None:
        super().__init__()
        self._loader, self._validation = loader, validation

    def train_dataloader(self) -> StatefulLoader:
        """Return the loader."""
        return self._loader

    def val_dataloader(self) -> Any:
        """Return the validation loaders."""
        return self._validation

    def state_dict(self) -> dict[str, Any]:
        """Return the sampler state, for the checkpoint."""
        return {"place": self._loader.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's sampler state, with any number of ranks and workers; raises as the loader."""
        self._loader.load_state_dict(state_dict["place"])


class DistillationModule(LightningModule):
    """A student and its distillation loss, to use as it is or to inherit from.

    Args:
        student: maps inputs to logits_BC.
        optimizer: maps parameters to an optimizer.
        loss: maps logits and targets to a scalar; `DistillationLoss()` if None.
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
        """Return the student's logits_BC."""
        logits_BC: Tensor = self.student(inputs)
        return logits_BC

    def training_step(self, batch: DistillationBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch, and log it as `train_loss`."""
        loss = step_loss(self.student, batch, self.loss)
        self.log("train_loss", loss.detach(), batch_size=max(1, len(batch)))
        return loss

    def configure_optimizers(self) -> Optimizer:
        """Return the optimizer of all parameters."""
        return self._optimizer(self.parameters())
