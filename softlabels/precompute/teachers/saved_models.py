"""Models saved as programs, loaded without their Python code: TorchScript, `torch.export`, and ONNX by onnxruntime.

A program is code: load only what you would also run. Pickled objects beside the graph are refused.
"""

from __future__ import annotations

import importlib
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from softlabels.atomic_files import sha256_of
from softlabels.documents import Document
from softlabels.errors import JobError, TeacherError
from softlabels.extras import needs_extra
from softlabels.precompute.teachers.checkpoints import files_sha256
from softlabels.precompute.teachers.teacher import LoadedModel, ModelRequest

_RANDOM = ("dropout", "bernoulli", "rand", "randn", "rand_like", "randn_like", "normal", "multinomial", "rrelu")
"""Operators whose result changes from call to call; some have a training switch, which is looked at."""

_PICKLED = ("custom_obj", "opaque_obj", "aotinductor")
"""Parts of the names of pickles and machine code in a .pt2 archive."""

_LOCATION = re.compile(rb"\x0a\x08location\x12")
"""Start of a protobuf key-value pair: field 1, eight bytes, `location`; field 2, whose length byte follows."""

_FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""PyTorch's own switch: `torch.export.load` falls back to full pickles unless it is set."""

ONNX_DTYPES: Mapping[str, torch.dtype] = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(uint8)": torch.uint8,
    "tensor(int8)": torch.int8,
    "tensor(int32)": torch.int32,
    "tensor(int64)": torch.int64,
}
"""Types that ONNX, PyTorch and NumPy have in common."""


class OnnxSettings(Document, frozen=True, kw_only=True):
    """The `arguments` of an `onnx:` teacher.

    Attributes:
        output: name of the output that holds the logits; the first when None.
    """

    output: str | None = None


def load_torchscript(request: ModelRequest) -> LoadedModel:
    """Return the program that `torch.jit.save` wrote, in eval mode.

    Raises:
        JobError: no such file, or no TorchScript. TeacherError: it was traced in training mode.
    """
    request.settings(Document)  # a saved program takes no arguments
    path, label = request.path, request.label
    _require_file(path, "program", label)
    try:
        with warnings.catch_warnings():
            # Deprecated in favour of torch.export, and still the format of many published models.
            warnings.simplefilter("ignore", DeprecationWarning)
            load: Any = torch.jit.load
            model = load(path, map_location="cpu")
    except (RuntimeError, ValueError, OSError) as error:
        raise JobError(f"{label}: {path.name} is no TorchScript program: {_first_line(error)}") from error
    model.eval()
    for node in _nodes(model.inlined_graph):
        arguments = [value.toIValue() if value.node().kind() == "prim::Constant" else None for value in node.inputs()]
        _refuse_training(node.kind().removeprefix("aten::"), arguments, label)
    return LoadedModel(model=model, sha256=sha256_of(path), weights=path.name)


def load_exported(request: ModelRequest) -> LoadedModel:
    """Return the program that `torch.export.save` wrote, on the device.

    Raises:
        JobError: no such file, no program, or one with pickled objects in it.
        TeacherError: it was exported in training mode.
    """
    request.settings(Document)  # a saved program takes no arguments
    path, label = request.path, request.label
    _require_file(path, "program", label)
    _refuse_pickled(path, label)
    try:
        with _weights_only():
            program = torch.export.load(path)
    except Exception as error:  # what damaged bytes raise is not documented
        raise JobError(f"{label}: {path.name} is no exported program that can be read: {_first_line(error)}") from error
    for node in program.graph.nodes:
        if node.op == "call_function":
            operator = str(getattr(node.target, "_opname", node.target))
            _refuse_training(operator, [*node.args, *node.kwargs.values()], label)
    if request.device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, request.device)
    return LoadedModel(model=ExportedModel(program.module()), sha256=sha256_of(path), weights=path.name)


def load_onnx(request: ModelRequest) -> LoadedModel:
    """Return an ONNX graph, run by onnxruntime; see `OnnxModel`."""
    path, output = request.path, request.settings(OnnxSettings).output
    model = OnnxModel(path, device=request.device, label=request.label, output=output)
    # Tensors outside the graph are mostly in files named after it: net.onnx.data, net.onnx_data.
    external = sorted(file for file in path.parent.glob(f"{path.name}[._]*") if file.is_file())
    sha256 = files_sha256([path, *external]) if external else sha256_of(path)
    others = tuple(file for file in _external_files(path) if file not in external)
    return LoadedModel(model=model, sha256=sha256, weights=path.name, libraries=("onnxruntime",), files=others)


class ExportedModel(nn.Module):
    """An exported program as a module that can be frozen: its mode was fixed when it was exported."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        for module in program.modules():
            module.training = False  # exported modules refuse `eval()`; the graph was checked instead
        self.program = program

    def train(self, mode: bool = True) -> ExportedModel:
        """Record the mode; the graph has none."""
        self.training = mode
        return self

    def forward(self, inputs: Tensor) -> object:
        """Return the program's output for one tensor."""
        try:
            return self.program(inputs)
        except AssertionError as error:  # a guard on shapes
            raise ValueError(
                f"{_first_line(error)}: the program was exported for other shapes; export it with a dynamic batch axis "
                "(`dynamic_shapes`)"
            ) from error


class OnnxModel(nn.Module):
    """An ONNX graph as a module: batches go through host memory, to CUDA and back where onnxruntime uses it.

    Args:
        path: the `.onnx` file, in one folder with its external tensors.
        device: torch device; CUDA needs an onnxruntime built for it.
        label: name of the teacher, for messages.
        output: name of the output that holds the logits; the first when None.
    Raises:
        MissingExtraError: onnxruntime is not installed.
        JobError: no such file, no graph, several inputs, no such output, or no such device.
    """

    def __init__(self, path: Path, *, device: torch.device, label: str, output: str | None = None) -> None:
        super().__init__()
        self._session = _onnx_session(path, device, label)
        self._input = _only_input(self._session, label)
        self._output = _logits_output(self._session, output, label)
        self._dtype = ONNX_DTYPES[self._input.type]

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of a batch, on the device of the batch."""
        if inputs.dtype != self._dtype:
            raise TypeError(
                f"the graph's input {self._input.name!r} takes {self._dtype}, not {inputs.dtype}: name a `preprocess`"
            )
        for axis, size in enumerate(self._input.shape):
            if isinstance(size, int) and (axis >= inputs.ndim or inputs.shape[axis] != size):
                hint = "export it with a dynamic batch axis" if axis == 0 else "name a `preprocess` that makes it so"
                raise ValueError(
                    f"the graph's input {self._input.name!r} has the shape {self._input.shape}, the batch "
                    f"{list(inputs.shape)}: {hint}"
                )
        try:
            output = self._session.run([self._output], {self._input.name: inputs.cpu().numpy()})[0]
        except Exception as error:  # onnxruntime's own classes derive from Exception alone
            raise ValueError(f"onnxruntime: {error}") from error
        return torch.from_numpy(np.asarray(output)).to(inputs.device)


def _onnx_session(path: Path, device: torch.device, label: str) -> Any:
    with needs_extra("onnx", f"{label}: running an ONNX graph"):
        onnxruntime: Any = importlib.import_module("onnxruntime")
    _require_file(path, "ONNX file", label)
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise JobError(
                f"{label}: this onnxruntime cannot use CUDA: pip install onnxruntime-gpu instead of onnxruntime, or "
                'run the job with `device = "cpu"`'
            )
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # its own classes derive from Exception alone
        raise JobError(f"{label}: {path.name} is no ONNX graph that onnxruntime can run: {error}") from error


def _external_files(path: Path) -> list[Path]:
    """Return the files that the graph says its tensors are in: `location` entries of `external_data` (onnx.proto)."""
    raw = path.read_bytes()
    ends = [(found.end(), raw[found.end()]) for found in _LOCATION.finditer(raw) if found.end() < len(raw)]
    names = {raw[start + 1 : start + 1 + length].decode(errors="replace") for start, length in ends}
    return sorted(file for name in names if (file := path.parent / name).is_file())


def _only_input(session: Any, label: str) -> Any:
    found = session.get_inputs()
    if len(found) != 1:
        names = ", ".join(repr(entry.name) for entry in found)
        raise JobError(
            f"{label}: a teacher takes one input, its ONNX graph {len(found)} ({names}): make others constant"
        )
    if found[0].type not in ONNX_DTYPES:
        raise JobError(f"{label}: its input {found[0].name!r} takes {found[0].type}, which no transfer set gives")
    return found[0]


def _logits_output(session: Any, name: str | None, label: str) -> str:
    known = {entry.name: entry.type for entry in session.get_outputs()}
    chosen = next(iter(known)) if name is None else name
    if chosen not in known:
        raise JobError(f"{label}: its ONNX graph has no output {chosen!r}; it has {', '.join(map(repr, known))}")
    if known[chosen] not in ("tensor(float)", "tensor(float16)", "tensor(double)"):
        others = ", ".join(f"{key!r} ({kind})" for key, kind in known.items() if key != chosen) or "none"
        raise JobError(
            f"{label}: output {chosen!r} of its ONNX graph gives {known[chosen]}, not logits: name another as `output` "
            f"in its arguments (others: {others})"
        )
    return chosen


def _refuse_training(operator: str, arguments: list[Any], label: str) -> None:
    """Raise TeacherError if an operator's result depends on chance or on the rest of the batch."""
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
        f"{label} was saved in training mode: its graph has {operator!r} switched on, so its targets would change from "
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


def _refuse_pickled(path: Path, label: str) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise JobError(f"{label}: {path.name} is no exported program: {error}") from error
    found = [name for name in names if any(word in name for word in _PICKLED)]
    if found:
        raise JobError(
            f"{label}: {path.name} holds pickled objects or machine code ({found[0]}), which run when they are loaded: "
            "export the model without them"
        )


def _require_file(path: Path, what: str, label: str) -> None:
    if not path.is_file():
        raise JobError(f"{label}: there is no {what} {path}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
