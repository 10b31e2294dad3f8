"""How good is a student? Errors counted on labelled samples."""

from __future__ import annotations

import numpy as np

from softlabels.errors import MissingExtraError, RequestError

try:
    import torch
    from torch import nn
except ImportError as error:
    raise MissingExtraError(
        "testing a student needs torch, which is not installed: `pip install softlabels[torch]`", extra="torch"
    ) from error

from softlabels.softmath import UNLABELLED
from softlabels.transfer import TransferSet


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
