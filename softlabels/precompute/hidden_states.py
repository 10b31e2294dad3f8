"""The encoding of a teacher's hidden states, made from the teacher's last layer.

A store of hidden states never runs the last layer over the data: the layer's weights are stored once
(`softlabels.encodings.hidden`). For a large vocabulary this saves most of the computation and nearly all of the space.
Legend: R rows of a batch, C classes, D width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from softlabels.encodings import Hidden, hidden_encoding
from softlabels.errors import JobError, TeacherError
from softlabels.precompute.teachers import Teacher

_TOLERANCE = 1e-3
_HALF_TOLERANCE = 1e-2
"""Relative to the largest logit: bfloat16 rounds each logit by up to 2⁻⁸, float32 products add in another order."""


def encoding_of_head(teacher: Teacher, params: Mapping[str, Any], *, logits_RC: Tensor, hidden_RD: Tensor) -> Hidden:
    """Return the encoding with a teacher's head, once the head is seen to turn its hidden states into its logits.

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
    made_RC = encoding.logits_of_torch(hidden_RD)
    given_RC = logits_RC.float()
    off = float("inf")
    if made_RC.shape == given_RC.shape:
        shifted_RC = given_RC - given_RC.amax(dim=-1, keepdim=True)
        off = (shifted_RC - made_RC).abs().amax().item()
    tolerance = _TOLERANCE if logits_RC.dtype == torch.float32 else _HALF_TOLERANCE
    if not off <= tolerance * (1 + given_RC.abs().amax().item()):
        raise TeacherError(
            f"the logits of teacher {teacher.spec.name!r} are not those of its last layer (off by up to {off:.3g}): "
            "something comes after it. Where the model scales its logits or caps them, say so in the job, as in "
            '{name = "hidden", scale = 0.125} or {name = "hidden", softcap = 30.0}; else keep logits'
        )
    return encoding


def refuse_ensembles(teachers: Sequence[Teacher], keep: str) -> None:
    """Raise JobError unless there is one teacher and no members are kept separately."""
    if len(teachers) > 1 or keep == "members":
        raise JobError(
            "hidden states come from one teacher: those of several cannot be averaged, since each belongs to a head of "
            "its own. Make a store for each teacher, or keep logits"
        )
