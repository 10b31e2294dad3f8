"""Teachers of the demo: training on hard labels with jitter and dropout, and the schedules of teachers and students.

A store of soft targets needs its teachers first, so these are trained without one, by a short loop.

Legend: B rows, C classes, H and W an image's height and width.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from softlabels.demo.nets import Mlp, teacher_mlp
from softlabels.errors import JobError
from softlabels.progress import QUIET, Progress
from softlabels.transfer_set import UNLABELLED, ArrayTransferSet
from softlabels_client.training.checkpoint import save_student
from softlabels_client.training.step import count_errors, one_cycle


@dataclass(frozen=True, kw_only=True)
class TeacherSchedule:
    """How a teacher is trained.

    Attributes:
        epochs: passes over the training set; 0 leaves the initial weights.
        batch_size: samples per step; those left over at the end of an epoch are skipped.
        learning_rate: peak of the one-cycle schedule of SGD with Nesterov momentum 0.9.
        jitter_pixels: largest shift of an image along each axis.
        input_dropout, hidden_dropout: fractions of input features and of hidden units dropped.
    """

    epochs: int
    batch_size: int = 512
    learning_rate: float = 0.4
    jitter_pixels: int = 2
    input_dropout: float = 0.0
    hidden_dropout: float = 0.25


@dataclass(frozen=True, kw_only=True)
class StudentSchedule:
    """How a student is trained, alone and distilled; `hard_weight` is of the labels beside the soft targets.

    The student alone has another rate, `hard_learning_rate`: the soft term of a confident teacher at T = 20 diverges at
    rates that training on hard labels tolerates.
    """

    epochs: int
    batch_size: int = 256
    learning_rate: float = 0.1
    hard_learning_rate: float = 0.2
    hard_weight: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """Number of teachers, and how teachers and students are trained."""

    teachers: int
    teacher: TeacherSchedule
    student: StudentSchedule


# Chosen on held-out training digits, for two cores. On 10,000 of them, trained on the other 50,000, the teacher of
# QUICK makes 90 errors (138 with the paper's dropout and a max-norm, which need many more epochs); the student alone
# 143 and 160 at rate 0.2 (two seeds, 20 epochs), 155 and 175 at 0.1; distilled 106 at rate 0.1. At rates of 0.15 and
# 0.2 the distilled student of some teachers diverges.
DEMO = Schedules(teachers=2, teacher=TeacherSchedule(epochs=10), student=StudentSchedule(epochs=12))
"""MNIST, for the five minutes of the demo."""

QUICK = Schedules(teachers=1, teacher=TeacherSchedule(epochs=30), student=StudentSchedule(epochs=30))
"""MNIST, three seeds in a quarter of an hour."""

SMALL = Schedules(
    teachers=2,
    teacher=TeacherSchedule(epochs=20, batch_size=64, learning_rate=0.1, jitter_pixels=1),
    student=StudentSchedule(epochs=15, batch_size=64, hard_learning_rate=0.1),
)
"""scikit-learn's digits, where an epoch is 1,438 samples."""


@dataclass(frozen=True, kw_only=True)
class TrainedTeacher:
    """A trained teacher in eval mode, its errors on the test set, its safetensors file, and the training's duration."""

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
    """Train the paper's teacher on hard labels; the same seed gives the same weights on the same machine.

    Args:
        train, test: images [N, H, W] with labels, to train on and to count errors on.
        weights: safetensors file to write; its folder is made.
        schedule: how to train.
        seed: seed of the initial weights, the order, the jitter and the dropout; one per ensemble member.
        progress: advanced by the samples of each step.
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
        torch.manual_seed(seed)  # dropout draws from the global generator
        fit(model, train, schedule, seed=seed, progress=progress)
    seconds = time.perf_counter() - started_s
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_student(model.eval(), weights)
    return TrainedTeacher(model=model, errors=count_errors(model, test), weights=weights, seconds=seconds)


def fit(model: nn.Module, train: ArrayTransferSet, schedule: TeacherSchedule, *, seed: int, progress: Progress) -> None:
    """Train `model` in place on hard labels, with the order and the jitter that follow from the seed."""
    inputs_N, labels_N = torch.as_tensor(np.array(train.inputs)), torch.as_tensor(np.array(hard_labels(train)))
    rows = min(schedule.batch_size, len(inputs_N))
    steps_per_epoch = len(inputs_N) // rows
    steps = max(1, schedule.epochs * steps_per_epoch)
    optimizer = torch.optim.SGD(model.parameters(), lr=schedule.learning_rate, momentum=0.9, nesterov=True)
    scheduler = LambdaLR(optimizer, lambda step: one_cycle(step / steps))
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for epoch in range(schedule.epochs):
        order = torch.randperm(len(inputs_N), generator=generator)
        for chosen in order[: steps_per_epoch * rows].split(rows):  # type: ignore[no-untyped-call]
            batch = jitter(inputs_N[chosen], schedule.jitter_pixels, generator)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_bfloat16_products()):
                logits_BC = model(batch)
            loss = nn.functional.cross_entropy(logits_BC.float(), labels_N[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
            progress.advance(rows)
        progress.note(f"epoch {epoch + 1} of {schedule.epochs}")


def hard_labels(transfer_set: ArrayTransferSet) -> NDArray[np.int64]:
    """Return the labels [N] of a set in which every sample has one.

    Raises:
        JobError: a sample has no label.
    """
    labels = transfer_set.labels
    if labels is None or (labels == UNLABELLED).any():
        unlabelled = len(transfer_set) if labels is None else int((labels == UNLABELLED).sum())
        raise JobError(
            f"{unlabelled:,} of {len(transfer_set):,} samples of {transfer_set.name!r} have no hard label, which "
            "training without soft targets needs: leave those samples out"
        )
    return labels


def jitter(inputs_BHW: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Return each image shifted along both axes by random numbers of pixels, up to `pixels`; padded with 0."""
    if not pixels:
        return inputs_BHW
    rows, height, width = inputs_BHW.shape
    padded = nn.functional.pad(inputs_BHW, (pixels, pixels, pixels, pixels))
    windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # a view [B, 2*pixels+1, 2*pixels+1, H, W], no copy
    down, right = torch.randint(0, 2 * pixels + 1, (2, rows), generator=generator)
    return windows[torch.arange(rows), down, right]


def has_bfloat16_products(capabilities: Mapping[str, Any] | None = None) -> bool:
    """Return whether bfloat16 matrix products are faster than float32 on this CPU: with matrix tiles (AMX) alone.

    One step of the student at 256 rows, forward and backward, took 12 ms of CPU time in float32; in bfloat16 5 ms with
    AMX, 19 with AVX-512 BF16 instructions, 49 emulated by AVX-512 and 162 by AVX2 (torch 2.13, one thread).

    Args:
        capabilities: result of `torch.cpu.get_capabilities`; this machine's if None.
    """
    # Older versions of torch lack the function; float32 is right everywhere.
    if capabilities is None and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
    return bool((capabilities or {}).get("amx_bf16"))
