"""`softlabels distill` killed at any moment and started again: the same student, no pair lost or doubled."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import softlabels
from softlabels.transfer_set import ArrayTransferSet
from softlabels_client.training.training_log import target_digest

SAMPLES, EPOCHS = 500, 4

NETS = """
import numpy as np
import torch
from softlabels.transfer_set import ArrayTransferSet

torch.set_num_threads(1)

def student():
    return torch.nn.Sequential(
        torch.nn.Linear(6, 24), torch.nn.BatchNorm1d(24), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(24, 5)
    )

def inputs():
    return ArrayTransferSet("noise", np.random.default_rng(7).normal(size=(500, 6)).astype(np.float32))
"""


@dataclass(frozen=True)
class Lesson:
    """A served store, the folder to train in, and what came of the training that nobody killed."""

    folder: Path
    url: str
    student: dict[str, Tensor]
    pairs: str

    def command(self, name: str, workers: int) -> list[str]:
        """The one command that begins the training and takes it up again."""
        options = {
            "--student": "nets.py:student",
            "--inputs": "nets.py:inputs",
            "--epochs": str(EPOCHS),
            "--batch-size": "10",
            "--device": "cpu",
            "--checkpoint": name,
            "--checkpoint-every": "3",
            "--record": f"{name}.csv",
            "--out": f"{name}.safetensors",
            "--workers": str(workers),
        }
        given = [word for pair in options.items() for word in pair]
        return [sys.executable, "-m", "softlabels", "distill", self.url, *given, "--resume"]


def start(lesson: Lesson, name: str, workers: int = 0) -> subprocess.Popen[bytes]:
    """A trainer in a process group of its own, with the workers it starts."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (lesson.folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            lesson.command(name, workers),
            cwd=lesson.folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def finish(lesson: Lesson, name: str) -> None:
    """Let it come to its end."""
    assert start(lesson, name).wait(timeout=120) == 0, (lesson.folder / f"{name}.log").read_text()


@pytest.fixture
def lesson(tmp_path: Path, make_store: Any, serve: Any) -> Lesson:
    """500 samples, 50 steps an epoch, 4 epochs; trained once without a break."""
    inputs = np.random.default_rng(7).normal(size=(SAMPLES, 6)).astype(np.float32)
    logits_BC = np.random.default_rng(8).normal(size=(SAMPLES, 5)).astype(np.float32)
    make_store(tmp_path / "noise", ArrayTransferSet("noise", inputs), logits_BC)
    (tmp_path / "nets.py").write_text(NETS)
    begun = Lesson(tmp_path, f"{serve(tmp_path / 'noise')}/noise", {}, "")
    finish(begun, "whole")
    student, pairs = load_file(tmp_path / "whole.safetensors"), (tmp_path / "whole.csv").read_text()
    return Lesson(begun.folder, begun.url, student, pairs)


def kill_at_random_moments(lesson: Lesson, name: str, kills: int, *, workers: tuple[int, ...], seed: int) -> int:
    """Kill a trainer again and again, start it again each time under the next number of workers, and let it finish.

    Returns:
        How many kills hit a training that was underway.
    """
    draws = random.Random(seed)
    record = lesson.folder / f"{name}.csv"
    underway = 0
    for number in range(kills):
        trainer = start(lesson, name, workers[number % len(workers)])
        # It may come a step further each time, so that fifty kills fit into one training.
        rows = record.read_text().count("\n") if record.exists() else 0
        goal = min(rows + draws.randint(1, 2 * SAMPLES * EPOCHS // max(kills, 4)), SAMPLES * EPOCHS - 20)
        give_up = time.monotonic() + 60
        while time.monotonic() < give_up and trainer.poll() is None:
            if record.exists() and record.read_text().count("\n") >= goal:
                break
            time.sleep(0.002)
        time.sleep(draws.uniform(0, 0.01))
        underway += trainer.poll() is None
        os.killpg(trainer.pid, signal.SIGKILL)
        trainer.wait(timeout=20)
    finish(lesson, name)
    return underway


def assert_nothing_lost(lesson: Lesson, name: str) -> None:
    """The same student to the bit; every sample of every epoch once, with its own target."""
    student = load_file(lesson.folder / f"{name}.safetensors")
    assert sorted(student) == sorted(lesson.student)
    assert all(torch.equal(weights, lesson.student[key]) for key, weights in student.items())
    text = (lesson.folder / f"{name}.csv").read_text()
    assert text == lesson.pairs
    with softlabels.open(lesson.folder / "noise") as store:
        rows = store.batch(range(SAMPLES)).logits()
    own = {str(key): target_digest(rows[key].tobytes()) for key in range(SAMPLES)}
    seen = Counter((row["epoch"], row["id"], row["target"]) for row in csv.DictReader(text.splitlines()))
    assert seen == Counter((str(epoch), *pair) for epoch in range(1, EPOCHS + 1) for pair in own.items())


class TestKilledTrainers:
    def test_killed_three_times(self, lesson: Lesson) -> None:
        """Each start is the same command; each goes on under another number of workers."""
        assert kill_at_random_moments(lesson, "killed", 3, workers=(0, 1, 0), seed=1) >= 2
        assert_nothing_lost(lesson, "killed")

    @pytest.mark.slow
    def test_killed_fifty_times(self, lesson: Lesson) -> None:
        """At fifty random moments, under 0, 1 and 4 workers in turn."""
        assert kill_at_random_moments(lesson, "killed", 50, workers=(0, 1, 0, 4), seed=2) >= 40
        assert_nothing_lost(lesson, "killed")
