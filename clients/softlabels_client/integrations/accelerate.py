"""Accelerate: a loader for custom training loops, sharded by rank, on the device, and checkpointed."""

from __future__ import annotations

from collections.abc import Iterator

from softlabels.extras import needs_extra

with needs_extra("accelerate", "training with accelerate"):
    from accelerate import Accelerator
    from accelerate.data_loader import DataLoaderStateMixin

from softlabels_client.data.loader import DistillationBatch, StatefulLoader
from softlabels_client.data.sampler import ResumableEpochs


class AcceleratedLoader(ResumableEpochs, DataLoaderStateMixin):  # type: ignore[misc]
    """A loader's batches on the accelerator's device; its sampler state is saved and loaded with the accelerator's.

    The loader is already sharded by the accelerator's ranks, so `accelerator.prepare` returns this object unchanged.
    It tells the accelerator's gradient accumulation where an epoch ends.

    Args:
        loader: from `data_loader` or `stream_loader`, without rank and world size.
        accelerator: registers this object for checkpointing.
    """

    def __init__(self, loader: StatefulLoader, accelerator: Accelerator) -> None:
        self._loader, self.state = loader, loader.state
        self._device = accelerator.device
        self.gradient_state = accelerator.gradient_state
        accelerator.register_for_checkpointing(self)

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
