"""One rank of a training by a framework, under `torchrun`; it notes every sample and target that it learns from."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from taking import digest_of, loader_of
from torch import nn

from softlabels_client import DistillationBatch, SoftTargetDataset
from softlabels_client.training.step import step_loss

EPOCHS, BATCH_SIZE = 2, 16


class Student(nn.Module):
    """A linear student."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs)


class Notes:
    """The pairs seen, epoch by epoch; a loss that notes them would not see ids, so each framework's step does."""

    def __init__(self, folder: str) -> None:
        self._path = Path(folder) / f"pairs-000-{os.environ['RANK']}.log"
        self._lines: list[list[Any]] = []

    def add(self, epoch: int, batch: DistillationBatch) -> None:
        """A batch of an epoch."""
        rows = batch.targets.logits_BC.numpy()
        self._lines.append([epoch, 0, [[int(i), digest_of(row)] for i, row in zip(batch.ids, rows, strict=True)]])

    def write(self) -> None:
        """All of them, as `taking` writes them."""
        self._path.write_text("".join(json.dumps(line) + "\n" for line in [[0, 0], *self._lines]))


def by_lightning(url: str, notes: Notes, folder: str) -> None:
    """Lightning's Trainer with its distributed strategy, which replaces samplers where it finds any."""
    from lightning.pytorch import Trainer

    from softlabels_client.integrations.lightning import DistillationModule, SoftTargetDataModule

    class Noting(DistillationModule):
        def training_step(self, batch: DistillationBatch, batch_idx: int) -> torch.Tensor:
            notes.add(self.current_epoch, batch)
            return super().training_step(batch, batch_idx)

    loader = loader_of(url, kind="stream", batch_size=BATCH_SIZE, workers=1, method="fork")
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    ranks = int(os.environ["WORLD_SIZE"])
    trainer = Trainer(max_epochs=EPOCHS, accelerator="cpu", devices=ranks, strategy="ddp", **quiet)  # type: ignore[arg-type]
    module = Noting(Student(), optimizer=lambda weights: torch.optim.SGD(weights, lr=0.01))
    trainer.fit(module, datamodule=SoftTargetDataModule(loader))


def by_accelerate(url: str, notes: Notes, folder: str) -> None:
    """A loop with accelerate, in which everything goes through `prepare`."""
    from accelerate import Accelerator

    from softlabels.losses import DistillationLoss
    from softlabels_client.integrations.accelerate import AcceleratedLoader

    accelerator = Accelerator(cpu=True)
    loader = AcceleratedLoader(loader_of(url, kind="map", batch_size=BATCH_SIZE, workers=0, method=None), accelerator)
    student = Student()
    student, optimizer, loader = accelerator.prepare(student, torch.optim.SGD(student.parameters(), lr=0.01), loader)
    for epoch in range(EPOCHS):
        for batch in loader:
            notes.add(epoch, batch)
            accelerator.backward(step_loss(student, batch, DistillationLoss()))
            optimizer.step()
            optimizer.zero_grad()


def by_huggingface(url: str, notes: Notes, folder: str) -> None:
    """Hugging Face's Trainer, which has accelerate share out what it is given."""
    from transformers import TrainingArguments

    from softlabels_client.integrations.huggingface import BATCH, DistillationTrainer

    class Noting(DistillationTrainer):
        def compute_loss(self, model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> Any:
            notes.add(int(self.state.epoch or 0), inputs[BATCH])
            return super().compute_loss(model, inputs, *more, **named)

    dataset = loader_of(url, kind="map", batch_size=BATCH_SIZE, workers=0, method=None).dataset
    assert isinstance(dataset, SoftTargetDataset)
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=BATCH_SIZE,
        num_train_epochs=EPOCHS,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    Noting(Student(), arguments, train_dataset=dataset).train()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    url, folder, framework = sys.argv[1:]
    noted = Notes(folder)
    {"lightning": by_lightning, "accelerate": by_accelerate, "huggingface": by_huggingface}[framework](
        url, noted, folder
    )
    noted.write()
