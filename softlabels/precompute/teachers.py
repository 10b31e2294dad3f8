"""Where teachers come from: a Python reference plus weights, loaded, frozen, and described for the manifest."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from softlabels.errors import JobError, ReferenceLoadError, TeacherError
from softlabels.manifest import TeacherSpec
from softlabels.precompute.job import TeacherTable
from softlabels.references import code_sha256, load_reference


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """One member of the ensemble, ready to answer."""

    model: nn.Module
    spec: TeacherSpec
    preprocess: Callable[[Tensor], Tensor] | None = None

    @torch.inference_mode()
    def logits(self, inputs: Tensor) -> Tensor:
        """logits_BC of a batch of inputs, on the model's device.

        Raises:
            TeacherError: the model fails, or returns something other than a tensor.
        """
        try:
            out = self.model(inputs if self.preprocess is None else self.preprocess(inputs))
        except (RuntimeError, TypeError, ValueError) as error:
            raise TeacherError(
                f"teacher {self.spec.name!r} fails on a batch of shape {tuple(inputs.shape)}, {inputs.dtype}: {error}"
            ) from error
        if not isinstance(out, Tensor):
            raise TeacherError(
                f"teacher {self.spec.name!r} returns {type(out).__name__}, not a tensor of logits: wrap the model so "
                "that it returns the logits alone"
            )
        return out


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
        digest = _load_weights(model, base / table.weights, name)
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


def teacher_from_module(model: nn.Module, *, name: str, weight: float = 1.0, device: str = "cpu") -> Teacher:
    """A teacher that lives in this process already."""
    cls = type(model)
    spec = TeacherSpec(
        name=name,
        model=f"{cls.__module__}:{cls.__qualname__}",
        arguments={},
        weights=None,
        weights_sha256=state_sha256(model),
        weight=weight,
        code_sha256=code_sha256(cls),
    )
    return Teacher(model=frozen(model, torch.device(device)), spec=spec)


def frozen(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on its device, in eval mode (no dropout, fixed normalisation), without gradients."""
    return model.to(device).eval().requires_grad_(False)


def state_sha256(model: nn.Module) -> str:
    """SHA-256 of a model's weights: names, types, shapes and bytes, in the order of their names."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        total.update(f"{name}|{array.dtype}|{tuple(array.shape)}|".encode())
        total.update(array.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _load_weights(model: nn.Module, path: Path, name: str) -> str:
    if not path.is_file():
        raise JobError(f"{name}: there is no weights file {path}")
    if path.suffix != ".safetensors":
        raise JobError(
            f"{name}: {path.name} is no safetensors file; pickled weights can run any code when they are loaded, so "
            "they are refused: convert them once with `safetensors.torch.save_file(torch.load(path, "
            "weights_only=True), …)`"
        )
    try:
        state: dict[str, Any] = load_file(path)
        model.load_state_dict(state, strict=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise JobError(f"{name}: {path.name} does not fit the model: {error}") from error
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
