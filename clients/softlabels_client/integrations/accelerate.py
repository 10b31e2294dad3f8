"""How does a loop of one's own use accelerate? With a loader that is ready: on the device, shared, checkpointed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from softlabels.errors import MissingExtraError

try:
    from accelerate import Accelerator
    from accelerate.data_loader import DataLoaderStateMixin
except ImportError as error:
    raise MissingExtraError(
        "this needs accelerate, which is not installed: `pip install softlabels[accelerate]`", extra="accelerate"
    ) from error

from softlabels_client.data.distillation_batch import DistillationBatch
from softlabels_client.data.loader import StatefulLoader


class AcceleratedLoader(DataLoaderStateMixin):  # type: ignore[misc]
    """A loader's batches on the accelerator's device; its place goes into `save_state` and comes from `load_state`.

    The order is the loader's own: its ranks are the accelerator's, and `accelerator.prepare` gives this object back as
    it is instead of sharding it once more. Gradient accumulation learns from it where an epoch ends.

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
        """The epoch that the next pass goes through, or goes on with."""
        return self._loader.epoch

    def set_epoch(self, epoch: int) -> None:
        """As `StatefulLoader.set_epoch`; without a call, passes follow each other."""
        self._loader.set_epoch(epoch)

    def __len__(self) -> int:
        """Batches of a pass, the same on every rank."""
        return len(self._loader)

    def __iter__(self) -> Iterator[DistillationBatch]:
        self.reset()
        self.gradient_state._add_dataloader(self)
        try:
            for batch in self._loader:
                self.end_of_dataloader = self._loader.finished
                yield batch.to(self._device, non_blocking=True)
        finally:
            self.gradient_state._remove_dataloader(self)

    def state_dict(self) -> dict[str, Any]:
        """The loader's place."""
        return self._loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a kept place, under any number of ranks and workers. Raises as `StatefulLoader`."""
        self._loader.load_state_dict(state)
