"""How does a teacher come out of a saved program, without its Python code? TorchScript and `torch.export`.

A program is code: load only what you would also run. What is pickled beside the graph is refused all the same.
"""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softlabels.errors import JobError, TeacherError

_RANDOM = ("dropout", "bernoulli", "rand", "randn", "rand_like", "randn_like", "normal", "multinomial", "rrelu")
"""Operators whose answer changes from call to call; those with a switch for training are read by it."""

_PICKLED = ("custom_obj", "opaque_obj", "aotinductor")
"""In the name of whatever in a .pt2 archive is a pickle or machine code."""

_FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""PyTorch's own switch: `torch.export.load` falls back to full pickles, unless this forbids every one of them."""


def load_torchscript(path: Path, *, who: str) -> nn.Module:
    """The program that `torch.jit.save` wrote, in eval mode.

    Raises:
        JobError: no such file, or no TorchScript. TeacherError: it was traced in training mode.
    """
    _refuse_missing(path, who)
    try:
        with warnings.catch_warnings():
            # Deprecated in favour of torch.export, and still what many models are kept as.
            warnings.simplefilter("ignore", DeprecationWarning)
            load: Any = torch.jit.load
            model = load(path, map_location="cpu")
    except (RuntimeError, ValueError, OSError) as error:
        raise JobError(f"{who}: {path.name} is no TorchScript program: {_first_line(error)}") from error
    model.eval()
    for node in _nodes(model.inlined_graph):
        arguments = [value.toIValue() if value.node().kind() == "prim::Constant" else None for value in node.inputs()]
        _refuse_training(node.kind().removeprefix("aten::"), arguments, who)
    return model  # type: ignore[no-any-return]


def load_exported(path: Path, *, device: torch.device, who: str) -> nn.Module:
    """The program that `torch.export.save` wrote, for this device.

    Raises:
        JobError: no such file, no program, or one with pickled objects in it.
        TeacherError: it was exported in training mode.
    """
    _refuse_missing(path, who)
    _refuse_pickled(path, who)
    try:
        with _weights_only():
            program = torch.export.load(path)
    except Exception as error:  # what damaged bytes end in is not documented
        raise JobError(f"{who}: {path.name} is no exported program that can be read: {_first_line(error)}") from error
    for node in program.graph.nodes:
        if node.op == "call_function":
            operator = str(getattr(node.target, "_opname", node.target))
            _refuse_training(operator, [*node.args, *node.kwargs.values()], who)
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    return ExportedModel(program.module())


class ExportedModel(nn.Module):
    """An exported program as a module that can be frozen: its mode was fixed when it was exported."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        for part in program.modules():
            part.training = False  # `eval()` itself is refused by exported modules; the graph was looked through
        self.program = program

    def train(self, mode: bool = True) -> ExportedModel:
        """Does nothing but note the mode: the graph has none."""
        self.training = mode
        return self

    def forward(self, inputs: Tensor) -> object:
        """What the program gives for one tensor."""
        try:
            return self.program(inputs)
        except AssertionError as error:  # a guard on shapes
            raise ValueError(
                f"{_first_line(error)}: the program was exported for other shapes; export it with a dynamic batch axis "
                "(`dynamic_shapes`), and give it what it was exported for"
            ) from error


def _refuse_training(operator: str, arguments: list[Any], who: str) -> None:
    """Let an operator pass that gives the same answer for the same sample, whatever else is in the batch."""
    name = operator.partition(".")[0].rstrip("_")
    random = any(name.endswith(word) for word in _RANDOM)
    normalising = "batch_norm" in name or "instance_norm" in name
    # Dropout ends with its switch. Normalisation has two: `training` (or `use_input_stats`), and `cudnn_enabled` last.
    switch = arguments[5:6] if normalising else arguments[-1:]
    on = bool(switch) and switch[0] is True
    if "dropout" in name or normalising or name.endswith("rrelu"):
        if not on:
            return
    elif not random:
        return
    raise TeacherError(
        f"{who} was saved in training mode: its graph has {operator!r} switched on, so its targets would change from "
        "batch to batch; call `model.eval()`, then export or trace it again"
    )


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


@contextmanager
def _weights_only() -> Iterator[None]:
    before = os.environ.get(_FORCE_WEIGHTS_ONLY)
    os.environ[_FORCE_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCE_WEIGHTS_ONLY]
        else:
            os.environ[_FORCE_WEIGHTS_ONLY] = before


def _refuse_pickled(path: Path, who: str) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise JobError(f"{who}: {path.name} is no exported program: {error}") from error
    found = [name for name in names if any(word in name for word in _PICKLED)]
    if found:
        raise JobError(
            f"{who}: {path.name} holds pickled objects or machine code ({found[0]}), which run when they are loaded: "
            "export the model without them"
        )


def _refuse_missing(path: Path, who: str) -> None:
    if not path.is_file():
        raise JobError(f"{who}: there is no program {path}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
