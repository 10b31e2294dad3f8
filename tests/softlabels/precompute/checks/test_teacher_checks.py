"""Teachers whose answers depend on more than the sample are refused before anything is computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from softlabels.errors import TeacherError
from softlabels.precompute import precompute, teacher_from_module
from softlabels.precompute.job import job_from_json
from softlabels.transfer_set import ArrayTransferSet


class BatchNormed(nn.Module):
    """Normalises over the batch whatever mode it is in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        """logits_BC."""
        inputs = inputs - inputs.mean(dim=0)
        logits: Tensor = self.layer(inputs) * 3
        return logits


class Scribbler(nn.Module):
    """Scales its inputs in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        """logits_BC."""
        inputs.mul_(2.0).div_(2.0).add_(1.0)
        logits: Tensor = self.layer(inputs - 1.0)
        return logits


def ran(folder: Path, *models: nn.Module) -> None:
    """A run over forty samples by these teachers."""
    torch.set_num_threads(1)
    data = ArrayTransferSet("noise", np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32))
    document = {
        "store": {"path": "store"},
        "transfer_set": {"source": "tests:noise"},
        "targets": {"temperature": 2.0},
        "teachers": [{"model": "tests:net"} for _ in models],
    }
    teachers = [teacher_from_module(model, name=f"t{number}") for number, model in enumerate(models)]
    precompute(job_from_json(document, base=folder), transfer_set=data, teachers=teachers)


class TestSteadiness:
    """A target belongs to its sample alone."""

    def test_normalisation_over_the_batch(self, tmp_path: Path) -> None:
        """Alone, a sample gets another answer than among others."""
        with pytest.raises(TeacherError, match="alone than in a batch"):
            ran(tmp_path, BatchNormed())
        assert not (tmp_path / "store").exists()

    def test_a_teacher_that_writes_into_its_inputs(self, tmp_path: Path) -> None:
        """The next member, and a store that keeps its inputs, would see other ones."""
        with pytest.raises(TeacherError, match="'t0' writes into its inputs"):
            ran(tmp_path, Scribbler(), nn.Linear(6, 4))

    def test_steady_teachers_pass(self, tmp_path: Path) -> None:
        """Evaluation mode is enough for modules that know it."""
        ran(tmp_path, nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)))
