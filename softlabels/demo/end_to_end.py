"""The demo: train teachers, precompute, serve, train a student alone and a distilled one, compare.

All but the training of the teachers is done by `softlabels` commands in separate processes, as a user would run them.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

import softlabels
from softlabels.data.digits import load_digits
from softlabels.data.mnist import open_mnist
from softlabels.demo.nets import student_mlp
from softlabels.demo.teachers import (
    DEMO,
    SMALL,
    Schedules,
    TrainedTeacher,
    hard_labels,
    has_bfloat16_products,
    train_teacher,
)
from softlabels.errors import DataUnavailableError, JobError, ServerUnreachableError
from softlabels.extras import needs_extra
from softlabels.progress import track
from softlabels.transfer_set import ArrayTransferSet
from softlabels_client.training.step import count_errors

HIGH_TEMPERATURE = 20.0
"""The paper's temperature for MNIST (section 3)."""

SERVING = "softlabels: serving"
"""Start of the line that `softlabels serve` prints when it is ready; its last word is the address."""

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0

JOB = """\
# What the demo asked `softlabels precompute` to do: a job file to start your own from.
[store]
path = "stores/{name}"
rows_per_shard = 8192

[transfer_set]
source = "{source}"
arguments = {{ split = "train" }}

[targets]
temperature = {temperature:g}
mean = "geometric"        # re-tempers exactly to any T; "arithmetic" is locked to this one
encoding = "f16"
"""

TEACHER = """
[[teachers]]
model = "softlabels.demo.nets:teacher_mlp"
arguments = {{ in_features = {in_features} }}
weights = "teachers/{number}.safetensors"
"""


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """Figures of one run.

    Attributes:
        teacher_errors, ensemble_errors: wrong predictions on the test set, of each teacher and of their geometric mean.
        alone_errors, distilled_errors: of the student trained on hard labels, and on the service's soft targets.
        kl_nats: error of the encoding, by temperature.
        seconds: duration of each part of the demo.
    """

    data: str
    data_source: str
    samples: int
    test_samples: int
    teacher_errors: list[int]
    ensemble_errors: int
    alone_errors: int
    distilled_errors: int
    temperature: float
    encoding: str
    target_bytes_a_sample: int
    store_digest: str
    kl_nats: dict[str, Any]
    seconds: dict[str, float]

    @property
    def gap_closed(self) -> float | None:
        """Fraction of the gap between student alone and ensemble that distillation closes; None without a gap."""
        gap = self.alone_errors - self.ensemble_errors
        return None if gap <= 0 else (self.alone_errors - self.distilled_errors) / gap

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        members = ", ".join(map(str, self.teacher_errors))
        closed = "no gap to close" if self.gap_closed is None else f"{100 * self.gap_closed:.0f}% of the gap closed"
        return [
            f"errors on the {self.test_samples:,} test samples of {self.data}:",
            f"  teachers                     {members}",
            f"  their ensemble               {self.ensemble_errors}",
            f"  student on hard labels       {self.alone_errors}",
            f"  student from the service     {self.distilled_errors}   ({closed})",
            f"the service kept {self.target_bytes_a_sample} bytes of targets a sample; the student never saw a teacher",
        ]

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        document = {**asdict(self), "gap_closed": self.gap_closed}
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class DemoData:
    """The digits that the demo runs on; `loader` is the reference by which every process loads them."""

    train: ArrayTransferSet
    test: ArrayTransferSet
    source: str
    loader: str
    schedules: Schedules


def run_demo(folder: Path, *, small: bool = False) -> DemoReport:
    """Run the demo and leave teachers, job file, store, students, report and picture in `folder`.

    Committed shards of an earlier run are used again. `small` uses scikit-learn's digits even if MNIST is available.

    Raises:
        SoftLabelsError: a part of it failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = load_data(small=small)
    student = data.schedules.student
    seconds: dict[str, float] = {}
    with _timed(seconds, "train the teachers"):
        teachers = _train_teachers(data, folder)
    with _timed(seconds, "precompute"):
        job = folder / "job.toml"
        job.write_text(job_text(data, len(teachers)), encoding="utf-8")
        run_command(["precompute", str(job)])
    with served(folder / "stores") as address:
        url = f"{address}/{data.train.name}"
        with _timed(seconds, "student alone"):
            print("\nthe student on hard labels alone: the same command with the soft term's weight set to 0")
            rate = student.hard_learning_rate
            alone = _train_student(data, url, folder / "student_alone.safetensors", rate, hard=1.0, soft=0.0)
        with _timed(seconds, "student from the service"):
            rate, hard = student.learning_rate, student.hard_weight
            distilled = _train_student(data, url, folder / "student.safetensors", rate, hard=hard, soft=1.0)
    with softlabels.open(folder / "stores" / data.train.name) as store:
        draw(store, data.train, folder / "soft_targets.png", high_temperature=HIGH_TEMPERATURE)
        report = _report(data, store, teachers, alone, distilled, seconds)
    report.write(folder / "report.json")
    return report


def load_data(*, small: bool = False) -> DemoData:
    """Return MNIST if it is available, else scikit-learn's digits, and print which and why."""
    if not small:
        try:
            mnist = open_mnist()
            print(f"MNIST: {len(mnist.train):,} training and {len(mnist.test):,} test digits from {mnist.source}")
            loader = "softlabels.data.mnist:load_mnist"
            return DemoData(train=mnist.train, test=mnist.test, source=mnist.source, loader=loader, schedules=DEMO)
        except DataUnavailableError as error:
            print(f"{error}\n")
    print("running on scikit-learn's bundled digits instead: 1,438 of 8 × 8 pixels. Every step is the same, but the")
    print("set is so small and easy that its figures say little; give SOFTLABELS_DATA a folder with mnist/ in it.")
    train, test = load_digits(split="train"), load_digits(split="test")
    loader = "softlabels.data.digits:load_digits"
    return DemoData(train=train, test=test, source="scikit-learn", loader=loader, schedules=SMALL)


def job_text(data: DemoData, teachers: int) -> str:
    """Return the job file, as a user would write it."""
    head = JOB.format(name=data.train.name, source=data.loader, temperature=HIGH_TEMPERATURE)
    in_features = data.train.inputs[0].size
    return head + "".join(TEACHER.format(in_features=in_features, number=n) for n in range(teachers))


def run_command(arguments: Sequence[str]) -> None:
    """Run `softlabels …` to its end; it prints for itself.

    Raises:
        JobError: it failed.
    """
    print(f"\n$ softlabels {' '.join(arguments)}", flush=True)
    finished = subprocess.run([*_softlabels(), *arguments], check=False)
    if finished.returncode != 0:
        raise JobError(f"`softlabels {arguments[0]}` ended with exit code {finished.returncode}; its message is above")


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve the stores of a folder from a separate process inside the context; yield the address.

    Raises:
        ServerUnreachableError: the server does not start.
    """
    print(f"\n$ softlabels serve {folder} --port 0", flush=True)
    command = [*_softlabels(), "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        # A server that hangs before its first line would block the demo forever: killing it closes the pipe.
        watchdog = threading.Timer(START_TIMEOUT_S, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            address = next((line.split()[-1] for line in process.stdout if line.startswith(SERVING)), None)
            watchdog.cancel()
            if address is None:
                raise ServerUnreachableError("`softlabels serve` ended before it was ready; its message is above")
            print(f"serving at {address}", flush=True)
            yield address
        finally:
            watchdog.cancel()
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=STOP_TIMEOUT_S)
            process.kill()


def _softlabels() -> list[str]:
    # Buffered output would come late and out of order between the demo's lines.
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    return [sys.executable, "-m", "softlabels"]


@contextlib.contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    started_s = time.perf_counter()
    yield
    seconds[part] = round(time.perf_counter() - started_s, 2)


def _train_teachers(data: DemoData, folder: Path) -> list[TrainedTeacher]:
    schedules, trained = data.schedules, []
    for number in range(schedules.teachers):
        weights = folder / "teachers" / f"{number}.safetensors"
        total = schedules.teacher.epochs * len(data.train)
        with track(total, f"teacher {number + 1} of {schedules.teachers}", "samples") as progress:
            teacher = train_teacher(
                data.train, data.test, weights=weights, schedule=schedules.teacher, seed=number, progress=progress
            )
        print(f"teacher {number + 1}: {teacher.errors} errors", flush=True)
        trained.append(teacher)
    return trained


def _train_student(data: DemoData, url: str, out: Path, rate: float, *, hard: float, soft: float) -> int:
    """Train a student by `softlabels distill` and return its errors on the test set."""
    in_features, schedule = data.train.inputs[0].size, data.schedules.student
    run_command(
        [
            "distill", url,
            "--student", "softlabels.demo.nets:student_mlp", "--student-args", f'{{"in_features": {in_features}}}',
            "--inputs", data.loader, "--inputs-args", '{"split": "train"}',
            "--epochs", str(schedule.epochs), "--batch-size", str(schedule.batch_size),
            "--learning-rate", str(rate), "--hard-weight", str(hard), "--loss-args", json.dumps({"soft_weight": soft}),
            "--precision", "bfloat16" if has_bfloat16_products() else "float32", "--out", str(out),
        ]
    )  # fmt: skip
    student = student_mlp(in_features=in_features)
    student.load_state_dict(load_file(out))
    return count_errors(student, data.test)


def _report(
    data: DemoData,
    store: softlabels.TargetStore,
    teachers: list[TrainedTeacher],
    alone: int,
    distilled: int,
    seconds: dict[str, float],
) -> DemoReport:
    with torch.inference_mode():
        images = torch.from_numpy(np.array(data.test.inputs))
        mean_BC = torch.stack([teacher.model(images) for teacher in teachers]).mean(dim=0)
    predicted_B = mean_BC.argmax(dim=1).numpy()
    manifest = store.manifest
    return DemoReport(
        data=data.train.name,
        data_source=data.source,
        samples=len(data.train),
        test_samples=len(data.test),
        teacher_errors=[teacher.errors for teacher in teachers],
        ensemble_errors=int((predicted_B != hard_labels(data.test)).sum()),
        alone_errors=alone,
        distilled_errors=distilled,
        temperature=manifest.temperature.default,
        encoding=manifest.encoding.name,
        target_bytes_a_sample=manifest.target_row_bytes,
        store_digest=store.digest,
        kl_nats=dict((manifest.audit or {}).get("kl_nats", {})),
        seconds=seconds,
    )


def ambiguous_positions(
    store: softlabels.TargetStore, data: ArrayTransferSet, *, among: int = 2_000, count: int = 6
) -> NDArray[np.int64]:
    """Return positions of digits with ambiguous targets: the highest entropy of the first `among`, one per class."""
    p_BC = store.batch(data.ids[:among]).p()
    entropy_B = -(p_BC * np.log(np.maximum(p_BC, 1e-30))).sum(axis=1)
    by_class: dict[int, int] = {}
    for position in np.argsort(-entropy_B).tolist():
        by_class.setdefault(int(p_BC[position].argmax()), position)
    return np.array(list(by_class.values())[:count], dtype=np.int64)


def draw(store: softlabels.TargetStore, data: ArrayTransferSet, path: Path, *, high_temperature: float) -> None:
    """Draw digits beside their soft targets at T = 1 and at a high temperature, as a PNG file.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with needs_extra("demo", "drawing the picture"):
        from matplotlib.figure import Figure
    positions = ambiguous_positions(store, data)
    batch = store.batch(data.ids[positions])
    columns = {"T = 1": batch.p(1.0), f"T = {high_temperature:g}": batch.p(high_temperature)}
    figure = Figure(figsize=(8.5, 1.3 * len(positions)), layout="constrained")
    axes = figure.subplots(len(positions), 3, width_ratios=(1, 3, 3))
    for row, position in enumerate(positions.tolist()):
        image, *bars = axes[row]
        image.imshow(data.inputs[position], cmap="gray_r")
        image.set_axis_off()
        for axis, (title, p_BC) in zip(bars, columns.items(), strict=True):
            axis.bar(range(p_BC.shape[1]), p_BC[row], color="#3b6ea5")
            axis.set_xticks(range(p_BC.shape[1]))
            axis.set_ylim(0, 1.1 * float(p_BC.max()))  # one scale per column: at a high T all bars are near 1/C
            axis.spines[["top", "right"]].set_visible(False)
            if row == 0:
                axis.set_title(title)
    figure.savefig(path, dpi=120)
