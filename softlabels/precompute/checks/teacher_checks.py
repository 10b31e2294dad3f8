"""Teacher checks before a job: outputs depend on one sample alone, and the last layer gives the logits.

Legend: R rows of a batch, C classes, D width of hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from softlabels.encodings import Hidden, hidden_encoding
from softlabels.errors import TeacherError
from softlabels.precompute.pipeline.inference import TeacherEnsemble, as_tensor
from softlabels.precompute.row_batches import RowBatch
from softlabels.precompute.teachers import Teacher

_MOST_SHIFT = 0.05
"""Largest difference of a probability between a sample alone and in a batch: half precision and other kernels stay well
below, normalisation over the batch is far above."""

_HEAD_TOLERANCE = 1e-3
_HALF_HEAD_TOLERANCE = 1e-2
"""Relative to the largest logit: bfloat16 rounds each logit by up to 2⁻⁸, float32 products add in another order."""


def checked_logits(ensemble: TeacherEnsemble, batch: RowBatch) -> list[Tensor]:
    """Return each teacher's logits of a few samples, [R, C], once the checks pass.

    Raises:
        TeacherError: a teacher writes into its inputs, answers the same batch twice differently, or gives a sample
            another distribution in a batch than alone.
        NonFiniteLogitsError, TeacherShapeError: as `TeacherEnsemble.run`.
    """
    first = [_run_on_copy(ensemble, teacher, batch) for teacher in ensemble.teachers]
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


def encoding_of_head(teacher: Teacher, params: Mapping[str, Any], *, logits_RC: Tensor, hidden_RD: Tensor) -> Hidden:
    """Return the encoding of hidden states with a teacher's last layer, after a check that the layer gives its logits.

    A store of hidden states keeps the layer's weights once and never runs it over the data, which for a large
    vocabulary saves most of the computation and nearly all of the space.

    Args:
        teacher: the only teacher of the store.
        params: parameters of the job's encoding: `kept_as`, `scale`, `softcap`.
        logits_RC, hidden_RD: outputs of the teacher for the same few rows.
    Raises:
        TeacherError: something else comes after the last layer; the message gives the largest difference.
    """
    head = teacher.head()
    bias_C = None if head.bias_C is None else head.bias_C.float().cpu().numpy()
    encoding = hidden_encoding(head.weight_CD.float().cpu().numpy(), bias_C, **params)
    made_RC, given_RC = encoding.logits_of_torch(hidden_RD), logits_RC.float()
    off = float("inf")
    if made_RC.shape == given_RC.shape:
        off = (given_RC - given_RC.amax(dim=-1, keepdim=True) - made_RC).abs().amax().item()
    tolerance = _HEAD_TOLERANCE if logits_RC.dtype == torch.float32 else _HALF_HEAD_TOLERANCE
    if not off <= tolerance * (1 + given_RC.abs().amax().item()):  # `not <=`: NaN is refused too
        raise TeacherError(
            f"the logits of teacher {teacher.spec.name!r} are not those of its last layer (off by up to {off:.3g}): "
            "something comes after it. Where the model scales its logits or caps them, say so in the job, as in "
            '{name = "hidden", scale = 0.125} or {name = "hidden", softcap = 30.0}; else keep logits'
        )
    return encoding


def _run_on_copy(ensemble: TeacherEnsemble, teacher: Teacher, batch: RowBatch) -> Tensor:
    alone = replace(ensemble, teachers=[teacher])
    inputs = as_tensor(batch.inputs.copy()).to(ensemble.device)
    (logits_RC,) = alone.forward(inputs, batch)
    alone.check_finite([logits_RC], batch.ids)
    if inputs.cpu().numpy().tobytes() != batch.inputs.tobytes():  # bytes: NaN is padding, and never equals itself
        raise TeacherError(
            f"teacher {teacher.spec.name!r} writes into its inputs, which the next member of an ensemble and the store "
            "would see: have its preprocessing return a new tensor (`x - mean`, not `x -= mean`)"
        )
    return logits_RC


def _first_row(batch: RowBatch) -> RowBatch:
    """Return the first input of a batch in which each input is one row."""
    parts = {entry.name: getattr(batch, entry.name) for entry in fields(batch)}
    return replace(batch, **{name: part[:1] for name, part in parts.items() if part is not None})
