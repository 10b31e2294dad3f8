"""Overhead of a student fed by the service: epochs over loopback beside epochs from arrays, in turn.

Legend: B rows, C classes.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import softlabels
from softlabels.audit import Audit
from softlabels.demo.nets import student_mlp
from softlabels.encodings import make_encoding
from softlabels.losses import SoftTargetBatch, distillation_loss
from softlabels.manifest import IdSpec, TemperatureSpec, TransferSetSpec
from softlabels.store import StoreWriter, plan_store
from softlabels.transfer_set import ArrayTransferSet, Samples, sample_fingerprints
from softlabels_client import DistillationBatch, DistillSettings, SoftTargetDataset, distill

SAMPLES, CLASSES, TEMPERATURE = 12_800, 10, 4.0
LEAST_STEP_S = 0.005
"""A student's step that the comparison is meant for takes this long, or longer."""

LEARNING_RATE, MOMENTUM = 0.001, 0.9


class SmallConvnet(nn.Module):
    """Two convolutions and two linear layers: LeNet's shape, on uint8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, CLASSES),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """logits_BC of uint8 images [B, 28, 28]."""
        logits_BC: Tensor = self.layers(images.unsqueeze(1).float() / 255)
        return logits_BC


class TimedInputs(ArrayTransferSet):
    """Counts the processor time of taking inputs, which a student with its targets in an array spends as well."""

    taking_s = 0.0

    def take(self, positions: np.ndarray[Any, np.dtype[np.int64]]) -> Samples:
        """As ever, on the clock."""
        started_s = time.thread_time()
        samples = super().take(positions)
        self.taking_s += time.thread_time() - started_s
        return samples


class TimedDataset(SoftTargetDataset):
    """Counts the processor time of fetching: request, checks, decoding, pairing; all but taking the inputs."""

    fetching_s = 0.0

    def __getitems__(self, positions: Sequence[int]) -> DistillationBatch:
        """As ever, on the clock."""
        assert isinstance(self.samples, TimedInputs)
        started_s = time.thread_time() - self.samples.taking_s
        batch = super().__getitems__(positions)
        self.fetching_s += time.thread_time() - self.samples.taking_s - started_s
        return batch


def overhead(rounds: int) -> Iterator[dict[str, Any]]:
    """`student.overhead` and `student.cpu_share` for the MNIST net and a small convnet, torch on one thread."""
    torch.set_num_threads(1)
    images = np.random.default_rng(0).integers(0, 256, (SAMPLES, 28, 28), dtype=np.uint8)
    logits_NC = (3 * np.random.default_rng(1).normal(size=(SAMPLES, CLASSES))).astype(np.float32)
    data = TimedInputs("digits", images, labels=logits_NC.argmax(axis=1))
    with tempfile.TemporaryDirectory(prefix="softlabels-bench-") as folder:
        _write(Path(folder) / "digits", data, logits_NC)
        with _served(Path(folder)) as address, softlabels.open(f"{address}/digits") as store:
            dataset = TimedDataset(data, store, temperature=TEMPERATURE)
            for name, make in (("MNIST net 784-800-800-10", student_mlp), ("small convnet", SmallConvnet)):
                yield from _compared(name, make, dataset, data, logits_NC, rounds)


def _compared(
    name: str,
    make: Callable[[], nn.Module],
    dataset: TimedDataset,
    data: ArrayTransferSet,
    logits_NC: np.ndarray[Any, np.dtype[np.float32]],
    rounds: int,
) -> Iterator[dict[str, Any]]:
    batch_size, step_ms = _batch_size(make(), data, logits_NC)
    fed, plain = make(), make()
    fed_s, plain_s, shares, fetching = [], [], [], []
    for number in range(rounds + 1):
        dataset.fetching_s, cpu_s, started_s = 0.0, time.process_time(), time.perf_counter()
        _from_the_service(fed, dataset, batch_size, seed=number)
        spent_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
        started_s = time.perf_counter()
        from_arrays(plain, data, logits_NC, batch_size, seed=number)
        if number:  # the first warms up, and checks every fingerprint
            fed_s.append(spent_s)
            plain_s.append(time.perf_counter() - started_s)
            fetching.append(dataset.fetching_s)
            shares.append(cpu_s)
    described = f"{name}, {batch_size} rows a step of {step_ms:.1f} ms of CPU time"
    yield _row("student.overhead", fed_s, plain_s, against=f"targets in a local array; {described}", unit="s/epoch")
    yield _row(
        "student.cpu_share", fetching, shares, against=f"the process's CPU time; {described}", unit="CPU s/epoch"
    )


def _from_the_service(student: nn.Module, dataset: SoftTargetDataset, batch_size: int, *, seed: int) -> None:
    settings = DistillSettings(
        epochs=1,
        batch_size=batch_size,
        learning_rate=LEARNING_RATE,
        momentum=MOMENTUM,
        schedule="constant",
        hard_weight=0.5,
        seed=seed,
        device="cpu",
    )
    distill(student, dataset, settings)


def from_arrays(
    student: nn.Module,
    data: ArrayTransferSet,
    logits_NC: np.ndarray[Any, np.dtype[np.float32]],
    batch_size: int,
    *,
    seed: int,
    steps: int | None = None,
) -> None:
    """An epoch, or some steps of it, as one writes it by hand where inputs and targets lie in arrays."""
    images, targets = torch.from_numpy(data.inputs), torch.from_numpy(logits_NC)
    labels = torch.from_numpy(data.labels)
    optimizer = torch.optim.SGD(student.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, nesterov=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    student.train()
    for chosen in order.split(batch_size)[:steps]:
        batch = SoftTargetBatch(
            logits_BC=targets[chosen],
            temperature=TEMPERATURE,
            captured_temperature=1.0,
            locked=False,
            labels_B=labels[chosen],
        )
        loss = distillation_loss(student(images[chosen]), batch, hard_weight=0.5)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()


def _batch_size(
    student: nn.Module, data: ArrayTransferSet, logits_NC: np.ndarray[Any, np.dtype[np.float32]]
) -> tuple[int, float]:
    """The smallest power of two from 64 on whose step is long enough, and how long it is in ms.

    By processor time: on one thread it is what the step takes where nothing else runs.
    """
    for batch_size in (64, 128, 256, 512, 1024):
        from_arrays(student, data, logits_NC, batch_size, seed=0, steps=3)
        began_s = time.process_time()
        from_arrays(student, data, logits_NC, batch_size, seed=0, steps=20)
        spent_s = (time.process_time() - began_s) / 20
        # With a margin: the machine may be faster in the rounds than now.
        if spent_s >= 1.2 * LEAST_STEP_S:
            break
    return batch_size, 1000 * spent_s


def _row(what: str, ours: list[float], peer: list[float], *, against: str, unit: str) -> dict[str, Any]:
    return {
        "what": what,
        "ours": round(statistics.median(ours), 4),
        "peer": round(statistics.median(peer), 4),
        "against": against,
        "ratio": round(statistics.median(a / b for a, b in zip(ours, peer, strict=True)), 4),
        "unit": unit,
    }


def _write(root: Path, data: ArrayTransferSet, logits_NC: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    encoding = make_encoding("f16", classes=CLASSES)
    plan = plan_store(
        name=root.name,
        samples=len(data),
        ids=IdSpec(kind="int", dense_start=0),
        encoding=encoding,
        temperature=TemperatureSpec(default=TEMPERATURE, captured=1.0, locked=False),
        mean="none",
        teachers=(),
        transfer_set=TransferSetSpec(name=data.name, source="benchmarks:noise", arguments={}, labelled=True),
    )
    writer = StoreWriter.create(root, plan)
    for shard in writer.missing_shards():
        with writer.claim(shard) as claim:
            part = slice(claim.rows.start, claim.rows.stop)
            shifted = logits_NC[part] - logits_NC[part].max(axis=1, keepdims=True)
            claim.commit(
                ids=data.ids[part],
                encoded=encoding.encode(shifted),
                fingerprints=sample_fingerprints(data.inputs[part]),
                labels=data.labels[part],
                audit=Audit().to_json(),
            )
    writer.finish()


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "softlabels", "serve", str(folder), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.search(r" at (http://\S+)", line)
        assert found is not None, line
        yield found.group(1)
    finally:
        server.kill()
        server.wait()
