"""Accelerate: a loader for custom training loops, sharded by rank, on the device, and checkpointed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from softlabels.extras import needs_extra

with needs_extra("accelerate", "training with accelerate"):
    from accelerate import Accelerator
    from accelerate.data_loader import DataLoaderStateMixin

from softlabels_client.data.distillation_batch import DistillationBatch
from softlabels_client.data.loader import StatefulLoader


class AcceleratedLoader(DataLoaderStateMixin):  # type: ignore[misc]
    """A loader's batches on the accelerator's device; its sampler state is saved and loaded with the accelerator's.

    The loader is already sharded by the accelerator's ranks, so `accelerator.prepare` returns this object unchanged.
    It tells the accelerator's gradient accumulation where an epoch ends.

    Args:
        loader: from `data_loader` or `stream_loader`, without rank and world size.
        accelerator: registers this object for checkpointing.
    """

    def __init__(self, loader: StatefulLoader, accelerator: Accelerator) -> None:
        self._loader = loader
        self._device = accelerator.device
        self.gradient_state = accelerator.gradient_state
        accelerator.register_for_checkpointing(self)

    @property
    def epoch(self) -> int:
        """Epoch of the next pass."""
        return self._loader.epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass, as `StatefulLoader.set_epoch`."""
        self._loader.set_epoch(epoch)

    def __len__(self) -> int:
        """Number of batches of a pass, the same on every rank."""
        return len(self._loader)

    def __iter__(self) -> Iterator[DistillationBatch]:
        self.reset()
        self.gradient_state._add_dataloader(self)
        try:
            for batch in self._loader:
                # Set before the batch is handed out: accelerate reads it while the batch is trained on.
                self.end_of_dataloader = self._loader.finished
                yield batch.to(self._device, non_blocking=True)
        finally:
            self.gradient_state._remove_dataloader(self)

    def state_dict(self) -> dict[str, Any]:
        """Return the sampler state."""
        return self._loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved sampler state, with any number of ranks and workers; raises as `StatefulLoader`."""
        self._loader.load_state_dict(state)
