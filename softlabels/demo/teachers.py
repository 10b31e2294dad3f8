"""How does one teacher come to be? Trained from its seed, counted on the test set, kept as safetensors."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from softlabels.demo.nets import Mlp, teacher_mlp
from softlabels.errors import JobError
from softlabels.progress import QUIET, Progress
from softlabels.transfer_set import UNLABELLED, ArrayTransferSet
from softlabels_client.training.optimization import one_cycle
from softlabels_client.training.step import count_errors


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


MOMENTUM = 0.9


class Augment(Protocol):
    """Turns a batch of inputs into a freshly augmented one, by the generator's draws alone."""

    def __call__(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """An augmented batch of the same shape and dtype."""
        ...


def fit_hard(
    model: nn.Module,
    inputs: NDArray[Any],
    labels: NDArray[np.int64],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    augment: Augment | None = None,
    max_norm: float | None = None,
    progress: Progress = QUIET,
) -> None:
    """Train `model` in place on hard labels; the same arguments give the same weights on the same machine.

    Args:
        model: maps a batch of inputs to logits_BC.
        inputs: [N, ...] as the model takes them.
        labels: [N], each in 0 to C - 1.
        epochs: passes over the data; 0 leaves the model as it is.
        batch_size: rows a step; the rows left over at an epoch's end wait for another epoch's shuffle.
        learning_rate: the peak of the one-cycle schedule.
        seed: of the shuffles, the augmentation and the dropout; torch's global generator is left as it was.
        augment: applied to each batch.
        max_norm: bound on the L2 norm of each unit's incoming weights, kept after every step.
        progress: advanced by the rows of each step.
    """
    inputs_N, labels_N = torch.as_tensor(np.array(inputs)), torch.as_tensor(np.array(labels))
    rows = min(batch_size, len(inputs_N))
    steps_an_epoch = len(inputs_N) // rows if rows else 0
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=MOMENTUM, nesterov=True)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    with _seeded(seed):
        for epoch in range(epochs):
            order = torch.randperm(len(inputs_N), generator=generator)
            for step in range(steps_an_epoch):
                chosen = order[step * rows : (step + 1) * rows]
                batch = inputs_N[chosen]
                if augment is not None:
                    batch = augment(batch, generator)
                done_share = (epoch * steps_an_epoch + step) / (epochs * steps_an_epoch)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * one_cycle(done_share)
                with fast_arithmetic():
                    logits_BC = model(batch)
                loss = nn.functional.cross_entropy(logits_BC.float(), labels_N[chosen])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                if max_norm is not None:
                    constrain_incoming_weights(model, max_norm)
                progress.advance(rows)
            progress.note(f"epoch {epoch + 1} of {epochs}")


def hard_labels(transfer_set: ArrayTransferSet) -> NDArray[np.int64]:
    """The labels of a set that has one for each sample.

    Raises:
        JobError: a sample has none.
    """
    labels = transfer_set.labels
    if labels is None or (labels == UNLABELLED).any():
        unlabelled = len(transfer_set) if labels is None else int((labels == UNLABELLED).sum())
        raise JobError(
            f"{unlabelled:,} of {len(transfer_set):,} samples of {transfer_set.name!r} have no hard label: training "
            "without soft targets needs one for each, so leave those samples out"
        )
    return labels


class Jitter:
    """Moves each image by a random whole number of pixels along both axes; what comes in at the rim is 0.

    Args:
        pixels: the largest move either way. The paper's teacher saw up to 2.
    """

    def __init__(self, pixels: int = 2) -> None:
        self.pixels = pixels

    def __call__(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """inputs_BHW moved, each image by a draw of its own; same shape and dtype."""
        rows, height, width = inputs.shape
        rim = self.pixels
        padded = nn.functional.pad(inputs, (rim, rim, rim, rim))
        windows = padded.unfold(1, height, 1).unfold(2, width, 1)  # a view [B, 2*rim+1, 2*rim+1, H, W], no copy
        down, right = torch.randint(0, 2 * rim + 1, (2, rows), generator=generator)
        return windows[torch.arange(rows), down, right]


@torch.no_grad()
def constrain_incoming_weights(model: nn.Module, max_norm: float) -> None:
    """Scale down, in place, each unit's incoming weights whose L2 norm is above `max_norm`."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            norms = module.weight.norm(dim=1, keepdim=True)
            module.weight.mul_((max_norm / norms.clamp_min(1e-12)).clamp_max(1.0))


def fast_arithmetic() -> contextlib.AbstractContextManager[Any]:
    """bfloat16 matrix products where this CPU is faster at them than at float32, else no change."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_bfloat16_products())


def has_bfloat16_products(capabilities: Mapping[str, Any] | None = None) -> bool:
    """Whether bfloat16 is worth its loss of precision on a CPU: with matrix tiles (AMX) alone.

    One step of the student at 256 rows, forward and backward, took 12 ms of CPU time in float32; in bfloat16 5 ms with
    AMX, 19 with AVX-512 BF16 instructions, 49 emulated by AVX-512 and 162 by AVX2 (torch 2.13, one thread).

    Args:
        capabilities: as `torch.cpu.get_capabilities` gives them; those of this machine unless given.
    """
    if capabilities is None:
        # Older torch cannot tell; float32 is right everywhere.
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("amx_bf16"))


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator, which dropout draws from, and give its state back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True, kw_only=True)
class StudentSchedule:
    """How a student is trained, alone and distilled: the same epochs and batches, each at the rate that suits it.

    Attributes:
        learning_rate: of the distilled student. The soft term of a confident teacher at T = 20 diverges at rates that
            hard labels bear.
        hard_learning_rate: of the student alone.
        hard_weight: of the labels beside the soft targets; plays no part for the student alone.
    """

    epochs: int
    batch_size: int = 256
    learning_rate: float = 0.1
    hard_learning_rate: float = 0.2
    hard_weight: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """How many teachers there are, and how long everybody is trained."""

    teachers: int
    teacher: TeacherSchedule
    student: StudentSchedule


DEMO = Schedules(teachers=2, teacher=TeacherSchedule(epochs=10), student=StudentSchedule(epochs=12))
"""MNIST, within the five minutes of the demo."""

QUICK = Schedules(teachers=1, teacher=TeacherSchedule(epochs=30), student=StudentSchedule(epochs=30))
"""MNIST, three seeds in a quarter of an hour. On 10,000 held-out training digits, 50,000 trained on: this teacher makes
90 errors (138 with the dropout of the paper and a max-norm: that needs many more epochs); the student alone 143 and 160
at rate 0.2 (two seeds, 20 epochs), 155 and 175 at 0.1; distilled 106 at rate 0.1. Rates of 0.15 and 0.2 let the
distilled student of some teachers diverge."""

SMALL = Schedules(
    teachers=2,
    teacher=TeacherSchedule(epochs=20, batch_size=64, learning_rate=0.1, jitter_pixels=1),
    student=StudentSchedule(epochs=15, batch_size=64, hard_learning_rate=0.1),
)
"""scikit-learn's digits, where an epoch is 1,438 samples."""
