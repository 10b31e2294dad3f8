"""Weights come out of every kind of file that users have, and no code comes with them."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from softlabels.cli import main
from softlabels.errors import JobError
from softlabels.precompute.teachers import Teacher

TRAINER_CODE = """
import torch

print("code of the checkpoint runs")


class Settings:
    def __init__(self):
        self.rate = 0.1


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.features = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU())
        self.norm = torch.nn.BatchNorm1d(8)
        self.drop = torch.nn.Dropout(0.5)
        self.fc = torch.nn.Linear(8, 5)
        self.settings = Settings()
        self.activation = torch.nn.functional.relu
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
"""


class TestEveryKindOfFile:
    @pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "ckpt"])
    def test_a_checkpoint_of_weights(self, load, net: nn.Module, batch: Tensor, tmp_path: Path, suffix: str) -> None:
        """What `torch.save(model.state_dict())` wrote gives the model's own logits; the manifest has its digest."""
        path = tmp_path / f"net.{suffix}"
        torch.save(net.state_dict(), path)  # noqa: TID251  # what users have
        teacher: Teacher = load(weights=path.name)
        assert torch.equal(teacher.logits(batch), net(batch))
        assert teacher.spec.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert teacher.spec.weights == path.name
        assert teacher.spec.kind == "python"

    def test_a_checkpoint_from_before_pytorch_1_6(self, load, net: nn.Module, batch: Tensor, tmp_path: Path) -> None:
        """The old file format is read as well."""
        path = tmp_path / "old.pth"
        torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False)  # noqa: TID251  # what users have
        assert torch.equal(load(weights=path.name).logits(batch), net(batch))

    @pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
    def test_weights_inside_a_trainers_checkpoint(
        self, load, net: nn.Module, batch: Tensor, tmp_path: Path, key: str
    ) -> None:
        """They are found under the names that trainers use, and without what DataParallel put before each."""
        state = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
        torch.save({"epoch": 3, key: state}, tmp_path / "last.ckpt")  # noqa: TID251  # what users have
        assert torch.equal(load(weights="last.ckpt").logits(batch), net(batch))

    def test_parts_and_their_index(self, load, net: nn.Module, batch: Tensor, tmp_path: Path) -> None:
        """Safetensors in several files are read through the index, and every part counts in the digest."""
        state = net.state_dict()
        names = sorted(state)
        parts = {"a.safetensors": names[:4], "b.safetensors": names[4:]}
        for file, held in parts.items():
            save_file({name: state[name].clone() for name in held}, tmp_path / file)
        index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
        (tmp_path / "net.safetensors.index.json").write_text(json.dumps(index))
        teacher = load(weights="net.safetensors.index.json")
        assert torch.equal(teacher.logits(batch), net(batch))
        save_file({name: state[name].clone() + 1 for name in parts["b.safetensors"]}, tmp_path / "b.safetensors")
        assert load(weights="net.safetensors.index.json").spec.weights_sha256 != teacher.spec.weights_sha256


class TestRefusals:
    @pytest.mark.parametrize(
        ("index", "words"),
        [
            ({"weight_map": {"fc.weight": "gone.safetensors"}}, "not beside it"),
            ({"weight_map": {"fc.weight": "../a.safetensors"}}, "no file beside it"),
            ({"weights": {}}, "cannot be read"),
            ([], "cannot be read"),
        ],
    )
    def test_an_index_that_lies(self, load, tmp_path: Path, index: object, words: str) -> None:
        """Parts that are missing or lie elsewhere are named."""
        (tmp_path / "net.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(JobError, match=words):
            load(weights="net.safetensors.index.json")

    def test_a_checkpoint_of_something_else(self, load, tmp_path: Path) -> None:
        """What is inside is named."""
        torch.save({"optimizer": {}, "epoch": 3}, tmp_path / "last.pt")  # noqa: TID251  # what users have
        with pytest.raises(JobError, match="no table of weights by name but optimizer, epoch"):
            load(weights="last.pt")

    def test_damaged_bytes(self, load, net: nn.Module, tmp_path: Path) -> None:
        """A cut file ends in a plain error, whatever its kind."""
        torch.save(net.state_dict(), tmp_path / "net.pt")  # noqa: TID251  # what users have
        save_file(net.state_dict(), tmp_path / "net.safetensors")
        for name in ("net.pt", "net.safetensors"):
            whole = (tmp_path / name).read_bytes()
            for keep in (0, 7, len(whole) // 2):
                (tmp_path / name).write_bytes(whole[:keep])
                with pytest.raises(JobError):
                    load(weights=name)

    def test_weights_of_another_model(self, load, tmp_path: Path) -> None:
        """The names that do not fit are in the message."""
        save_file({"fc.weight": torch.zeros(5, 9)}, tmp_path / "other.safetensors")
        with pytest.raises(JobError, match=r"does not fit the model(.|\n)*fc\.bias"):
            load(weights="other.safetensors")


class TestPickledModules:
    @pytest.fixture
    def whole(self, tmp_path: Path, net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A module pickled whole, whose code is no longer anywhere."""
        (tmp_path / "trainer_code.py").write_text(TRAINER_CODE)
        monkeypatch.syspath_prepend(tmp_path)
        import trainer_code  # type: ignore[import-not-found]

        made = trainer_code.Net()
        made.load_state_dict(net.state_dict())
        path = tmp_path / "whole.pt"
        torch.save({"net": made, "epoch": 3}, path)  # noqa: TID251  # what users have
        del sys.modules["trainer_code"]
        (tmp_path / "trainer_code.py").unlink()
        return path

    def test_they_are_refused_with_a_command_that_converts_them(
        self, load, whole: Path, net: nn.Module, batch: Tensor, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The command of the message writes the same weights as safetensors, and imports nothing of the file's code."""
        with pytest.raises(JobError, match="softlabels convert-weights") as caught:
            load(weights=whole.name)
        capsys.readouterr()
        command = str(caught.value).partition("`softlabels ")[2].partition("`")[0].split()
        assert main(command) == 0
        assert "code of the checkpoint runs" not in capsys.readouterr().out
        assert "trainer_code" not in sys.modules
        converted = load_file(whole.with_suffix(".safetensors"))
        assert converted.keys() == net.state_dict().keys()
        assert torch.equal(load(weights="whole.safetensors").logits(batch), net(batch))

    def test_code_in_a_file_never_runs(self, load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Neither reading nor converting a file that would run a command runs it."""

        class Bomb:
            def __reduce__(self) -> tuple[object, ...]:
                return os.system, (f"touch {tmp_path / 'exploded'}",)

        torch.save({"net": Bomb()}, tmp_path / "bomb.pt")  # noqa: TID251  # a hostile file
        with pytest.raises(JobError):
            load(weights="bomb.pt")
        assert main(["convert-weights", str(tmp_path / "bomb.pt"), str(tmp_path / "out.safetensors")]) == 1
        assert "cannot be read without running" in capsys.readouterr().err
        assert not (tmp_path / "exploded").exists()
        assert not (tmp_path / "out.safetensors").exists()

    def test_a_trainers_own_objects_beside_the_weights(self, tmp_path: Path, net: nn.Module) -> None:
        """The weights are converted, the objects are not looked at."""
        state = collections.OrderedDict(net.state_dict())
        torch.save({"state_dict": state, "path": Path("x")}, tmp_path / "last.ckpt")  # noqa: TID251  # what users have
        assert main(["convert-weights", str(tmp_path / "last.ckpt"), str(tmp_path / "net.safetensors")]) == 0
        assert load_file(tmp_path / "net.safetensors").keys() == state.keys()

    def test_nothing_is_written_over(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """An existing destination is left alone."""
        (tmp_path / "net.safetensors").write_text("precious")
        assert main(["convert-weights", str(tmp_path / "x.pt"), str(tmp_path / "net.safetensors")]) == 1
        assert "exists: name another file" in capsys.readouterr().err
        assert (tmp_path / "net.safetensors").read_text() == "precious"
