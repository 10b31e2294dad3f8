"""Teachers: requests for models, loaded models, and the ensemble members made of them, frozen and described.

Shapes: B samples, L positions of a sample, C classes, D features of the last hidden layer.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from softlabels.atomic_files import sha256_of
from softlabels.documents import Document, parse_document
from softlabels.errors import JobError, SoftLabelsError, TeacherError, TeacherShapeError
from softlabels.manifest import TeacherSpec
from softlabels.precompute.job import TeacherTable
from softlabels.precompute.teachers.checkpoints import read_state, weights_sha256
from softlabels.references import code_sha256

Gives = Literal["rows", "positions"]
Settings = TypeVar("Settings", bound=Document)


@dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    """The last layer of a teacher: logits = hidden @ weight_CD.T + bias_C.

    Attributes:
        weight_CD: one row a class, in the order of the store's classes.
        bias_C: None where the layer has none.
    """

    weight_CD: Tensor
    bias_C: Tensor | None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., C] of hidden states [..., D]."""
        return nn.functional.linear(hidden, self.weight_CD, self.bias_C)


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """One member of the ensemble.

    Attributes:
        model: takes the output of `preprocess` and returns logits alone, [B, C] or [B, L, C].
        spec: its entry in the manifest.
        preprocess: from the transfer set's inputs to the model's; None passes them on unchanged.
        gives: `rows` for one distribution a sample, `positions` for one at every position of a sequence of tokens.
        last_layer: the model's last layer, where it is one and known; see `hidden`.
        class_names: names of the classes, in the order of `logits`; None where they are not known.
        order_C: column j of `logits` is column `order_C[j]` of the model; None keeps the model's order.
    """

    model: nn.Module
    spec: TeacherSpec
    preprocess: Callable[[Tensor], Tensor] | None = None
    gives: Gives = "rows"
    last_layer: nn.Module | None = None
    class_names: tuple[str, ...] | None = None
    order_C: Tensor | None = None

    @torch.inference_mode()
    def logits(self, inputs: Tensor) -> Tensor:
        """Return logits of a batch of inputs on the model's device: [B, C], or [B, L, C] where it `gives` positions.

        Rows at padded positions (`softlabels.transfer_sets.ragged.PADDING` in the inputs) are undefined.

        Raises:
            TeacherError: the model fails, returns something other than a tensor, or is in training mode.
            TeacherShapeError: it has another number of classes than it names.
        """
        out = self._forward(inputs)
        if not isinstance(out, Tensor):
            raise TeacherError(
                f"teacher {self.spec.name!r} returns {type(out).__name__}, not a tensor of logits: wrap the model so "
                "that it returns the logits alone"
            )
        self._refuse_training_mode()
        if self.class_names is not None and out.shape[-1] != len(self.class_names):
            raise TeacherShapeError(
                f"teacher {self.spec.name!r} gives {out.shape[-1]} logits a row and names {len(self.class_names)} "
                "classes: its class list is another model's",
                logits=out.shape[-1],
                names=len(self.class_names),
            )
        return out if self.order_C is None else out.index_select(-1, self.order_C.to(out.device))

    @torch.inference_mode()
    def hidden(self, inputs: Tensor) -> Tensor:
        """Return the input of the last layer: [B, D] or [B, L, D]; `head().logits(hidden)` are the logits.

        The last layer itself is not computed, so this is cheaper than `logits`.

        Raises:
            TeacherError: no last layer is known, or the model does not reach it.
        """
        layer, captured = self._linear_head(), list[Tensor]()

        def capture(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            captured.extend(arguments[:1])
            raise _StopForward

        hook = layer.register_forward_pre_hook(capture)
        try:
            self._forward(inputs)
        except _StopForward:
            if captured:
                self._refuse_training_mode()
                return captured[0]
        finally:
            hook.remove()
        raise TeacherError(
            f"teacher {self.spec.name!r} does not pass its hidden state to its last layer: name another `head`"
        )

    def head(self) -> Head:
        """Return the last layer's parameters, in the order of the store's classes.

        Raises:
            TeacherError: no last layer is known, or it is not linear.
        """
        layer = self._linear_head()
        weight_CD, bias = layer.weight.detach(), cast("Tensor | None", layer.bias)
        bias_C = None if bias is None else bias.detach()
        if self.order_C is not None:
            order_C = self.order_C.to(weight_CD.device)
            weight_CD, bias_C = weight_CD[order_C], None if bias_C is None else bias_C[order_C]
        return Head(weight_CD=weight_CD, bias_C=bias_C)

    def _forward(self, inputs: Tensor) -> object:
        try:
            return self.model(inputs if self.preprocess is None else self.preprocess(inputs))
        except SoftLabelsError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            raise TeacherError(
                f"teacher {self.spec.name!r} fails on a batch of shape {tuple(inputs.shape)}, {inputs.dtype}: {error}"
            ) from error

    def _linear_head(self) -> nn.Linear:
        if not isinstance(self.last_layer, nn.Linear):
            found = "no last layer is known" if self.last_layer is None else f"it is a {type(self.last_layer).__name__}"
            raise TeacherError(
                f"the last layer of teacher {self.spec.name!r} is needed and {found}: name the linear layer that gives "
                "the logits as `head` in its [[teachers]] table"
            )
        return self.last_layer

    @cached_property
    def _modules(self) -> list[tuple[str, nn.Module]]:
        return list(self.model.named_modules())

    def _refuse_training_mode(self) -> None:
        # After every forward pass: a model may switch itself back to training mode in its own `forward`.
        for name, module in self._modules:
            if module.training:
                raise TeacherError(
                    f"teacher {self.spec.name!r} is in training mode ({name or type(module).__name__}): dropout and "
                    "batch statistics would change its targets from batch to batch; the model must stay in `eval()`"
                )


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model and what its source knows about it.

    Attributes:
        model: returns logits alone.
        sha256: digest of the file `weights`; None where the weights in memory are to be digested.
        code: the object that made it, where that has source code.
        revision: commit that a name on a hub was resolved to.
        class_names, last_layer, gives: as in `Teacher`.
        libraries: names of the libraries whose versions the manifest records.
        files: files whose bytes it computes with and which are in neither `sha256` nor the model's state.
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
    files: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """A model to load: `location` follows the kind and its colon in the table's `model`, a file or a name on a hub."""

    location: str
    table: TeacherTable
    base: Path
    device: torch.device
    label: str

    @property
    def path(self) -> Path:
        """The location as a file."""
        return self.base / self.location

    def settings(self, kind: type[Settings]) -> Settings:
        """Return the table's `arguments` as `kind`. Raises JobError, also where the table brings `weights`."""
        if self.table.weights is not None:
            raise JobError(f"{self.label}: {self.table.model} holds its own weights: leave `weights` out")
        return parse_document(dict(self.table.arguments), kind, what=f"{self.label}: arguments", error=JobError)

    def with_weights(self, loaded: LoadedModel) -> LoadedModel:
        """Return the model with the weights that the job brings, if any. Raises JobError if they do not fit."""
        if self.table.weights is None:
            return loaded
        path = self.base / self.table.weights
        state = read_state(path, label=self.label)
        try:
            loaded.model.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise JobError(f"{self.label}: {path.name} does not fit the model: {error}") from error
        return replace(loaded, sha256=weights_sha256(path), weights=path.name)


class _StopForward(Exception):  # noqa: N818  # no error: ends a forward pass whose rest is not needed
    """The hidden state was captured."""


def teacher_from_module(
    model: nn.Module,
    *,
    name: str,
    weight: float = 1.0,
    device: str = "cpu",
    preprocess: Callable[[Tensor], Tensor] | None = None,
    head: str | None = None,
    gives: Gives = "rows",
) -> Teacher:
    """Return a teacher made of a model in this process.

    Args:
        model: returns logits alone; it is frozen and moved to the device.
        name: name for messages and the manifest.
        weight: weight in the mean.
        device: torch device.
        preprocess: from the transfer set's inputs to the model's.
        head: dotted name of the last linear layer, for `Teacher.hidden`.
        gives: whether the model gives one row a sample or one at every position.
    Raises:
        TeacherError: there is no layer of that name.
    """
    cls, weights_sha256 = type(model), state_sha256(model)
    spec = TeacherSpec(
        name=name,
        model=f"{cls.__module__}:{cls.__qualname__}",
        arguments={},
        weights=None,
        weights_sha256=weights_sha256,
        state_sha256=computed_sha256((model, preprocess), weights_sha256),
        weight=weight,
        preprocess=None if preprocess is None else getattr(preprocess, "__qualname__", repr(preprocess)),
        code_sha256=code_sha256(cls),
    )
    return Teacher(
        model=frozen(model, torch.device(device)),
        spec=spec,
        preprocess=preprocess,
        gives=gives,
        last_layer=None if head is None else layer_named(model, head, label=name),
    )


def layer_named(model: nn.Module, name: str, *, label: str) -> nn.Module:
    """Return the layer of that dotted name. Raises TeacherError, with `label` for the teacher, if there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        known = ", ".join(child for child, _ in model.named_children())
        raise TeacherError(f"{label} has no layer {name!r}; its own are {known or 'none'}") from error


def frozen(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model on its device, in eval mode (no dropout, fixed normalisation), without gradients."""
    model = model.to(device).eval()
    for parameter in model.parameters():  # scripted modules refuse `model.requires_grad_`
        parameter.requires_grad_(False)
    return model


def state_sha256(model: nn.Module) -> str:
    """Return the SHA-256 of a model's weights: names, types, shapes and bytes, sorted by name."""
    return _sha256_of(model.state_dict())


def computed_sha256(parts: Sequence[object], weights_sha256: str, files: Sequence[tuple[str, Path]] = ()) -> str:
    """Return the digest of what a teacher computes with, whatever made it.

    Args:
        parts: model and preprocessing, of which modules count: their weights, and the tensors and arrays that their
            submodules hold as plain attributes. Buffers that are not persistent follow from these and from the code.
        weights_sha256: SHA-256 of the weights of the first part, see `state_sha256`.
        files: further files that the teacher reads, by the names that it knows them by.
    """
    total = hashlib.sha256(weights_sha256.encode())
    for number, part in enumerate(parts):
        if isinstance(part, nn.Module):
            total.update((_sha256_of(part.state_dict()) if number else "").encode())
            total.update(_sha256_of(_plain_tensors(part)).encode())
    for name, path in files:
        total.update(f"{name}|{sha256_of(path)}|".encode())
    return total.hexdigest()


def files_named_in(value: object, base: Path) -> Iterator[tuple[str, Path]]:
    """Yield (text, file) for every text in nested arguments that names a file, from `base` or the working folder."""
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from files_named_in(value[key], base)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from files_named_in(entry, base)
    elif isinstance(value, str) and value:
        with contextlib.suppress(OSError, ValueError):  # a text that no file system takes for a path
            found = dict.fromkeys(path.resolve() for path in (base / value, Path(value)) if path.is_file())
            yield from ((value, path) for path in found)


def _plain_tensors(model: nn.Module) -> dict[str, Any]:
    return {
        f"{prefix}.{name}": value
        for prefix, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufc")
    }


def _sha256_of(arrays: Mapping[str, Any]) -> str:
    total = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        if isinstance(array, Tensor):
            array = array.detach().cpu().contiguous()
            raw: Any = array.reshape(-1).view(torch.uint8).numpy()
        else:
            raw = array.tobytes()
        total.update(f"{name}|{array.dtype}|{tuple(array.shape)}|".encode())
        total.update(raw)
    return total.hexdigest()
