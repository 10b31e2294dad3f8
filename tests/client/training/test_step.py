"""One step of a student, also where no sample was left for a rank; and what is said where a framework is missing."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from softlabels.errors import EmptyBatchError
from softlabels.losses import DistillationLoss, SoftTargetBatch
from softlabels_client import DistillationBatch
from softlabels_client.training.step import step_loss

BLOCKED = """
import importlib, sys
from softlabels.errors import MissingExtraError

class Block:
    def find_spec(self, name, path=None, target=None):
        if name in ("lightning", "transformers", "accelerate"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
for name in ("lightning", "huggingface", "accelerate"):
    try:
        importlib.import_module(f"softlabels_client.integrations.{name}")
    except MissingExtraError as error:
        print(error)
"""


def batch_of(rows: int) -> DistillationBatch:
    """A batch of random inputs and targets."""
    draw = torch.Generator().manual_seed(0)
    targets = SoftTargetBatch(
        logits_BC=torch.randn(rows, 3, generator=draw), temperature=2.0, captured_temperature=1.0, locked=False
    )
    return DistillationBatch(inputs=torch.randn(rows, 4, generator=draw), targets=targets, ids=np.arange(rows))


class TestStepLoss:
    def test_it_is_the_loss(self) -> None:
        """Of the student's logits and the targets."""
        student, loss, batch = torch.nn.Linear(4, 3), DistillationLoss(), batch_of(5)
        assert step_loss(student, batch, loss).item() == loss(student(batch.inputs), batch.targets).item()

    def test_an_empty_batch_changes_nothing(self) -> None:
        """Its loss is 0 and its gradient zeros, for every weight; batch normalisation has seen nothing either."""
        student = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3))
        step_loss(student, batch_of(5), DistillationLoss()).backward()
        before = {name: value.clone() for name, value in student.state_dict().items()}
        student.zero_grad()
        loss = step_loss(student, batch_of(5).first(0), DistillationLoss())
        loss.backward()
        assert loss.item() == 0.0
        for parameter in student.parameters():
            assert parameter.grad is not None
            assert not parameter.grad.any()
        after = student.state_dict()
        kept = {name for name in before if torch.equal(before[name], after[name])}
        assert {"1.running_mean", "1.running_var"} <= kept
        with pytest.raises(EmptyBatchError):
            DistillationLoss()(torch.zeros(0, 3), batch_of(0).targets)


def test_the_first_rows_of_a_batch() -> None:
    """Inputs, targets, labels and ids alike."""
    batch = batch_of(5).first(2)
    assert (len(batch), batch.inputs.shape, batch.targets.logits_BC.shape) == (2, (2, 4), (2, 3))
    assert batch.ids.tolist() == [0, 1]
    assert batch.targets.labels_B is None


def test_a_missing_framework_is_named_with_its_extra() -> None:
    """By each integration, when it is imported."""
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for line, extra in zip(
        done.stdout.splitlines(), ("[lightning]", "[transformers,accelerate]", "[accelerate]"), strict=True
    ):
        assert f"softlabels{extra}" in line
