"""What does one step of a student minimise, also on a rank that no sample was left for?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from softlabels.losses import SoftTargetBatch
from softlabels_client.data.distillation_batch import DistillationBatch

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
