"""A loop with accelerate trains a student from a served store; its checkpoints carry the place in the data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="accelerate is not installed: `pip install softlabels[accelerate]`")

import torch
from accelerate import Accelerator

import softlabels
from softlabels.losses import DistillationLoss
from softlabels_client import SoftTargetDataset, SoftTargetStream, StatefulLoader, data_loader, stream_loader
from softlabels_client.integrations.accelerate import AcceleratedLoader
from softlabels_client.training.step import step_loss

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture
def store(served_store: str) -> Iterator[softlabels.TargetStore]:
    """The tiny store behind its server."""
    with softlabels.open(served_store) as opened:
        yield opened


def loader_of(kind: str, store: Any, inputs: Any) -> StatefulLoader:
    """A loader of the tiny store."""
    if kind == "stream":
        return stream_loader(SoftTargetStream(store, inputs, batch_size=16, seed=4))
    return data_loader(SoftTargetDataset(inputs, store), batch_size=16, seed=4, workers=2)


def train(loader: StatefulLoader, folder: Path, *, steps: int, resume: bool = False) -> tuple[list[Any], Any]:
    """Take this many steps with a checkpoint at the end, and tell what was seen, and the student's weights."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    ready = AcceleratedLoader(loader, accelerator)
    student: Any = torch.nn.Linear(4, 10)
    student, optimizer, prepared = accelerator.prepare(
        student, torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9), ready
    )
    assert prepared is ready
    if resume:
        accelerator.load_state(str(folder))
    seen: list[Any] = []
    synchronised = []
    loss = DistillationLoss(hard_weight=0)
    while len(synchronised) < steps:
        for batch in prepared:
            with accelerator.accumulate(student):
                accelerator.backward(step_loss(student, batch, loss))
                optimizer.step()
                optimizer.zero_grad()
            synchronised.append(accelerator.sync_gradients)
            rows = batch.targets.logits_BC.numpy()
            seen += [(int(sample), row.tobytes()) for sample, row in zip(batch.ids, rows, strict=True)]
            if len(synchronised) == steps:
                break
    accelerator.save_state(str(folder))
    if not resume and steps >= 13:
        # Every fourth step, and the epoch's last.
        assert [at for at, synced in enumerate(synchronised[:13]) if synced] == [3, 7, 11, 12]
    return seen, [parameter.detach().clone() for parameter in student.parameters()]


@pytest.mark.parametrize(("kind", "cut"), [("map", 4), ("map", 13), ("stream", 17)])
def test_a_resumed_training_goes_on_to_the_row(
    store: Any, tiny_inputs: Any, tmp_path: Path, kind: str, cut: int
) -> None:
    """Two epochs of 13 steps, cut in the middle of one and between them, are two whole ones."""
    whole, weights = train(loader_of(kind, store, tiny_inputs), tmp_path / "whole", steps=26)
    before, _ = train(loader_of(kind, store, tiny_inputs), tmp_path / "cut", steps=cut)
    after, resumed = train(loader_of(kind, store, tiny_inputs), tmp_path / "cut", steps=26 - cut, resume=True)
    assert before + after == whole
    assert len({sample for sample, _ in whole[:200]}) == len({sample for sample, _ in whole[200:]}) == 200
    assert all(torch.equal(one, other) for one, other in zip(resumed, weights, strict=True))


def test_it_tells_length_and_epoch(store: Any, tiny_inputs: Any) -> None:
    """As the loader does that it wraps."""
    ready = AcceleratedLoader(loader_of("map", store, tiny_inputs), Accelerator(cpu=True))
    ready.set_epoch(3)
    assert (len(ready), ready.epoch) == (13, 3)
