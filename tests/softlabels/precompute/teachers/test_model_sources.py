"""Model sources: what the manifest records of a teacher, and networks by name from timm and torchvision."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from softlabels.errors import JobError, MissingExtraError


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
        images = torch.randn(2, 3, 64, 64)
        assert torch.equal(teacher.logits(images), made.eval()(images))
        with pytest.raises(JobError, match="torchvision gives no model"):
            load("torchvision:no_such_network")

    def test_a_network_of_timm(self, load, tmp_path: Path) -> None:
        """By name, with weights that the job brings."""
        timm = pytest.importorskip("timm", reason="timm is not installed")
        made = timm.create_model("mobilenetv3_small_050", num_classes=5)
        save_file(made.state_dict(), tmp_path / "net.safetensors")
        teacher = load("timm:mobilenetv3_small_050", weights="net.safetensors", arguments={"num_classes": 5})
        images = torch.randn(2, 3, 64, 64)
        assert torch.equal(teacher.logits(images), made.eval()(images))
        with pytest.raises(JobError, match="timm gives no model"):
            load("timm:no_such_network")
