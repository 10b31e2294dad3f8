"""What does the demo do? The whole main job on real digits: train, precompute, serve, distil, compare."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import softlabels
from softlabels.data.digits import load_digits
from softlabels.data.mnist import open_mnist
from softlabels.demo.nets import student_mlp
from softlabels.demo.report import DemoReport, draw
from softlabels.demo.teachers import (
    DEMO,
    SMALL,
    Schedules,
    TrainedTeacher,
    fit_hard,
    hard_labels,
    has_bfloat16_products,
    train_teacher,
)
from softlabels.errors import DataUnavailableError, JobError, ServerUnreachableError
from softlabels.progress import track
from softlabels.transfer_set import ArrayTransferSet
from softlabels_client.training.step import count_errors

HIGH_TEMPERATURE = 20.0
"""What the paper distils MNIST at (section 3)."""

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
class DemoData:
    """The digits that the demo runs on; `loader` is the reference by which every process loads the same ones."""

    train: ArrayTransferSet
    test: ArrayTransferSet
    source: str
    loader: str
    schedules: Schedules


@dataclass
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started_s = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started_s, 2)


def run_demo(folder: Path, *, small: bool = False) -> DemoReport:
    """Run the main job and leave everything it made in `folder`.

    Args:
        folder: where teachers, job file, store, students, report and picture go; what an earlier run left there is
            used again where it fits (teachers, committed shards).
        small: use scikit-learn's digits even where MNIST can be had.
    Raises:
        SoftLabelsError: any part of it failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data, clock = load_data(small=small), _Clock()
    with clock.part("train the teachers"):
        teachers = _train_teachers(data, folder)
    with clock.part("precompute"):
        job = folder / "job.toml"
        job.write_text(job_text(data, len(teachers)), encoding="utf-8")
        run_command(["precompute", str(job)])
    with clock.part("student alone"):
        alone = _train_alone(data)
    with clock.part("student from the service"), served(folder / "stores") as address:
        distilled = _distil(data, f"{address}/{data.train.name}", folder)
    with softlabels.open(folder / "stores" / data.train.name) as store:
        draw(store, data.train, folder / "soft_targets.png", high_temperature=HIGH_TEMPERATURE)
        report = _report(data, store, teachers, alone, distilled, clock.seconds)
    report.write(folder / "report.json")
    return report


def load_data(*, small: bool = False) -> DemoData:
    """MNIST where it can be had, else scikit-learn's digits; says plainly which, and why."""
    if not small:
        try:
            mnist = open_mnist()
            print(f"MNIST: {len(mnist.train):,} training and {len(mnist.test):,} test digits from {mnist.source}")
            loader = "softlabels.data.mnist:load_mnist"
            return DemoData(train=mnist.train, test=mnist.test, source=mnist.source, loader=loader, schedules=DEMO)
        except DataUnavailableError as error:
            print(f"{error}\n")
    print("running on scikit-learn's bundled digits instead: 1,438 of 8 × 8 pixels. The whole path is the same, but")
    print("the set is so small and easy that its figures say little; give SOFTLABELS_DATA a folder with mnist/ in it.")
    train, test = load_digits(split="train"), load_digits(split="test")
    loader = "softlabels.data.digits:load_digits"
    return DemoData(train=train, test=test, source="scikit-learn", loader=loader, schedules=SMALL)


def job_text(data: DemoData, teachers: int) -> str:
    """The job file, as a user would write it."""
    head = JOB.format(name=data.train.name, source=data.loader, temperature=HIGH_TEMPERATURE)
    in_features = data.train.inputs[0].size
    return head + "".join(TEACHER.format(in_features=in_features, number=n) for n in range(teachers))


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


def _train_alone(data: DemoData) -> int:
    schedule = data.schedules.student
    torch.manual_seed(0)
    student = student_mlp(in_features=data.train.inputs[0].size)
    print("\nthe student on hard labels alone: the same net, epochs and batches as from the service", flush=True)
    with track(schedule.epochs * len(data.train), "student alone", "samples") as progress:
        fit_hard(
            student,
            data.train.inputs,
            hard_labels(data.train),
            epochs=schedule.epochs,
            batch_size=schedule.batch_size,
            learning_rate=schedule.hard_learning_rate,
            seed=0,
            progress=progress,
        )
    return count_errors(student, data.test)


def _distil(data: DemoData, url: str, folder: Path) -> int:
    schedule = data.schedules.student
    in_features = data.train.inputs[0].size
    out = folder / "student.safetensors"
    run_command(
        [
            "distill", url,
            "--student", "softlabels.demo.nets:student_mlp", "--student-args", f'{{"in_features": {in_features}}}',
            "--inputs", data.loader, "--inputs-args", '{"split": "train"}',
            "--epochs", str(schedule.epochs), "--batch-size", str(schedule.batch_size),
            "--learning-rate", str(schedule.learning_rate), "--hard-weight", str(schedule.hard_weight),
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
    guesses = mean_BC.argmax(dim=1).numpy()
    manifest = store.manifest
    return DemoReport(
        data=data.train.name,
        data_source=data.source,
        samples=len(data.train),
        test_samples=len(data.test),
        teacher_errors=[teacher.errors for teacher in teachers],
        ensemble_errors=int((guesses != hard_labels(data.test)).sum()),
        alone_errors=alone,
        distilled_errors=distilled,
        temperature=manifest.temperature.default,
        encoding=manifest.encoding.name,
        target_bytes_a_sample=manifest.target_row_bytes,
        store_digest=store.digest,
        kl_nats=dict((manifest.audit or {}).get("kl_nats", {})),
        seconds=seconds,
    )


SERVING = "softlabels: serving"
"""How the line begins that `softlabels serve` prints when it answers; its last word is the address."""

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0


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
    """Serve the stores of a folder from a process of its own while the context lasts; yields its address.

    Raises:
        ServerUnreachableError: the server does not come up.
    """
    print(f"\n$ softlabels serve {folder} --port 0", flush=True)
    command = [*_softlabels(), "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        # A server that hangs before its first line would hold the demo for ever: it is ended then, and the pipe closes.
        watchdog = threading.Timer(START_TIMEOUT_S, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            address = next((line.split()[-1] for line in process.stdout if line.startswith(SERVING)), None)
            watchdog.cancel()
            if address is None:
                raise ServerUnreachableError("`softlabels serve` ended before it answered; its message is above")
            print(f"serving at {address}", flush=True)
            yield address
        finally:
            watchdog.cancel()
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=STOP_TIMEOUT_S)
            process.kill()


def _softlabels() -> list[str]:
    # Blocks of output would come late and out of order beside the demo's own lines.
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    return [sys.executable, "-m", "softlabels"]
