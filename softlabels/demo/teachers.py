"""How does one teacher come to be? Trained from its seed, counted on the test set, kept as safetensors."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from softlabels.demo.nets import Mlp, teacher_mlp
from softlabels.demo.training import Jitter, fit_hard, hard_labels
from softlabels.progress import QUIET, Progress
from softlabels.transfer import ArrayTransferSet
from softlabels_client.training.evaluation import count_errors


@dataclass(frozen=True, kw_only=True)
class TeacherSchedule:
    """How long and how hard a teacher is trained.

    Attributes:
        epochs: passes over the training set.
        batch_size: rows a step.
        learning_rate: peak of the one-cycle schedule.
        max_norm: bound on the L2 norm of each unit's incoming weights.
        jitter_pixels: each image is moved by up to this many pixels along both axes.
        input_dropout, hidden_dropout: share of input features and of hidden units dropped.
    """

    epochs: int
    batch_size: int = 512
    learning_rate: float = 0.4
    max_norm: float | None = None
    jitter_pixels: int = 2
    input_dropout: float = 0.0
    hidden_dropout: float = 0.25


@dataclass(frozen=True, kw_only=True)
class TrainedTeacher:
    """A teacher in eval mode, and what is known of it.

    Attributes:
        model: with its trained weights.
        errors: wrong samples of the test set.
        weights: the safetensors file that holds them.
        seconds: what the training took.
    """

    model: Mlp
    errors: int
    weights: Path
    seconds: float


def train_teacher(
    train: ArrayTransferSet,
    test: ArrayTransferSet,
    *,
    weights: Path,
    schedule: TeacherSchedule,
    seed: int,
    progress: Progress = QUIET,
) -> TrainedTeacher:
    """Train the paper's teacher net on `train`; the same seed gives the same weights on the same machine.

    Args:
        train: images [N, H, W] with labels.
        test: what the errors are counted on; training never sees it.
        weights: safetensors file to write, whole or not at all; its folder is made.
        schedule: how long and how hard.
        seed: of the initial weights, the shuffles, the jitter and the dropout: another seed is another member.
        progress: advanced by each sample that is trained on.
    Raises:
        JobError: a sample has no label.
    """
    started_s = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = teacher_mlp(
            in_features=train.inputs[0].size,
            input_dropout=schedule.input_dropout,
            hidden_dropout=schedule.hidden_dropout,
        )
    fit_hard(
        model,
        train.inputs,
        hard_labels(train),
        epochs=schedule.epochs,
        batch_size=schedule.batch_size,
        learning_rate=schedule.learning_rate,
        seed=seed,
        augment=Jitter(schedule.jitter_pixels) if schedule.jitter_pixels else None,
        max_norm=schedule.max_norm,
        progress=progress,
    )
    model.eval()
    seconds = time.perf_counter() - started_s
    save_weights(model, weights)
    errors = count_errors(model, test)
    return TrainedTeacher(model=model, errors=errors, weights=weights, seconds=seconds)


def save_weights(model: torch.nn.Module, path: Path) -> None:
    """Write the model's weights to a safetensors file that appears only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        whole = Path(folder) / path.name
        save_file(model.state_dict(), whole)
        os.replace(whole, path)
