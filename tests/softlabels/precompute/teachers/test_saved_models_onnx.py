"""ONNX graphs answer through onnxruntime; what cannot be a teacher is refused by name."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from softlabels.errors import JobError, TeacherError

onnx = pytest.importorskip("onnx", reason="graphs are built with the onnx library")
pytest.importorskip("onnxruntime", reason="graphs are run by onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def save_graph(net: nn.Module, path: Path, *, batch: int | str = "batch", outside: bool = False) -> None:
    """The network of these tests as a graph with logits, their argmax and a batch axis of any length."""
    state = {name: tensor.double().numpy() for name, tensor in net.state_dict().items()}
    scale = state["norm.weight"] / np.sqrt(state["norm.running_var"] + 1e-5)
    numbers = {
        "w1": state["features.0.weight"].T,
        "b1": state["features.0.bias"],
        "scale": scale,
        "shift": state["norm.bias"] - state["norm.running_mean"] * scale,
        "w2": state["fc.weight"].T,
        "b2": state["fc.bias"],
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h1"]),
        helper.make_node("Add", ["h1", "b1"], ["h2"]),
        helper.make_node("Relu", ["h2"], ["h3"]),
        helper.make_node("Mul", ["h3", "scale"], ["h4"]),
        helper.make_node("Add", ["h4", "shift"], ["h5"]),
        helper.make_node("MatMul", ["h5", "w2"], ["h6"]),
        helper.make_node("Add", ["h6", "b2"], ["logits"]),
        helper.make_node("ArgMax", ["logits"], ["best"], axis=1, keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 6])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 5]),
            helper.make_tensor_value_info("best", TensorProto.INT64, [batch]),
        ],
        [numpy_helper.from_array(np.ascontiguousarray(v, np.float32), name) for name, v in numbers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    extra = {"save_as_external_data": True, "location": f"{path.name}.data", "size_threshold": 0} if outside else {}
    onnx.save(model, path, **extra)


class TestOnnx:
    def test_it_answers_as_the_model(self, load, net: nn.Module, batch: Tensor, tmp_path: Path) -> None:
        """The first output is the logits; the manifest has kind, digest and onnxruntime's version."""
        save_graph(net, tmp_path / "net.onnx")
        teacher = load("onnx:net.onnx")
        torch.testing.assert_close(teacher.logits(batch), net(batch), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(teacher.logits(batch[:2]), net(batch[:2]), atol=1e-5, rtol=1e-5)
        assert teacher.spec.kind == "onnx"
        assert teacher.spec.libraries == {"onnxruntime": metadata.version("onnxruntime")}
        assert teacher.spec.weights == "net.onnx"

    def test_numbers_kept_beside_the_graph_count_in_the_digest(self, load, net: nn.Module, tmp_path: Path) -> None:
        """Other weights in the file of external data give another digest."""
        save_graph(net, tmp_path / "net.onnx", outside=True)
        before = load("onnx:net.onnx").spec.weights_sha256
        data = bytearray((tmp_path / "net.onnx.data").read_bytes())
        data[0] ^= 1
        (tmp_path / "net.onnx.data").write_bytes(bytes(data))
        assert load("onnx:net.onnx").spec.weights_sha256 != before

    def test_numbers_in_a_file_of_any_name_count_in_the_state(self, load, net: nn.Module, tmp_path: Path) -> None:
        """The graph names the file; no other file beside it counts."""
        save_graph(net, tmp_path / "net.onnx")
        whole = onnx.load(tmp_path / "net.onnx")
        onnx.save(whole, tmp_path / "net.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
        before = load("onnx:net.onnx").spec.state_sha256
        (tmp_path / "other.bin").write_bytes(b"x")
        assert load("onnx:net.onnx").spec.state_sha256 == before
        data = bytearray((tmp_path / "w.bin").read_bytes())
        data[0] ^= 1
        (tmp_path / "w.bin").write_bytes(bytes(data))
        assert load("onnx:net.onnx").spec.state_sha256 != before

    def test_an_output_by_name(self, load, net: nn.Module, batch: Tensor, tmp_path: Path) -> None:
        """One that is there is taken; one that is not, or that holds no logits, is refused with those there are."""
        save_graph(net, tmp_path / "net.onnx")
        named = load("onnx:net.onnx", arguments={"output": "logits"})
        torch.testing.assert_close(named.logits(batch), net(batch), atol=1e-5, rtol=1e-5)
        with pytest.raises(JobError, match="has no output 'scores'; it has 'logits', 'best'"):
            load("onnx:net.onnx", arguments={"output": "scores"})
        with pytest.raises(JobError, match=r"gives tensor\(int64\), not logits.*'logits' \(tensor\(float\)\)"):
            load("onnx:net.onnx", arguments={"output": "best"})

    def test_several_inputs(self, load, tmp_path: Path) -> None:
        """They are named."""
        entry = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 5]) for name in ("ids", "mask")]
        out = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5])]
        graph = helper.make_graph([helper.make_node("Add", ["ids", "mask"], ["logits"])], "net", entry, out)
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "net.onnx"
        )
        with pytest.raises(JobError, match="one input, its ONNX graph 2 \\('ids', 'mask'\\)"):
            load("onnx:net.onnx")

    def test_inputs_of_another_type_or_shape(self, load, net: nn.Module, batch: Tensor, tmp_path: Path) -> None:
        """The message says what the graph takes."""
        save_graph(net, tmp_path / "net.onnx")
        teacher = load("onnx:net.onnx")
        with pytest.raises(TeacherError, match=r"takes torch\.float32, not torch\.uint8.*preprocess"):
            teacher.logits(batch.to(torch.uint8))
        with pytest.raises(TeacherError, match=r"\['batch', 6\], the batch \[7, 5\]"):
            teacher.logits(batch[:, :5])

    def test_a_fixed_batch_axis(self, load, net: nn.Module, batch: Tensor, tmp_path: Path) -> None:
        """The last batch of a shard is shorter, so the graph must take any."""
        save_graph(net, tmp_path / "net.onnx", batch=1)
        with pytest.raises(TeacherError, match="dynamic batch axis"):
            load("onnx:net.onnx").logits(batch)

    def test_files_that_are_none(self, load, tmp_path: Path) -> None:
        """Missing or damaged, a plain error."""
        with pytest.raises(JobError, match="no ONNX file"):
            load("onnx:gone.onnx")
        (tmp_path / "net.onnx").write_bytes(b"not a graph")
        with pytest.raises(JobError, match="no ONNX graph that onnxruntime can run"):
            load("onnx:net.onnx")
