"""How does a teacher answer that is an ONNX graph? Through onnxruntime, one tensor in and one out."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from softlabels.errors import JobError, MissingExtraError
from softlabels.precompute.teachers.checkpoints import file_sha256, files_sha256

DTYPES: Mapping[str, torch.dtype] = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(uint8)": torch.uint8,
    "tensor(int8)": torch.int8,
    "tensor(int32)": torch.int32,
    "tensor(int64)": torch.int64,
}
"""Types that ONNX, PyTorch and NumPy have in common."""


class OnnxModel(nn.Module):
    """An ONNX graph as a module: batches go through host memory, to CUDA and back where that runs it.

    Args:
        path: the `.onnx` file; tensors that it keeps outside lie beside it.
        device: where to run; CUDA needs an onnxruntime that has it.
        who: whose graph, for messages.
        output: name of the output that holds the logits; the first when None.
    Raises:
        MissingExtraError: onnxruntime is not installed.
        JobError: no such file, no graph, several inputs, no such output, no such device.
    """

    def __init__(self, path: Path, *, device: torch.device, who: str, output: str | None = None) -> None:
        super().__init__()
        self._who = who
        self._session = _session(path, device, who)
        self._input = _only_input(self._session, who)
        self._output = _named_output(self._session, output, who)
        self.takes = DTYPES[self._input.type]

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of a batch, on the device that it came from."""
        if inputs.dtype != self.takes:
            raise TypeError(
                f"the graph's input {self._input.name!r} takes {self.takes}, not {inputs.dtype}: name a `preprocess`"
            )
        fixed = [(axis, size) for axis, size in enumerate(self._input.shape) if isinstance(size, int)]
        for axis, size in fixed:
            if axis >= inputs.ndim or inputs.shape[axis] != size:
                hint = "export it with a dynamic batch axis" if axis == 0 else "name a `preprocess` that makes it so"
                raise ValueError(
                    f"the graph's input {self._input.name!r} has the shape {self._input.shape}, the batch "
                    f"{list(inputs.shape)}: {hint}"
                )
        try:
            answer = self._session.run([self._output], {self._input.name: inputs.cpu().numpy()})[0]
        except Exception as error:  # onnxruntime's own classes derive from Exception alone
            raise ValueError(f"onnxruntime: {error}") from error
        return torch.from_numpy(np.asarray(answer)).to(inputs.device)


def graph_sha256(path: Path) -> str:
    """SHA-256 of a graph and of the tensors that it keeps in files beside it, named after it (`net.onnx.data`)."""
    beside = sorted(p for p in path.parent.glob(f"{path.name}[._]*") if p.is_file())
    return files_sha256([path, *beside]) if beside else file_sha256(path)


def _session(path: Path, device: torch.device, who: str) -> Any:
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingExtraError(
            f"{who} is an ONNX graph, and onnxruntime, which runs it, is not installed: pip install 'softlabels[onnx]'",
            extra="onnx",
        ) from error
    if not path.is_file():
        raise JobError(f"{who}: there is no ONNX file {path}")
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise JobError(
                f"{who}: this onnxruntime cannot use CUDA: pip install onnxruntime-gpu instead of onnxruntime, or run "
                'the job with `device = "cpu"`'
            )
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # its own classes derive from Exception alone
        raise JobError(f"{who}: {path.name} is no ONNX graph that onnxruntime can run: {error}") from error


def _only_input(session: Any, who: str) -> Any:
    found = session.get_inputs()
    if len(found) != 1:
        names = ", ".join(repr(entry.name) for entry in found)
        raise JobError(f"{who}: a teacher takes one input, its ONNX graph {len(found)} ({names}): fold the others in")
    if found[0].type not in DTYPES:
        raise JobError(f"{who}: its input {found[0].name!r} takes {found[0].type}, which no transfer set gives")
    return found[0]


def _named_output(session: Any, name: str | None, who: str) -> str:
    known = {entry.name: entry.type for entry in session.get_outputs()}
    chosen = next(iter(known)) if name is None else name
    if chosen not in known:
        raise JobError(f"{who}: its ONNX graph has no output {chosen!r}; it has {', '.join(map(repr, known))}")
    if known[chosen] not in ("tensor(float)", "tensor(float16)", "tensor(double)"):
        others = ", ".join(f"{key!r} ({kind})" for key, kind in known.items() if key != chosen) or "none"
        raise JobError(
            f"{who}: output {chosen!r} of its ONNX graph gives {known[chosen]}, not logits: name another as `output` "
            f"in its arguments (others: {others})"
        )
    return chosen
