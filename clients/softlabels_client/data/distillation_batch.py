"""DistillationBatch, the inputs and soft targets of one training step, and its collate function."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from softlabels.errors import EmptyBatchError, ShapeMismatchError
from softlabels.extras import needs_extra
from softlabels.ids import IdArray, as_ids
from softlabels.losses import SoftTargetBatch

with needs_extra("torch", "training a student"):
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class DistillationBatch:
    """B samples with their soft targets: row i of all three belongs to the same sample.

    Attributes:
        inputs: [B, ...], as in the data set.
        targets: soft targets with their temperature, and hard labels if there are any.
        ids: [B] sample ids.
    """

    inputs: Tensor
    targets: SoftTargetBatch
    ids: IdArray

    def __post_init__(self) -> None:
        rows = {len(self.inputs), len(self.targets.logits_BC), len(self.ids)}
        if len(rows) != 1:
            raise ShapeMismatchError(
                f"{len(self.inputs)} inputs, {len(self.targets.logits_BC)} targets and {len(self.ids)} ids differ"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, rows: int) -> DistillationBatch:
        """Return the first rows; 0 gives an empty batch of the same shapes and dtypes."""
        labels_B = self.targets.labels_B
        targets = dataclasses.replace(
            self.targets,
            logits_BC=self.targets.logits_BC[:rows],
            labels_B=None if labels_B is None else labels_B[:rows],
        )
        return dataclasses.replace(self, inputs=self.inputs[:rows], targets=targets, ids=self.ids[:rows])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> DistillationBatch:
        """Return the batch on another device; ids stay on the host."""
        return dataclasses.replace(
            self,
            inputs=self.inputs.to(device, non_blocking=non_blocking),
            targets=self.targets.to(device, non_blocking=non_blocking),
        )


def collate_batches(fetched: DistillationBatch | Iterable[DistillationBatch]) -> DistillationBatch:
    """Return one batch: `fetched` itself, or its batches concatenated. The `collate_fn` for a `SoftTargetDataset`.

    Raises:
        EmptyBatchError: nothing to concatenate. ShapeMismatchError: batches of different temperatures.
    """
    if isinstance(fetched, DistillationBatch):
        return fetched
    parts = list(fetched)
    if not parts:
        raise EmptyBatchError("a batch needs at least one sample")
    if len(parts) == 1:
        return parts[0]
    targets = [part.targets for part in parts]
    carried = {(t.temperature, t.captured_temperature, t.locked) for t in targets}
    if len(carried) != 1:
        raise ShapeMismatchError(
            f"targets of different temperatures {sorted(carried)} cannot share a batch: the loss has one T"
        )
    return DistillationBatch(
        inputs=torch.cat([part.inputs for part in parts]),
        targets=dataclasses.replace(
            targets[0], logits_BC=torch.cat([t.logits_BC for t in targets]), labels_B=_joined_labels(targets)
        ),
        ids=as_ids(np.concatenate([part.ids for part in parts])),
    )


def _joined_labels(targets: list[SoftTargetBatch]) -> Tensor | None:
    labels = [t.labels_B for t in targets if t.labels_B is not None]
    if not labels:
        return None
    if len(labels) != len(targets):
        raise ShapeMismatchError(
            "targets with labels and targets without cannot share a batch: mark unlabelled rows -1"
        )
    return torch.cat(labels)
