"""TorchScript and exported programs answer as the model they came from, unless they were saved in training mode."""

from __future__ import annotations

import hashlib
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from softlabels.errors import JobError, TeacherError


def save_script(model: nn.Module, path: Path, *, example: Tensor | None = None) -> None:
    """As users do it, in a PyTorch that warns that it is out of fashion."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.jit.script(model) if example is None else torch.jit.trace(model, example, check_trace=False)
        torch.jit.save(made, str(path))


def save_export(model: nn.Module, path: Path, example: Tensor, *, dynamic: bool = True) -> None:
    """With a batch axis of any length, unless told otherwise."""
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (example,), dynamic_shapes=shapes), path)


class TestTorchScript:
    @pytest.mark.parametrize("traced", [False, True])
    def test_it_answers_as_the_model(self, load, net: nn.Module, batch: Tensor, tmp_path: Path, traced: bool) -> None:
        """Scripted or traced, for any batch length; the manifest has the file's digest."""
        save_script(net, tmp_path / "net.pt", example=batch if traced else None)
        teacher = load("torchscript:net.pt")
        torch.testing.assert_close(teacher.logits(batch[:3]), net(batch[:3]))
        assert teacher.spec.kind == "torchscript"
        assert teacher.spec.weights_sha256 == hashlib.sha256((tmp_path / "net.pt").read_bytes()).hexdigest()

    def test_scripted_in_training_mode_it_is_set_right(
        self, load, net: nn.Module, batch: Tensor, tmp_path: Path
    ) -> None:
        """A scripted module still has its switch."""
        expected = net(batch)
        save_script(net.train(), tmp_path / "net.pt")
        torch.testing.assert_close(load("torchscript:net.pt").logits(batch), expected)

    def test_traced_in_training_mode_it_is_refused(self, load, net: nn.Module, batch: Tensor, tmp_path: Path) -> None:
        """A trace has dropout and batch statistics burnt in."""
        save_script(net.train(), tmp_path / "net.pt", example=batch)
        with pytest.raises(TeacherError, match="training mode"):
            load("torchscript:net.pt")

    def test_dropout_by_hand_is_found(self, load, tmp_path: Path) -> None:
        """Also where it stands in a branch of a script."""

        class Restless(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                if x.shape[0] > 3:
                    x = torch.dropout(x, 0.5, True)
                return x

        save_script(Restless(), tmp_path / "net.pt")
        with pytest.raises(TeacherError, match="dropout"):
            load("torchscript:net.pt")

    def test_another_file(self, load, net: nn.Module, tmp_path: Path) -> None:
        """A checkpoint is no program, and a missing file is none."""
        torch.save(net.state_dict(), tmp_path / "net.pt")  # noqa: TID251  # what users mix up
        with pytest.raises(JobError, match="no TorchScript program"):
            load("torchscript:net.pt")
        with pytest.raises(JobError, match="no program"):
            load("torchscript:gone.pt")


class TestExport:
    def test_it_answers_as_the_model(self, load, net: nn.Module, batch: Tensor, tmp_path: Path) -> None:
        """For any batch length; the manifest has the file's digest."""
        save_export(net, tmp_path / "net.pt2", batch)
        teacher = load("export:net.pt2")
        torch.testing.assert_close(teacher.logits(batch[:3]), net(batch[:3]))
        assert teacher.spec.kind == "export"
        assert teacher.spec.weights_sha256 == hashlib.sha256((tmp_path / "net.pt2").read_bytes()).hexdigest()

    @pytest.mark.parametrize("part", ["drop", "norm"])
    def test_exported_in_training_mode_it_is_refused(
        self, load, net: nn.Module, batch: Tensor, tmp_path: Path, part: str
    ) -> None:
        """Dropout or batch statistics, either is enough."""
        net.get_submodule(part).train()
        save_export(net, tmp_path / "net.pt2", batch)
        with pytest.raises(TeacherError, match="training mode"):
            load("export:net.pt2")

    def test_a_fixed_batch_length(self, load, net: nn.Module, batch: Tensor, tmp_path: Path) -> None:
        """The message says how to export it."""
        save_export(net, tmp_path / "net.pt2", batch, dynamic=False)
        teacher = load("export:net.pt2")
        teacher.logits(batch)
        with pytest.raises(TeacherError, match="dynamic batch axis"):
            teacher.logits(batch[:3])

    def test_pickled_objects_are_refused(self, load, net: nn.Module, batch: Tensor, tmp_path: Path) -> None:
        """An archive with a pickled constant is not even opened."""
        save_export(net, tmp_path / "net.pt2", batch)
        with zipfile.ZipFile(tmp_path / "net.pt2", "a") as archive:
            archive.writestr("net/data/constants/opaque_obj_0", b"cos\nsystem\n.")
        with pytest.raises(JobError, match="opaque_obj_0"):
            load("export:net.pt2")

    def test_weights_that_are_a_pickle_of_something_else(
        self, load, net: nn.Module, batch: Tensor, tmp_path: Path
    ) -> None:
        """PyTorch's own fallback to full pickles is shut."""

        class Bomb:
            def __reduce__(self) -> tuple[object, ...]:
                return (tmp_path / "exploded").touch, ()

        save_export(net, tmp_path / "net.pt2", batch)
        torch.save({"x": Bomb()}, tmp_path / "bomb")  # noqa: TID251  # a hostile file
        with zipfile.ZipFile(tmp_path / "net.pt2") as old, zipfile.ZipFile(tmp_path / "evil.pt2", "w") as new:
            for name in old.namelist():
                bomb = "sample_inputs" in name
                new.writestr(name, (tmp_path / "bomb").read_bytes() if bomb else old.read(name))
        with pytest.raises(JobError, match="no exported program"):
            load("export:evil.pt2")
        assert not (tmp_path / "exploded").exists()

    def test_arguments_and_weights_are_refused(self, load, net: nn.Module, batch: Tensor, tmp_path: Path) -> None:
        """A program takes neither."""
        save_export(net, tmp_path / "net.pt2", batch)
        with pytest.raises(JobError, match="holds its own weights"):
            load("export:net.pt2", weights="net.safetensors")
        with pytest.raises(JobError, match="unknown field"):
            load("export:net.pt2", arguments={"hidden": 3})
