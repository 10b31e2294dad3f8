"""Registry of model sources: what `model` in a [[teachers]] table may name, and how it becomes a teacher."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softlabels.class_list import make_class_list
from softlabels.documents import parse_document
from softlabels.errors import JobError, ReferenceLoadError
from softlabels.manifest import TeacherSpec
from softlabels.precompute.job import TeacherTable
from softlabels.precompute.teachers.class_alignment import FROM_MODEL, checked_names, read_class_list
from softlabels.precompute.teachers.image_preprocessing import ImagePreprocessing
from softlabels.precompute.teachers.model_hubs import load_timm, load_torchvision, load_transformers
from softlabels.precompute.teachers.saved_models import load_exported, load_onnx, load_torchscript
from softlabels.precompute.teachers.teacher import (
    LoadedModel,
    ModelRequest,
    Teacher,
    computed_sha256,
    files_named_in,
    frozen,
    layer_named,
    state_sha256,
)
from softlabels.references import code_sha256, load_reference

PYTHON = "python"
"""Kind of a teacher made by a Python reference: any `model` that does not begin with one of `KINDS` and a colon."""


def load_teacher(table: TeacherTable, *, number: int, base: Path, device: torch.device) -> Teacher:
    """Build, load and freeze the teacher that a job names.

    Args:
        table: the teacher's table.
        number: position among the job's teachers, which names it where the table does not.
        base: folder that relative paths start from.
        device: torch device.
    Raises:
        ReferenceLoadError: the reference cannot be resolved. MissingExtraError: a library is not installed.
        JobError: weights are missing, pickled or another model's, or the table does not fit this kind of teacher.
        TeacherError: a program that was saved in training mode.
    """
    label = table.name or f"teacher {number}"
    if not (math.isfinite(table.weight) and table.weight > 0):
        raise JobError(f"{label}: `weight` is {table.weight}, it must be a finite positive number")
    kind, location = kind_of(table.model)
    request = ModelRequest(location=location, table=table, base=base, device=device, label=label)
    loaded = _load_python(request) if kind == PYTHON else KINDS[kind](request)
    preprocess, preprocess_facts = _preprocessing(request)
    names = _class_names(request, loaded)
    weights_sha256 = state_sha256(loaded.model)
    files = [*files_named_in(table.arguments, base), *((path.name, path) for path in loaded.files)]
    spec = TeacherSpec(
        name=label,
        model=table.model,
        arguments=dict(table.arguments),
        weights=loaded.weights,
        weights_sha256=loaded.sha256 or weights_sha256,
        state_sha256=computed_sha256((loaded.model, preprocess), weights_sha256, files),
        weight=table.weight,
        code_sha256=None if loaded.code is None else code_sha256(loaded.code),
        kind=kind,
        revision=loaded.revision,
        class_list_sha256=None if names is None else make_class_list(names).sha256,
        libraries={name: _version(name) for name in loaded.libraries} or None,
        **preprocess_facts,
    )
    return Teacher(
        model=frozen(loaded.model, device),
        spec=spec,
        preprocess=preprocess,
        gives=loaded.gives,
        last_layer=loaded.last_layer if table.head is None else layer_named(loaded.model, table.head, label=label),
        class_names=names,
    )


def kind_of(model: str) -> tuple[str, str]:
    """Return kind and location of a teacher's `model`: `onnx:net.onnx` is of kind `onnx`, at `net.onnx`."""
    kind, colon, location = model.partition(":")
    return (kind, location) if colon and kind in KINDS else (PYTHON, model)


def _load_python(request: ModelRequest) -> LoadedModel:
    table, label = request.table, request.label
    make = load_reference(table.model, base=request.base)
    try:
        model = make(**table.arguments) if callable(make) and not isinstance(make, nn.Module) else make
    except TypeError as error:
        raise JobError(f"{label}: {table.model} does not take {dict(table.arguments)}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ReferenceLoadError(f"{label}: {table.model} returns a {type(model).__name__}, not a torch.nn.Module")
    return request.with_weights(LoadedModel(model=model, code=make))


KINDS: Mapping[str, Callable[[ModelRequest], LoadedModel]] = {
    "torchscript": load_torchscript,
    "export": load_exported,
    "onnx": load_onnx,
    "transformers": load_transformers,
    "timm": load_timm,
    "torchvision": load_torchvision,
}
"""What `model` may begin with, before a colon; anything else is a Python reference. Stored plans hold these names."""


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:  # installed under another name, as onnxruntime-gpu is
        return str(getattr(importlib.import_module(library), "__version__", "unknown"))


def _preprocessing(request: ModelRequest) -> tuple[Callable[[Tensor], Tensor] | None, dict[str, Any]]:
    """Return the callable before the model, and what the manifest records of it."""
    given = request.table.preprocess
    if given is None:
        return None, {}
    if isinstance(given, str):
        found = load_reference(given, base=request.base)
        return found, {"preprocess": given, "preprocess_sha256": code_sha256(found)}
    what = f"{request.label}: preprocess"
    return parse_document(dict(given), ImagePreprocessing, what=what, error=JobError), {"preprocess_table": dict(given)}


def _class_names(request: ModelRequest, loaded: LoadedModel) -> tuple[str, ...] | None:
    file, label = request.table.classes, request.label
    if file is None:
        return None
    if file != FROM_MODEL:
        return read_class_list(request.base / file, label=label)
    if loaded.class_names is None:
        raise JobError(f"{label}: its model does not name its classes: give `classes` a file of names, .txt or .json")
    return checked_names(loaded.class_names, label=f"{label}: its model")
