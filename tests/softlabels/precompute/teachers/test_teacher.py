"""A teacher is frozen and stays so, hands out its last layer on request, and says in the manifest what it is."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from softlabels.errors import JobError, MissingExtraError, TeacherError
from softlabels.precompute.teachers import teacher_from_module


class TestModes:
    def test_a_model_in_training_mode_is_set_right(self, net: nn.Module, batch: Tensor) -> None:
        """Dropout is off and statistics are fixed, whatever mode it came in; no gradient is kept."""
        expected = net(batch).detach()
        teacher = teacher_from_module(net.train(), name="net")
        assert torch.equal(teacher.logits(batch), expected)
        assert not any(parameter.requires_grad for parameter in teacher.model.parameters())

    def test_a_model_that_sets_itself_back_is_refused(self, load) -> None:
        """The part that is in training mode is named."""
        with pytest.raises(TeacherError, match=r"training mode \(drop\)"):
            load("nets.py:Rebel").logits(torch.randn(4, 6))


class TestHiddenStates:
    def test_they_and_the_head_give_the_logits(self, load, net: nn.Module, batch: Tensor, tmp_path: Path) -> None:
        """logits = hidden @ weight.T + bias, and the last layer is not computed for them."""
        save_file(net.state_dict(), tmp_path / "net.safetensors")
        teacher = load(weights="net.safetensors", head="fc")
        hidden = teacher.hidden(batch)
        assert hidden.shape == (7, 8)
        torch.testing.assert_close(teacher.head().logits(hidden), net(batch))
        assert torch.equal(teacher.logits(batch), net(batch))  # nothing of the hook is left behind

    def test_a_head_that_is_none(self, load, batch: Tensor) -> None:
        """Not named, not there, or not linear: each says so."""
        with pytest.raises(TeacherError, match="no last layer is known"):
            load().hidden(batch)
        with pytest.raises(TeacherError, match="has no layer 'classifier'; its own are features, norm, drop, fc"):
            load(head="classifier")
        with pytest.raises(TeacherError, match="it is a BatchNorm1d"):
            load(head="norm").head()


class TestManifest:
    def test_preprocess_code_is_digested(self, load, batch: Tensor, tmp_path: Path) -> None:
        """A reference is kept by name and by the SHA-256 of its source; it runs before the model."""
        teacher = load(preprocess="nets.py:halved")
        assert teacher.spec.preprocess == "nets.py:halved"
        assert teacher.spec.preprocess_sha256 == hashlib.sha256((tmp_path / "nets.py").read_bytes()).hexdigest()
        assert teacher.spec.code_sha256 == teacher.spec.preprocess_sha256
        assert torch.equal(teacher.logits(batch), teacher.model(batch / 2))


class TestZoos:
    @pytest.mark.parametrize("library", ["timm", "torchvision"])
    def test_a_library_that_is_not_here(self, load, library: str) -> None:
        """The message says what to install."""
        if find_spec(library) is not None:
            pytest.skip(f"{library} is installed")
        with pytest.raises(MissingExtraError, match=f"pip install {library}"):
            load(f"{library}:resnet18")

    def test_a_network_of_torchvision(self, load, tmp_path: Path) -> None:
        """By name, with weights that the job brings."""
        models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
        made = models.get_model("squeezenet1_1", num_classes=5)
        save_file(made.state_dict(), tmp_path / "net.safetensors")
        teacher = load("torchvision:squeezenet1_1", weights="net.safetensors", arguments={"num_classes": 5})
        pictures = torch.randn(2, 3, 64, 64)
        assert torch.equal(teacher.logits(pictures), made.eval()(pictures))
        with pytest.raises(JobError, match="torchvision gives no model"):
            load("torchvision:no_such_network")

    def test_a_network_of_timm(self, load, tmp_path: Path) -> None:
        """By name, with weights that the job brings."""
        timm = pytest.importorskip("timm", reason="timm is not installed")
        made = timm.create_model("mobilenetv3_small_050", num_classes=5)
        save_file(made.state_dict(), tmp_path / "net.safetensors")
        teacher = load("timm:mobilenetv3_small_050", weights="net.safetensors", arguments={"num_classes": 5})
        pictures = torch.randn(2, 3, 64, 64)
        assert torch.equal(teacher.logits(pictures), made.eval()(pictures))
        with pytest.raises(JobError, match="timm gives no model"):
            load("timm:no_such_network")
