"""Teacher checks before a job: a teacher's output for a sample must depend on that sample alone.

Legend: R rows of a batch, C classes.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from softlabels.errors import TeacherError
from softlabels.precompute.pipeline.inference import TeacherEnsemble, as_tensor
from softlabels.precompute.row_batches import RowBatch

_MOST_SHIFT = 0.05
"""Largest difference of a probability between a sample alone and in a batch: half precision and other kernels stay well
below, normalisation over the batch is far above."""


def checked_logits(ensemble: TeacherEnsemble, batch: RowBatch) -> list[Tensor]:
    """Return each teacher's logits of a few samples, [R, C], once the checks pass.

    Raises:
        TeacherError: a teacher writes into its inputs, which the next member and the store would see; answers the same
            batch twice differently; or gives a sample another distribution in a batch than alone.
        NonFiniteLogitsError, TeacherShapeError: as `TeacherEnsemble.run`.
    """
    first = [
        _run_on_copy(replace(ensemble, teachers=[teacher]), batch, teacher.spec.name) for teacher in ensemble.teachers
    ]
    for teacher, once, again in zip(ensemble.teachers, first, ensemble.run(batch), strict=True):
        if not torch.allclose(once, again, rtol=1e-3, atol=1e-3):
            raise TeacherError(
                f"teacher {teacher.spec.name!r} answers the same batch twice differently: something random is still on "
                "(functional dropout, sampling, noise), so its targets could never be verified"
            )
    # Padding makes sequences depend on their neighbours' lengths, and cut views are several rows of one sample.
    if batch.rows == len(batch.inputs) > 1 and ensemble.rows.table is None:
        for teacher, batch_RC, alone_RC in zip(ensemble.teachers, first, ensemble.run(_first_row(batch)), strict=True):
            shift = float((batch_RC[:1].float().softmax(-1) - alone_RC.float().softmax(-1)).abs().max())
            if shift > _MOST_SHIFT:
                raise TeacherError(
                    f"teacher {teacher.spec.name!r} gives a sample another distribution alone than in a batch (by "
                    f"{shift:.2g}): it normalises over the batch, as batch normalisation left in training mode does, "
                    "so a target would depend on the other samples; export or load it in evaluation mode"
                )
    return first


def _run_on_copy(ensemble: TeacherEnsemble, batch: RowBatch, name: str) -> Tensor:
    inputs = as_tensor(batch.inputs.copy()).to(ensemble.device)
    (logits_RC,) = ensemble.forward(inputs, batch)
    ensemble.check_finite([logits_RC], batch.ids)
    if inputs.cpu().numpy().tobytes() != batch.inputs.tobytes():  # bytes: NaN is padding, and never equals itself
        raise TeacherError(
            f"teacher {name!r} writes into its inputs, which the next member of an ensemble and the store would see: "
            "have its preprocessing return a new tensor (`x - mean`, not `x -= mean`)"
        )
    return logits_RC


def _first_row(batch: RowBatch) -> RowBatch:
    """Return the first input of a batch in which each input is one row."""
    parts = {entry.name: getattr(batch, entry.name) for entry in fields(batch)}
    return replace(batch, **{name: part[:1] for name, part in parts.items() if part is not None})
