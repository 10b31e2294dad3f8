"""Section 3 of the paper on MNIST: teacher, student alone, the same student on the teacher's soft targets.

    python -m experiments.mnist --quick        three seeds, under 15 minutes on 2 cores

Every seed has its own teacher, its own store and its own two students, which start from the same weights and see the
same epochs. The paper (§ 3): 67 errors for the teacher, 146 for the student alone, 74 for it distilled at T = 20.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import softlabels
from softlabels.data.mnist import Mnist, open_mnist
from softlabels.demo.nets import student_mlp
from softlabels.demo.teachers import QUICK, Schedules, has_bfloat16_products, train_teacher
from softlabels.precompute import Job, precompute
from softlabels.precompute.job import StoreTable, TargetsTable, TeacherTable, TransferSetTable
from softlabels.progress import duration, track
from softlabels_client.data.dataset import SoftTargetDataset
from softlabels_client.training.settings import DistillSettings
from softlabels_client.training.step import count_errors
from softlabels_client.training.trainer import distill

TEMPERATURE = 20.0
"""What the paper distils MNIST at (section 3)."""


@dataclass(frozen=True, kw_only=True)
class SeedResult:
    """Errors of 10,000 for one seed, and the seconds each part took."""

    seed: int
    teacher: int
    alone: int
    distilled: int
    seconds: dict[str, float]

    @property
    def gap_closed(self) -> float:
        """Share of the gap between the student alone and the teacher that distillation closes."""
        return (self.alone - self.distilled) / (self.alone - self.teacher)


def run_seed(mnist: Mnist, seed: int, schedules: Schedules, folder: Path) -> SeedResult:
    """One teacher, one store, two students."""
    train, test = mnist.train, mnist.test
    seconds: dict[str, float] = {}
    folder = folder / f"seed-{seed}"
    with track(schedules.teacher.epochs * len(train), f"seed {seed}: teacher", "samples") as progress:
        teacher = train_teacher(
            train,
            test,
            weights=folder / "teacher.safetensors",
            schedule=schedules.teacher,
            seed=1000 + seed,
            progress=progress,
        )
    seconds["teacher"] = teacher.seconds

    started_s = time.perf_counter()
    job = Job(
        store=StoreTable(path="store", name="mnist"),
        transfer_set=TransferSetTable(source="softlabels.data.mnist:load_mnist", arguments={"split": "train"}),
        targets=TargetsTable(temperature=TEMPERATURE, encoding="f16"),
        teachers=(TeacherTable(model="softlabels.demo.nets:teacher_mlp", weights="teacher.safetensors"),),
        base=folder,
    )
    precompute(job, transfer_set=train)
    seconds["precompute"] = time.perf_counter() - started_s

    schedule = schedules.student
    hard = {"learning_rate": schedule.hard_learning_rate, "hard_weight": 1.0, "loss_args": {"soft_weight": 0.0}}
    soft = {"learning_rate": schedule.learning_rate, "hard_weight": schedule.hard_weight}
    errors: dict[str, int] = {}
    with softlabels.open(folder / "store") as store:
        for name, weights in (("alone", hard), ("distilled", soft)):
            torch.manual_seed(seed)
            student = student_mlp()
            settings = DistillSettings(
                epochs=schedule.epochs,
                batch_size=schedule.batch_size,
                precision="bfloat16" if has_bfloat16_products() else "float32",
                seed=seed,
                **weights,
            )
            with track(schedule.epochs * len(train), f"seed {seed}: student {name}", "samples") as progress:
                result = distill(student, SoftTargetDataset(train, store), settings, progress=progress)
            errors[name], seconds[name] = count_errors(student, test), result.seconds
    return SeedResult(
        seed=seed,
        teacher=teacher.errors,
        alone=errors["alone"],
        distilled=errors["distilled"],
        seconds={part: round(spent, 1) for part, spent in seconds.items()},
    )


def table(results: list[SeedResult]) -> list[str]:
    """The figures, a seed a line, and their averages; the gap closed is that of the averages."""
    lines = ["| seed | teacher | student alone | student distilled | gap closed |", "|---|---|---|---|---|"]
    for r in results:
        lines.append(f"| {r.seed} | {r.teacher} | {r.alone} | {r.distilled} | {100 * r.gap_closed:.0f}% |")
    teacher, alone, distilled = averages(results)
    closed = 100 * (alone - distilled) / (alone - teacher)
    lines.append(f"| mean | {teacher:.1f} | {alone:.1f} | {distilled:.1f} | {closed:.0f}% |")
    lines.append("| paper | 67 | 146 | 74 | 91% |")
    return lines


def averages(results: list[SeedResult]) -> tuple[float, float, float]:
    """Mean errors of teacher, student alone and student distilled."""
    return (
        statistics.fmean(r.teacher for r in results),
        statistics.fmean(r.alone for r in results),
        statistics.fmean(r.distilled for r in results),
    )


def main() -> None:
    """Run the seeds, print the table, keep it beside the stores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short schedules (the only ones so far)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/mnist"), help="where everything goes (%(default)s)")
    options = parser.parse_args()
    if not options.quick:
        parser.error("only the quick run exists so far: add --quick")
    started_s = time.monotonic()
    mnist = open_mnist()
    print(f"MNIST from {mnist.source}")
    results = [run_seed(mnist, seed, QUICK, options.out) for seed in range(options.seeds)]
    lines = table(results)
    print("\n" + "\n".join(lines))
    print(f"\nall of it took {duration(time.monotonic() - started_s)}")
    document = {"temperature": TEMPERATURE, "schedules": asdict(QUICK), "seeds": [asdict(r) for r in results]}
    (options.out / "mnist.json").write_text(json.dumps(document, indent=2) + "\n")
    (options.out / "mnist.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
