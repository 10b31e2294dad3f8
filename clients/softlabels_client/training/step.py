"""Loss of one training step, and the student's errors on labelled samples.

Legend: B rows, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

from softlabels.errors import RequestError
from softlabels.extras import needs_extra
from softlabels.softmath import UNLABELLED
from softlabels.transfer_set import TransferSet
from softlabels_client.data.distillation_batch import DistillationBatch

with needs_extra("torch", "training a student"):
    import torch
    from torch import Tensor, nn

    from softlabels.losses import LossParts, SoftTargetBatch

Loss: TypeAlias = Callable[[Tensor, SoftTargetBatch], Tensor]
"""Maps logits_BC and targets to a scalar, for example `softlabels.losses.DistillationLoss`."""


class ErrorCount(NamedTuple):
    """Result of a test: `errors` wrong predictions among `samples` labelled samples."""

    errors: int
    samples: int

    @property
    def accuracy(self) -> float:
        """Correct predictions in percent."""
        return 100.0 * (self.samples - self.errors) / self.samples


def step_loss(student: Callable[[Tensor], Tensor], batch: DistillationBatch, loss: Loss) -> Tensor:
    """Return the loss of one batch; 0 with gradients of zero for an empty batch.

    At the end of an epoch a rank may have no samples left, while the other ranks wait for its gradients.

    Args:
        student: maps inputs to logits_BC.
        batch: on the student's device.
        loss: maps logits and targets to a scalar.
    """
    logits_BC = student(batch.inputs)
    return loss(logits_BC, batch.targets) if len(batch) else logits_BC.sum() * 0.0


@torch.no_grad()
def batch_sums(loss: LossParts, logits_BC: Tensor, targets: SoftTargetBatch) -> Tensor:
    """Return [4] sums over a batch's rows: loss, KL to the targets, correct predictions, labelled rows.

    They stay on the device: reading them would make the host wait for it.
    """
    means = torch.stack((loss.total, loss.kl)) * len(logits_BC)
    counts = means.new_zeros(2)
    if targets.labels_B is not None:
        labelled_B = targets.labels_B != UNLABELLED
        correct_B = (logits_BC.argmax(dim=1) == targets.labels_B) & labelled_B
        counts = torch.stack((correct_B.sum(), labelled_B.sum())).to(means)
    return torch.cat((means, counts))


@torch.no_grad()
def measure_errors(student: nn.Module, samples: TransferSet, *, batch_size: int = 2_000) -> ErrorCount:
    """Test the student in eval mode on labelled samples; its mode is restored afterwards.

    Args:
        student: maps a batch of inputs to logits_BC.
        samples: test set; unlabelled samples are skipped.
        batch_size: samples per forward pass.
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
        predicted_B = student(torch.from_numpy(np.array(batch.inputs)).to(device)).argmax(dim=1).cpu().numpy()
        known_B = batch.labels != UNLABELLED
        labelled += int(known_B.sum())
        wrong += int((predicted_B != batch.labels)[known_B].sum())
    student.train(was_training)
    if not labelled:
        raise RequestError(f"no sample of {samples.name!r} has a label, so errors cannot be counted on it")
    return ErrorCount(wrong, labelled)


def count_errors(student: nn.Module, samples: TransferSet, *, batch_size: int = 2_000) -> int:
    """Return how many labelled samples the student predicts wrongly; see `measure_errors`."""
    return measure_errors(student, samples, batch_size=batch_size).errors
