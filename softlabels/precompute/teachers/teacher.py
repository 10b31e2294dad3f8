"""What is a teacher? One member of the ensemble: a frozen model, what comes before it, what the manifest says of it.

Shapes: B samples, L positions of a sample, C classes, D features of the last hidden layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast

import torch
from torch import Tensor, nn

from softlabels.errors import SoftLabelsError, TeacherError, TeacherShapeError
from softlabels.manifest import TeacherSpec
from softlabels.references import code_sha256

Gives = Literal["rows", "positions"]


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
        """[..., C] of [..., D]."""
        return nn.functional.linear(hidden, self.weight_CD, self.bias_C)


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """One member of the ensemble, ready to answer.

    Attributes:
        model: takes what `preprocess` gives and returns logits alone, [B, C] or [B, L, C].
        spec: what the manifest says of it.
        preprocess: from the transfer set's inputs to what the model takes; None hands them over as they are.
        gives: `rows` for one distribution a sample, `positions` for one at every position of a sequence of tokens.
        last_layer: the model's last layer, where it is one and known; see `hidden`.
        class_names: names of the classes, in the order in which `logits` gives them; None where nobody said.
        order_C: column j of `logits` is column `order_C[j]` of the model; None leaves them as they are.
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
        """Logits of a batch of inputs, on the model's device: [B, C], or [B, L, C] where it `gives` positions.

        Rows at positions of padding mean nothing (`softlabels.transfer_sets.ragged.PADDING` in the inputs).

        Raises:
            TeacherError: the model fails, returns something other than a tensor, or is in training mode.
            TeacherShapeError: it has another number of classes than it names.
        """
        out = self._answer(inputs)
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
        """What the last layer takes: [B, D] or [B, L, D]; `head().logits(hidden)` are the logits.

        The last layer itself is not computed, so this is cheaper than `logits`.

        Raises:
            TeacherError: no last layer is known, or the model did not come by it.
        """
        layer, caught = self._head_layer(), list[Tensor]()

        def catch(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            caught.extend(arguments[:1])
            raise _Caught

        hook = layer.register_forward_pre_hook(catch)
        try:
            self._answer(inputs)
        except _Caught:
            if caught:
                self._refuse_training_mode()
                return caught[0]
        finally:
            hook.remove()
        raise TeacherError(
            f"teacher {self.spec.name!r} does not hand its hidden state to its last layer: name another `head`"
        )

    def head(self) -> Head:
        """The last layer's numbers, in the order of the store's classes.

        Raises:
            TeacherError: no last layer is known, or it is not linear.
        """
        layer = self._head_layer()
        weight_CD, bias = layer.weight.detach(), cast("Tensor | None", layer.bias)
        bias_C = None if bias is None else bias.detach()
        if self.order_C is not None:
            order_C = self.order_C.to(weight_CD.device)
            weight_CD, bias_C = weight_CD[order_C], None if bias_C is None else bias_C[order_C]
        return Head(weight_CD=weight_CD, bias_C=bias_C)

    def _answer(self, inputs: Tensor) -> object:
        try:
            return self.model(inputs if self.preprocess is None else self.preprocess(inputs))
        except SoftLabelsError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            raise TeacherError(
                f"teacher {self.spec.name!r} fails on a batch of shape {tuple(inputs.shape)}, {inputs.dtype}: {error}"
            ) from error

    def _head_layer(self) -> nn.Linear:
        if not isinstance(self.last_layer, nn.Linear):
            found = "no last layer is known" if self.last_layer is None else f"it is a {type(self.last_layer).__name__}"
            raise TeacherError(
                f"the last layer of teacher {self.spec.name!r} is asked for and {found}: name the linear layer that "
                "gives the logits as `head` in its [[teachers]] table"
            )
        return self.last_layer

    @cached_property
    def _parts(self) -> list[tuple[str, nn.Module]]:
        return list(self.model.named_modules())

    def _refuse_training_mode(self) -> None:
        # After the answer, and every time: a model may set itself back in its own `forward`.
        for name, part in self._parts:
            if part.training:
                raise TeacherError(
                    f"teacher {self.spec.name!r} is in training mode ({name or type(part).__name__}): dropout and "
                    "batch statistics would change its targets from batch to batch; let the model leave `eval()` alone"
                )


class _Caught(Exception):  # noqa: N818  # no error: the way out of a forward pass whose rest nobody needs
    """The hidden state is in hand."""


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
    """A teacher that lives in this process already.

    Args:
        model: gives logits alone.
        name: for messages and the manifest.
        weight: in the mean.
        device: where it is to run.
        preprocess: from the transfer set's inputs to what the model takes.
        head: dotted name of its last linear layer, for `Teacher.hidden`.
        gives: whether it answers once a sample or at every position.
    Raises:
        TeacherError: there is no layer of that name.
    """
    cls = type(model)
    spec = TeacherSpec(
        name=name,
        model=f"{cls.__module__}:{cls.__qualname__}",
        arguments={},
        weights=None,
        weights_sha256=state_sha256(model),
        weight=weight,
        preprocess=None if preprocess is None else getattr(preprocess, "__qualname__", repr(preprocess)),
        code_sha256=code_sha256(cls),
    )
    return Teacher(
        model=frozen(model, torch.device(device)),
        spec=spec,
        preprocess=preprocess,
        gives=gives,
        last_layer=None if head is None else layer_named(model, head, who=name),
    )


def layer_named(model: nn.Module, name: str, *, who: str) -> nn.Module:
    """The layer of that dotted name. Raises TeacherError: there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        known = ", ".join(part for part, _ in model.named_children())
        raise TeacherError(f"{who} has no layer {name!r}; its own are {known or 'none'}") from error


def frozen(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on its device, in eval mode (no dropout, fixed normalisation), without gradients."""
    model = model.to(device).eval()
    for parameter in model.parameters():  # one by one: scripted modules refuse to be asked as a whole
        parameter.requires_grad_(False)
    return model


def state_sha256(model: nn.Module) -> str:
    """SHA-256 of a model's weights: names, types, shapes and bytes, in the order of their names."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        array = tensor.detach().cpu().contiguous()
        total.update(f"{name}|{array.dtype}|{tuple(array.shape)}|".encode())
        total.update(array.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()
