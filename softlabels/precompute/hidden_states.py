"""How is a teacher asked for its last hidden states, where a store keeps these instead of logits?

Its last layer is then never run over the data: its numbers are the store's own (`softlabels.encodings.hidden`), which
for a large vocabulary is the greater part of what a teacher computes and nearly all of what would be kept.
Legend: R rows of a batch, C classes, D width of the hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from softlabels.encodings import Encoding, Hidden, hidden_encoding
from softlabels.errors import JobError, TeacherError
from softlabels.precompute.teachers import Teacher

_TOLERANCE = 1e-3
_HALF_TOLERANCE = 1e-2
"""Beside the largest logit: half precision rounds each logit by up to 2⁻⁸ (bfloat16), and float32 in another order."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StatesTeacher(Teacher):
    """A teacher whose answers are its last hidden states, [B, D] or [B, L, D]."""

    @torch.inference_mode()
    def logits(self, inputs: Tensor) -> Tensor:
        """The hidden states in float32. Raises TeacherError: it has no last layer, or is in training mode."""
        found = self.hidden(inputs)
        self._refuse_training_mode()
        return found.float()


def states_teacher(teacher: Teacher) -> StatesTeacher:
    """The same teacher, asked for its hidden states."""
    return StatesTeacher(**{entry.name: getattr(teacher, entry.name) for entry in fields(teacher)})


def asked(teachers: Sequence[Teacher], encoding: Encoding) -> list[Teacher]:
    """The teachers as a run asks them: for their hidden states, where these are what is kept."""
    return [states_teacher(teacher) if isinstance(encoding, Hidden) else teacher for teacher in teachers]


def encoding_of_head(teacher: Teacher, params: Mapping[str, Any], *, logits_RC: Tensor, hidden_RD: Tensor) -> Hidden:
    """The encoding with a teacher's head, if its logits are what the head makes of its hidden states.

    Args:
        teacher: whose head it is.
        params: of the job's encoding: `kept_as`, `scale`, `softcap`.
        logits_RC, hidden_RD: what the teacher says of a few rows.
    Raises:
        TeacherError: something else comes after the last layer; the largest difference is named.
    """
    head = teacher.head()
    bias_C = None if head.bias_C is None else head.bias_C.float().cpu().numpy()
    encoding = hidden_encoding(head.weight_CD.float().cpu().numpy(), bias_C, **params)
    made_RC = encoding.logits_torch(hidden_RD)
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
    """Let one teacher pass. Raises JobError: there are several, or members are to be kept side by side."""
    if len(teachers) > 1 or keep == "members":
        raise JobError(
            "hidden states are of one teacher: those of several have no mean, since each goes with a head of its own. "
            "Make a store for each teacher, or keep logits"
        )
