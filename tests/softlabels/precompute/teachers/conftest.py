"""A small network with dropout and normalisation, one batch for it, and the way from a job's table to a teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softlabels.precompute.job import TeacherTable
from softlabels.precompute.teachers import Teacher, load_teacher

MODULE = """
import torch


class Net(torch.nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.features = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU())
        self.norm = torch.nn.BatchNorm1d(8)
        self.drop = torch.nn.Dropout(0.5)
        self.fc = torch.nn.Linear(8, classes)

    def forward(self, x):
        return self.fc(self.drop(self.norm(self.features(x))))


class Rebel(Net):
    def forward(self, x):
        self.drop.train()
        return super().forward(x)


def halved(x):
    return x / 2
"""

Load = Callable[..., Teacher]


class Net(nn.Module):
    """The network of `nets.py`, in this process."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.drop(self.norm(self.features(x))))
        return out


@pytest.fixture
def net() -> Net:
    """Always the same weights, with normalisation that has seen data."""
    torch.manual_seed(0)
    made = Net()
    with torch.no_grad():
        made(torch.randn(64, 6) * 3 + 1)
    return made.eval()


@pytest.fixture
def batch() -> Tensor:
    """[7, 6] inputs."""
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads the teacher of a table in a folder that has `nets.py`."""
    (tmp_path / "nets.py").write_text(MODULE)

    def teacher(model: str = "nets.py:Net", **table: Any) -> Teacher:
        entry = TeacherTable(model=model, **table)
        return load_teacher(entry, number=0, base=tmp_path, device=torch.device("cpu"))

    return teacher
