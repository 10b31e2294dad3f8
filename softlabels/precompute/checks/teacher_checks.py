"""Is a teacher's answer to a sample its own, whenever and beside whatever it is asked? Else nothing can be verified.

Legend: R rows of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from softlabels.errors import TeacherError
from softlabels.precompute.pipeline.inference import answers_of, ask, host_tensor, refuse_non_finite
from softlabels.precompute.row_batches import RowBatch, RowMaker
from softlabels.precompute.teachers import Teacher

_MOST_SHIFT = 0.05
"""Between the probabilities of a sample asked alone and among others: half precision and other kernels move them by
less, normalisation over the batch by far more."""


def steady_answers(teachers: Sequence[Teacher], batch: RowBatch, maker: RowMaker, device: torch.device) -> list[Tensor]:
    """What teachers say of a few samples, [R, C] each, if it depends on each sample alone.

    Raises:
        TeacherError: a teacher writes into its inputs, which the next member and the store would see; answers the same
            batch twice differently; or lets the other samples of a batch change its answer to one.
        NonFiniteLogitsError, TeacherShapeError: as `ask`.
    """
    answers = [_asked_of_a_copy(teacher, batch, maker, device) for teacher in teachers]
    for teacher, once, again in zip(teachers, answers, ask(teachers, batch, maker, device), strict=True):
        if not torch.allclose(once, again, rtol=1e-3, atol=1e-3):
            raise TeacherError(
                f"teacher {teacher.spec.name!r} answers the same batch twice differently: something random is still on "
                "(dropout by hand, sampling, noise), so its targets could never be verified"
            )
    if batch.rows == len(batch.inputs) > 1 and maker.table is None:
        alone = ask(teachers, _first_of(batch), maker, device)
        for teacher, among_RC, alone_RC in zip(teachers, answers, alone, strict=True):
            shift = float((among_RC[:1].float().softmax(-1) - alone_RC.float().softmax(-1)).abs().max())
            if shift > _MOST_SHIFT:
                raise TeacherError(
                    f"teacher {teacher.spec.name!r} gives a sample another distribution alone than among others (by "
                    f"{shift:.2g}): it normalises over the batch, as batch normalisation left in training mode does, "
                    "so a target would depend on its neighbours; export or load it in evaluation mode"
                )
    return answers


def _asked_of_a_copy(teacher: Teacher, batch: RowBatch, maker: RowMaker, device: torch.device) -> Tensor:
    inputs = host_tensor(batch.inputs.copy()).to(device)
    (answer_RC,) = answers_of([teacher], inputs, batch, maker)
    refuse_non_finite([answer_RC], [teacher], batch.ids)
    if inputs.cpu().numpy().tobytes() != batch.inputs.tobytes():
        raise TeacherError(
            f"teacher {teacher.spec.name!r} writes into its inputs, which the next member of an ensemble and the store "
            "would see: have its preprocessing return a new tensor (`x - mean`, not `x -= mean`)"
        )
    return answer_RC


def _first_of(batch: RowBatch) -> RowBatch:
    """The first input of a batch of which each is one row."""
    return replace(
        batch,
        inputs=batch.inputs[:1],
        ids=batch.ids[:1],
        keys=batch.keys[:1],
        labels=None if batch.labels is None else batch.labels[:1],
        fingerprints=None if batch.fingerprints is None else batch.fingerprints[:1],
        view_parameters=None if batch.view_parameters is None else batch.view_parameters[:1],
        kept_inputs=None if batch.kept_inputs is None else batch.kept_inputs[:1],
    )
