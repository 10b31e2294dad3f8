"""Lightning's own Trainer trains a student from a served store, and a checkpoint in mid-epoch goes on to the row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning", reason="Lightning is not installed: `pip install softlabels[lightning]`")

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import softlabels
from softlabels.errors import ConflictError, ShapeMismatchError, StoreChangedError
from softlabels.losses import DistillationLoss
from softlabels_client import SoftTargetDataset, SoftTargetStream, StatefulLoader, data_loader, stream_loader
from softlabels_client.data.loader import DistillationBatch
from softlabels_client.integrations.lightning import DistillationModule, SoftTargetDataModule

# Lightning warns of what it deprecates in torch, of few workers and of checkpoints that it overwrites.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

Pair = tuple[int, bytes]


class CrashError(Exception):
    """Stands for a crash."""


class Recording(DistillationModule):
    """Notes each row that it learns from, and crashes at a step."""

    def __init__(self, *, crash_at: int | None = None, classes: int = 10) -> None:
        torch.manual_seed(0)
        student = torch.nn.Linear(4, classes)
        super().__init__(student, optimizer=lambda p: torch.optim.SGD(p, lr=0.01), loss=DistillationLoss(hard_weight=0))
        self.seen: list[Pair] = []
        self._crash_at, self._steps = crash_at, 0

    def training_step(self, batch: DistillationBatch, batch_idx: int) -> torch.Tensor:
        if self._steps == self._crash_at:
            raise CrashError
        self._steps += 1
        rows = batch.targets.logits_BC.numpy()
        self.seen += [(int(sample), row.tobytes()) for sample, row in zip(batch.ids, rows, strict=True)]
        return super().training_step(batch, batch_idx)


@pytest.fixture
def store(served_store: str) -> Iterator[softlabels.TargetStore]:
    """The tiny store behind its server."""
    with softlabels.open(served_store) as opened:
        yield opened


def loader_of(kind: str, store: Any, inputs: Any, **changes: Any) -> StatefulLoader:
    """A loader of the tiny store: map-style or a stream, in this process or by workers."""
    name, _, workers = kind.partition(" ")
    known = {"batch_size": 16, "seed": 4, **changes}
    if name == "stream":
        return stream_loader(SoftTargetStream(store, inputs, **known), workers=int(workers))
    return data_loader(SoftTargetDataset(inputs, store), workers=int(workers), **known)


def trainer_in(folder: Path, epochs: int, every: int = 5, **more: Any) -> Trainer:
    """A quiet trainer that keeps a checkpoint every so many steps."""
    keep = ModelCheckpoint(folder, every_n_train_steps=every, save_top_k=-1, filename="{step}")
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[keep],
        default_root_dir=folder,
        **more,
    )


def newest(folder: Path) -> tuple[int, Path]:
    """Steps and path of the last checkpoint."""
    return max((int(path.stem.partition("=")[2]), path) for path in folder.glob("step=*.ckpt"))


# An epoch has 13 steps: cut in mid-epoch, in the second, between two, and at once after an epoch's last step was kept.
QUICK = [("map 2", 7, 5), ("stream 0", 14, 13)]
MORE = [
    (kind, *each)
    for kind in ("map 0", "map 2", "stream 0", "stream 2")
    for each in ((7, 5), (14, 5), (18, 5), (14, 13), (66, 5))
]


@pytest.mark.parametrize(
    ("kind", "crash_at", "every"),
    [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE if each not in QUICK)],
)
def test_a_resumed_training_goes_on_to_the_row(
    store: Any, tiny_inputs: Any, tmp_path: Path, kind: str, crash_at: int, every: int
) -> None:
    """What was seen up to the checkpoint and what comes after it is what an uninterrupted training sees."""
    epochs = 2 if crash_at < 26 else 6
    whole = Recording()
    trainer_in(tmp_path / "whole", epochs, every).fit(
        whole, datamodule=SoftTargetDataModule(loader_of(kind, store, tiny_inputs))
    )
    assert len(whole.seen) == epochs * 200
    for epoch in range(epochs):
        assert len({sample for sample, _ in whole.seen[200 * epoch : 200 * epoch + 200]}) == 200

    crashing = Recording(crash_at=crash_at)
    with pytest.raises(CrashError):
        trainer_in(tmp_path / "cut", epochs, every).fit(
            crashing, datamodule=SoftTargetDataModule(loader_of(kind, store, tiny_inputs))
        )
    steps, checkpoint = newest(tmp_path / "cut")
    taken = 200 * (steps // 13) + 16 * (steps % 13)
    resumed = Recording()
    trainer_in(tmp_path / "rest", epochs, every).fit(
        resumed,
        datamodule=SoftTargetDataModule(loader_of(kind, store, tiny_inputs)),
        ckpt_path=checkpoint,
        weights_only=True,
    )
    assert crashing.seen[:taken] + resumed.seen == whole.seen
    weights = zip(resumed.parameters(), whole.parameters(), strict=True)
    assert all(torch.equal(after, before) for after, before in weights)


def test_resumed_with_another_batch_size(store: Any, tiny_inputs: Any, tmp_path: Path) -> None:
    """Every sample of the epoch is still seen once, and the trainer stops where the epoch does."""
    crashing = Recording(crash_at=7)
    with pytest.raises(CrashError):
        trainer_in(tmp_path, 1).fit(crashing, datamodule=SoftTargetDataModule(loader_of("map 0", store, tiny_inputs)))
    resumed = Recording()
    other = SoftTargetDataModule(loader_of("stream 2", store, tiny_inputs, batch_size=16))
    with pytest.raises(ConflictError):  # a place in the inputs is none in the store
        trainer_in(tmp_path / "other", 1).fit(
            resumed, datamodule=other, ckpt_path=newest(tmp_path)[1], weights_only=True
        )
    same = SoftTargetDataModule(loader_of("map 0", store, tiny_inputs, batch_size=50))
    trainer_in(tmp_path / "rest", 1).fit(resumed, datamodule=same, ckpt_path=newest(tmp_path)[1], weights_only=True)
    assert sorted(sample for sample, _ in crashing.seen[: 5 * 16] + resumed.seen) == list(range(200))


def test_validation_batches_are_passed_on(store: Any, tiny_inputs: Any, tmp_path: Path) -> None:
    """And called for where the module has a validation step."""
    calls = []

    class Validated(Recording):
        def validation_step(self, batch: DistillationBatch, batch_idx: int) -> None:
            calls.append(self(batch.inputs).shape)

    seen_once = loader_of("stream 0", store, tiny_inputs, shuffle=False)
    data = SoftTargetDataModule(loader_of("map 0", store, tiny_inputs), validation=seen_once)
    trainer_in(tmp_path, 1, num_sanity_val_steps=0).fit(Validated(), datamodule=data)
    assert calls == [(16, 10)] * 12 + [(8, 10)]


def test_another_store_version_is_refused(store: Any, tiny_inputs: Any) -> None:
    """A checkpoint's place is one in the version that it was trained with."""
    data = SoftTargetDataModule(loader_of("map 0", store, tiny_inputs))
    state = data.state_dict()
    with pytest.raises(StoreChangedError, match="store version"):
        data.load_state_dict({"place": {**state["place"], "digest": "0" * 64}})


def test_another_number_of_classes_is_refused(store: Any, tiny_inputs: Any, tmp_path: Path) -> None:
    """At the first step, by name."""
    data = SoftTargetDataModule(loader_of("map 0", store, tiny_inputs))
    with pytest.raises(ShapeMismatchError, match="10 classes"):
        trainer_in(tmp_path, 1).fit(Recording(classes=9), datamodule=data)
