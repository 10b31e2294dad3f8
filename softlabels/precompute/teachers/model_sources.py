"""How does a [[teachers]] table become a teacher? Its `model` says where from; what follows is the same for all."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softlabels.class_list import make_class_list
from softlabels.documents import Document
from softlabels.errors import JobError, ReferenceLoadError
from softlabels.manifest import TeacherSpec
from softlabels.precompute.job import TeacherTable, filled
from softlabels.precompute.teachers.checkpoints import file_sha256, read_state, weights_sha256
from softlabels.precompute.teachers.class_lists import OF_THE_MODEL, checked_names, read_class_list
from softlabels.precompute.teachers.image_preprocessing import PicturePreparation, check_preparation
from softlabels.precompute.teachers.model_hubs import HubSettings, load_hub_model, load_timm, load_torchvision
from softlabels.precompute.teachers.saved_models import OnnxModel, graph_sha256, load_exported, load_torchscript
from softlabels.precompute.teachers.teacher import Gives, Teacher, frozen, layer_named, state_sha256
from softlabels.references import code_sha256, load_reference

PYTHON = "python"
"""Kind of a teacher that a Python reference makes: whatever does not begin with one of `KINDS` and a colon."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model, and what its source says of it.

    Attributes:
        sha256: of the file that it came from; None where the weights in memory are to be digested.
        weights: that file's name.
        code: what made it, where that has source code.
        revision, class_names, last_layer, gives: as in `Teacher` and `TeacherSpec`.
        libraries: by name, whose versions belong into the manifest.
    """

    model: nn.Module
    sha256: str | None = None
    weights: str | None = None
    code: Any = None
    revision: str | None = None
    class_names: tuple[str, ...] | None = None
    last_layer: nn.Module | None = None
    gives: Gives = "rows"
    libraries: tuple[str, ...] = ()


class OnnxSettings(Document):
    """The `arguments` of an `onnx:` teacher.

    Attributes:
        output: name of the output that holds the logits; the first when None.
    """

    output: str | None = None


class NoSettings(Document):
    """The `arguments` of a program: it takes none."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a source is asked to load: the place after the colon, the table, and where and for whom."""

    place: str
    table: TeacherTable
    base: Path
    device: torch.device
    who: str = field(default="a teacher")

    @property
    def path(self) -> Path:
        """The place as a file."""
        return self.base / self.place


def load_teacher(table: TeacherTable, *, number: int, base: Path, device: torch.device) -> Teacher:
    """Build, load and freeze the teacher that a job names.

    Raises:
        ReferenceLoadError: the reference leads nowhere. MissingExtraError: a library is not installed.
        JobError: weights missing, pickled or of another model, or a table that no such teacher takes.
        TeacherError: a program that was saved in training mode.
    """
    who = table.name or f"teacher {number}"
    if not (math.isfinite(table.weight) and table.weight > 0):
        raise JobError(f"{who}: its weight in the mean is {table.weight}, it must be a finite positive number")
    kind, place = kind_of(table.model)
    order = Order(place=place, table=table, base=base, device=device, who=who)
    loaded = _from_python(order) if kind == PYTHON else KINDS[kind](order)
    preprocess, facts = _preparation(table, base, who)
    names = _class_names(table, loaded, base, who)
    spec = TeacherSpec(
        name=who,
        model=table.model,
        arguments=dict(table.arguments),
        weights=loaded.weights,
        weights_sha256=loaded.sha256 or state_sha256(loaded.model),
        weight=table.weight,
        code_sha256=None if loaded.code is None else code_sha256(loaded.code),
        kind=kind,
        revision=loaded.revision,
        class_list_sha256=None if names is None else make_class_list(names).sha256,
        libraries={name: _version(name) for name in loaded.libraries} or None,
        **facts,
    )
    return Teacher(
        model=frozen(loaded.model, device),
        spec=spec,
        preprocess=preprocess,
        gives=loaded.gives,
        last_layer=loaded.last_layer if table.head is None else layer_named(loaded.model, table.head, who=who),
        class_names=names,
    )


def kind_of(model: str) -> tuple[str, str]:
    """Where a teacher comes from, and what it is called there: `onnx:net.onnx` is of kind `onnx`, `net.onnx`."""
    kind, colon, place = model.partition(":")
    return (kind, place) if colon and kind in KINDS else (PYTHON, model)


def _from_python(order: Order) -> Loaded:
    table, who = order.table, order.who
    make = load_reference(table.model, base=order.base)
    try:
        model = make(**table.arguments) if callable(make) and not isinstance(make, nn.Module) else make
    except TypeError as error:
        raise JobError(f"{who}: {table.model} does not take {dict(table.arguments)}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ReferenceLoadError(f"{who}: {table.model} gives a {type(model).__name__}, not a torch.nn.Module")
    return _with_weights(Loaded(model=model, code=make), order)


def _with_weights(loaded: Loaded, order: Order) -> Loaded:
    """The model with the weights that the job brings, if any."""
    if order.table.weights is None:
        return loaded
    path = order.base / order.table.weights
    state = read_state(path, who=order.who)
    try:
        loaded.model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise JobError(f"{order.who}: {path.name} does not fit the model: {error}") from error
    return Loaded(**{**vars(loaded), "sha256": weights_sha256(path), "weights": path.name})


def _from_torchscript(order: Order) -> Loaded:
    _settings(NoSettings, order)
    return Loaded(
        model=load_torchscript(order.path, who=order.who), sha256=file_sha256(order.path), weights=order.path.name
    )


def _from_export(order: Order) -> Loaded:
    _settings(NoSettings, order)
    model = load_exported(order.path, device=order.device, who=order.who)
    return Loaded(model=model, sha256=file_sha256(order.path), weights=order.path.name)


def _from_onnx(order: Order) -> Loaded:
    settings = _settings(OnnxSettings, order)
    model = OnnxModel(order.path, device=order.device, who=order.who, output=settings.output)
    return Loaded(model=model, sha256=graph_sha256(order.path), weights=order.path.name, libraries=("onnxruntime",))


def _from_transformers(order: Order) -> Loaded:
    settings = _settings(HubSettings, order)
    found = load_hub_model(order.place, settings, base=order.base, who=order.who)
    file = None if settings.gguf_file is None else order.path / settings.gguf_file
    local = file if file is not None and file.is_file() else None
    return Loaded(
        **vars(found),
        sha256=None if local is None else file_sha256(local),
        weights=settings.gguf_file,
        libraries=("transformers",) if settings.gguf_file is None else ("transformers", "gguf"),
    )


def _from_timm(order: Order) -> Loaded:
    brings = order.table.weights is not None
    found = load_timm(order.place, order.table.arguments, has_weights=brings, who=order.who)
    return _with_weights(Loaded(**vars(found), libraries=("timm",)), order)


def _from_torchvision(order: Order) -> Loaded:
    brings = order.table.weights is not None
    found = load_torchvision(order.place, order.table.arguments, has_weights=brings, who=order.who)
    return _with_weights(Loaded(**vars(found), libraries=("torchvision",)), order)


KINDS: Mapping[str, Callable[[Order], Loaded]] = {
    "torchscript": _from_torchscript,
    "export": _from_export,
    "onnx": _from_onnx,
    "transformers": _from_transformers,
    "timm": _from_timm,
    "torchvision": _from_torchvision,
}
"""What `model` may begin with, before a colon; anything else is a Python reference."""


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:  # installed under another name, as onnxruntime-gpu is
        return str(getattr(importlib.import_module(library), "__version__", "unknown"))


def _settings(cls: type[Any], order: Order) -> Any:
    if order.table.weights is not None:
        raise JobError(f"{order.who}: {order.table.model} holds its own weights: leave `weights` out")
    return filled(cls, order.table.arguments, f"{order.who}: arguments")


def _preparation(table: TeacherTable, base: Path, who: str) -> tuple[Callable[[Tensor], Tensor] | None, dict[str, Any]]:
    """What comes before the model, and the facts of it that the manifest keeps."""
    if table.preprocess is None:
        return None, {}
    if isinstance(table.preprocess, str):
        found = load_reference(table.preprocess, base=base)
        return found, {"preprocess": table.preprocess, "preprocess_sha256": code_sha256(found)}
    where = f"{who}: preprocess"
    steps = check_preparation(filled(PicturePreparation, table.preprocess, where), where)
    return steps, {"preprocess_table": dict(table.preprocess)}


def _class_names(table: TeacherTable, loaded: Loaded, base: Path, who: str) -> tuple[str, ...] | None:
    if table.classes is None:
        return None
    if table.classes != OF_THE_MODEL:
        return read_class_list(base / table.classes, who=who)
    if loaded.class_names is None:
        raise JobError(f"{who}: its model does not name its classes: give `classes` a file of names, .txt or .json")
    return checked_names(loaded.class_names, who=f"{who}: its model")
