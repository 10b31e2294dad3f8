"""`softlabels distill`: a student trained from the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from softlabels.cli import main

NETS = """
import numpy as np
import torch
from softlabels.transfer_set import ArrayTransferSet

torch.set_num_threads(1)

def student(*, hidden=8, classes=10):
    return torch.nn.Sequential(torch.nn.Linear(4, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, classes))

def inputs(*, scale=1.0, samples=200):
    rows = np.random.default_rng(7).normal(size=(samples, 4)).astype(np.float32)
    return ArrayTransferSet("noise", np.float32(scale) * rows)

def test_set():
    return ArrayTransferSet("held out", np.zeros((5, 4), np.float32), labels=np.array([0, 1, 2, 3, -1]))

def broken():
    raise KeyError("weights")

def number():
    return 3
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own file, in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    return tmp_path


def arguments(where: str | Path, *more: str) -> list[str]:
    """A short training."""
    given = [
        "distill",
        str(where),
        "--student",
        "nets.py:student",
        "--inputs",
        "nets.py:inputs",
        "--out",
        "s.safetensors",
    ]
    return [*given, "--epochs", "2", "--device", "cpu", *more]


class TestDistillCommand:
    def test_a_student_is_trained_from_a_url(self, served_store: str, nets: Path) -> None:
        """In a process of its own: weights are kept, loss and errors told, progress on stderr."""
        command = [sys.executable, "-m", "softlabels", *arguments(served_store, "--test", "nets.py:test_set")]
        command += ["--student-args", '{"hidden": 5}', "--temperature", "3"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert "temperature 3" in done.stdout
        assert "errors on the 5 samples of 'held out'" in done.stdout
        assert "s.safetensors" in done.stdout
        assert "400 samples" in done.stderr
        assert load_file(nets / "s.safetensors")["0.weight"].shape == (5, 4)

    def test_a_path_and_a_url_train_the_same_student(
        self, served_store: str, tiny_store: Path, nets: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """To the bit, by the seed; another seed gives another student."""
        kept = []
        for where, seed in ((served_store, "4"), (tiny_store, "4"), (tiny_store, "5")):
            assert main(arguments(where, "--seed", seed)) == 0
            kept.append(load_file(nets / "s.safetensors")["0.weight"])
        assert torch.equal(kept[0], kept[1])
        assert not torch.equal(kept[0], kept[2])
        assert "KL to the targets" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("more", "code", "words"),
        [
            (["--student", "nets.py:studnet"], "bad-reference", "studnet"),
            (["--student", "nowhere:student"], "bad-reference", "nowhere"),
            (["--student", "nets.py:broken"], "bad-reference", "KeyError"),
            (["--student", "nets.py:number"], "bad-reference", "no torch module"),
            (["--student-args", '{"width": 3}'], "bad-reference", "width"),
            (["--student-args", "{"], "bad-request", "--student-args"),
            (["--student-args", "[1]"], "bad-request", "JSON object"),
            (["--student-args", '{"classes": 9}'], "shape-mismatch", "9"),
            (["--inputs", "nets.py:number"], "bad-reference", "no transfer set"),
            (["--inputs", "nets.py:NETS"], "bad-reference", "NETS"),
            (["--inputs-args", '{"scale": 2}'], "fingerprint-mismatch", "preprocessing"),
            (["--inputs-args", '{"samples": 201}'], "unknown-id", "200"),
            (["--temperature", "0"], "bad-temperature", "above 0"),
            (["--temperature", "nan"], "bad-temperature", "nan"),
            (["--epochs", "0"], "bad-request", "epochs"),
            (["--learning-rate", "-1"], "bad-request", "learning_rate"),
            (["--loss", "kdd"], "bad-request", "did you mean `kd`"),
            (["--loss-args", '{"gamma": 1}'], "bad-request", "no option 'gamma'"),
            (["--optimizer", "adagrad"], "bad-request", "'adamw'"),
            (["--optimizer", "nets.py:nothing"], "bad-reference", "nothing"),
            (["--schedule", "step"], "bad-request", "step_epochs"),
            (["--patience", "3"], "bad-request", "--test"),
            (["--resume"], "bad-request", "--checkpoint"),
            (["--log", "nowhere/log.csv"], "bad-request", "nowhere"),
            (["--checkpoint", "nowhere/c"], "bad-request", "nowhere"),
            (["--device", "toaster"], "bad-request", "toaster"),
            (["--out", "nowhere/s.safetensors"], "bad-request", "folder"),
        ],
        ids=str,
    )
    def test_what_cannot_be_is_told_in_one_message(
        self, tiny_store: Path, nets: Path, capsys: pytest.CaptureFixture[str], more: list[str], code: str, words: str
    ) -> None:
        """Exit code 1, the error's code, no traceback, no file."""
        assert main(arguments(tiny_store, *more)) == 1
        said = capsys.readouterr().err
        assert f"[{code}]" in said
        assert words in said
        assert "Traceback" not in said
        assert not (nets / "s.safetensors").exists()

    def test_a_training_is_taken_up_again(
        self, tiny_store: Path, nets: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The same command: from the last checkpoint, whose log and record are whole; another one is refused."""
        keeping = ["--checkpoint", "c", "--checkpoint-every", "1", "--log", "log.csv", "--record", "pairs.csv"]
        assert main(arguments(tiny_store, *keeping)) == 0
        first = load_file(nets / "s.safetensors")["0.weight"]
        (nets / "c" / "step-000000000004.safetensors").unlink()
        assert main(arguments(tiny_store, *keeping)) == 1
        assert "[conflict]" in capsys.readouterr().err
        assert main(arguments(tiny_store, *keeping, "--resume")) == 0
        said = capsys.readouterr()
        assert "resumed at step 3 of 4" in said.out
        assert torch.equal(load_file(nets / "s.safetensors")["0.weight"], first)
        assert len((nets / "pairs.csv").read_text().splitlines()) == 1 + 2 * 200
        assert [line.partition(",")[0] for line in (nets / "log.csv").read_text().splitlines()] == ["step", "2", "4"]
        assert main(arguments(tiny_store, *keeping, "--resume", "--learning-rate", "0.2")) == 1
        said = capsys.readouterr()
        assert "[checkpoint-mismatch]" in said.err
        assert "learning_rate is 0.1 there and 0.2 here" in said.err

    def test_every_choice_reaches_the_training(
        self, tiny_store: Path, nets: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Loss, optimiser, schedule, precision, accumulation, early end, TensorBoard."""
        chosen = ["--loss", "dist", "--loss-args", '{"beta": 1.5}', "--optimizer", "torch.optim:NAdam"]
        chosen += ["--optimizer-args", '{"betas": [0.8, 0.9]}', "--schedule", "step", "--step-epochs", "1,3"]
        chosen += ["--step-factor", "0.5", "--warm-up", "0.1", "--precision", "float16", "--accumulate", "2"]
        chosen += ["--test", "nets.py:test_set", "--patience", "2", "--min-delta", "1", "--evaluate-every", "1"]
        chosen += ["--tensorboard", "board", "--log-every", "1", "--epochs", "9", "--learning-rate", "0.001"]
        assert main(arguments(tiny_store, *chosen)) == 0
        said = capsys.readouterr().out
        assert "ended at step 3: the errors had ceased to fall" in said
        assert "errors on the 5 samples of 'held out'" in said
        assert list((nets / "board").iterdir())

    @pytest.mark.parametrize(
        ("where", "code"), [("no-such-store", "unknown-store"), ("http://127.0.0.1:1/tiny", "unreachable")]
    )
    def test_a_store_that_is_not_there(
        self, nets: Path, capsys: pytest.CaptureFixture[str], where: str, code: str
    ) -> None:
        """Neither here nor there."""
        assert main(arguments(where)) == 1
        assert f"[{code}]" in capsys.readouterr().err

    def test_help_explains_every_option(self, capsys: pytest.CaptureFixture[str]) -> None:
        """With its default and an example."""
        assert main(["distill", "--help"]) == 0
        said = capsys.readouterr().out
        assert "For example" in said
        for option in ("--student", "--inputs", "--test", "--temperature", "--hard-weight", "--check", "--out"):
            assert option in said
