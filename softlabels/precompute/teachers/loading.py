"""How does a [[teachers]] table become a teacher? Its `model` says where from; what follows is the same for all."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softlabels.errors import JobError, ReferenceLoadError
from softlabels.manifest import TeacherSpec
from softlabels.precompute.job import TeacherTable
from softlabels.precompute.teachers.checkpoints import read_state, weights_sha256
from softlabels.precompute.teachers.teacher import Teacher, frozen, state_sha256
from softlabels.references import code_sha256, load_reference


def load_teacher(table: TeacherTable, *, number: int, base: Path, device: torch.device) -> Teacher:
    """Build, load and freeze the teacher that a job names.

    Raises:
        ReferenceLoadError: the reference leads nowhere. JobError: weights missing, pickled or of another model.
    """
    name = table.name or f"teacher {number}"
    make = load_reference(table.model, base=base)
    try:
        model = make(**table.arguments) if callable(make) else make
    except TypeError as error:
        raise JobError(f"{name}: {table.model} does not take {dict(table.arguments)}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ReferenceLoadError(f"{name}: {table.model} gives a {type(model).__name__}, not a torch.nn.Module")
    digest = None
    if table.weights is not None:
        state: dict[str, Any] = read_state(base / table.weights, who=name)
        try:
            model.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise JobError(f"{name}: {table.weights} does not fit the model: {error}") from error
        digest = weights_sha256(base / table.weights)
    if not (math.isfinite(table.weight) and table.weight > 0):
        raise JobError(f"{name}: its weight in the mean is {table.weight}, it must be a finite positive number")
    preprocess = None if table.preprocess is None else load_reference(table.preprocess, base=base)
    spec = TeacherSpec(
        name=name,
        model=table.model,
        arguments=dict(table.arguments),
        weights=None if table.weights is None else Path(table.weights).name,
        weights_sha256=digest or state_sha256(model),
        weight=table.weight,
        preprocess=table.preprocess,
        code_sha256=code_sha256(make),
    )
    return Teacher(model=frozen(model, device), spec=spec, preprocess=preprocess)
