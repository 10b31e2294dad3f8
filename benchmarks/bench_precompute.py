"""Precompute beside its teachers' forward passes alone: `make bench-precompute`.

Everything is random and made here: pictures of bytes, residual networks, stores in a scratch folder. Contenders take
turns, and every ratio is the median over rounds of neighbours in time. A precompute is counted whole, from the job to
the published manifest, asking the teachers about a first few rows included; forward passes alone are the same batches
of the same inputs, taken from memory. On a machine with a CUDA device the same runs there, in bf16, with heads of
1,000, 14,000 and 128,000 classes, and the device's idle share is told.

    python -m benchmarks.bench_precompute [forward] [ensemble] [views] [memory] [cuda]     # some of it alone
    python -m benchmarks.bench_precompute quick …                                  # fewer pictures, one round

`pipeline.forward` and `ensemble.members` are ratios of wall time. On a machine that does other work too they say
little; `….cpu_s`, ratios of this process's CPU time over the same rounds, then say more.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from torch import nn

from benchmarks.precompute_models import Pictures, Residual
from softlabels.atomic_files import make_folder
from softlabels.precompute import Job, precompute, teacher_from_module
from softlabels.precompute.job import RunTable, StoreTable, TargetsTable, TeacherTable, TransferSetTable, ViewsTable

OUT = Path(__file__).parent / "out"
SCRATCH = OUT / "scratch" / "precompute"
SMALL_ROWS, LARGE_ROWS = 10_000, 10_000_000

QUICK = "quick"


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What some work took: wall time, and the CPU time of this process."""

    wall_s: float
    cpu_s: float


Work = Callable[[], Spent]


@contextmanager
def timed(into: list[Spent]) -> Iterator[None]:
    """Time what runs inside."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    yield
    into.append(Spent(wall_s=time.perf_counter() - wall_s, cpu_s=time.process_time() - cpu_s))


def job(folder: Path, *, encoding: str = "f16", **run: Any) -> Job:
    """A job for teachers and pictures of this process."""
    return Job(
        store=StoreTable(path=str(folder), name="bench"),
        transfer_set=TransferSetTable(source="benchmarks.precompute_models:Pictures"),
        targets=TargetsTable(temperature=4.0, encoding=encoding),
        teachers=(TeacherTable(model="benchmarks.precompute_models:Residual"),),
        run=RunTable(**run),
        base=SCRATCH,
    )


def whole(
    models: list[nn.Module],
    pictures: Pictures,
    *,
    metrics: Path | None = None,
    views: ViewsTable | None = None,
    **run: Any,
) -> Work:
    """A precompute of all pictures with these models, from the job to the manifest."""

    def measured() -> Spent:
        make_folder(SCRATCH)
        folder = Path(tempfile.mkdtemp(dir=SCRATCH)) / "store"
        device = run.get("device", "cpu")
        teachers = [teacher_from_module(model, name=f"t{n}", device=device) for n, model in enumerate(models)]
        spent: list[Spent] = []
        with timed(spent):
            told = replace(job(folder, **run), views=views)
            precompute(told, transfer_set=pictures, teachers=teachers, metrics=metrics)
        shutil.rmtree(folder.parent)
        return spent[0]

    return measured


def forward_alone(model: nn.Module, pictures: Pictures, *, batch_size: int, device: str, half: bool = False) -> Work:
    """Forward passes over the same batches, which lie on the device already."""
    model = model.to(device).eval()
    batch = torch.from_numpy(pictures.take(np.arange(min(batch_size, len(pictures)))).inputs).to(device)
    if half:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        batch = batch.contiguous(memory_format=torch.channels_last)

    def measured() -> Spent:
        spent: list[Spent] = []
        with timed(spent), torch.inference_mode(), torch.autocast(device, dtype=torch.bfloat16, enabled=half):
            for start in range(0, len(pictures), batch_size):
                model(batch[: min(batch_size, len(pictures) - start)])
            if device == "cuda":
                torch.cuda.synchronize()
        return spent[0]

    return measured


def interleaved(contenders: Mapping[str, Work], *, rounds: int) -> dict[str, list[Spent]]:
    """What everybody took, round by round, the order turned about each time."""
    found: dict[str, list[Spent]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(contenders[name]())
    return found


def line(what: str, ours: list[float], peer: list[float], *, against: str, unit: str = "s") -> dict[str, Any]:
    """One line of the table: medians, and the median of the rounds' ratios."""
    return {
        "what": what,
        "ours": round(statistics.median(ours), 3),
        "peer": round(statistics.median(peer), 3),
        "against": against,
        "ratio": round(statistics.median(a / b for a, b in zip(ours, peer, strict=True)), 4),
        "unit": unit,
    }


def lines(what: str, ours: list[Spent], peer: list[Spent], *, against: str) -> list[dict[str, Any]]:
    """Wall time and CPU time."""
    return [
        line(what, [s.wall_s for s in ours], [s.wall_s for s in peer], against=against),
        line(f"{what}.cpu_s", [s.cpu_s for s in ours], [s.cpu_s for s in peer], against=against),
    ]


def bench_forward(quick: bool) -> list[dict[str, Any]]:
    """A ResNet-18 over pictures of 224 × 224, on the CPU."""
    model, pictures, size = Residual(18, 1_000), Pictures(512 if quick else 1_536, 224), 32
    alone = forward_alone(model, pictures, batch_size=size, device="cpu")
    forward_alone(model, Pictures(2 * size, 224), batch_size=size, device="cpu")()  # warms up
    contenders = {"ours": whole([model], pictures, batch_size=size, device="cpu"), "alone": alone}
    times = interleaved(contenders, rounds=1 if quick else 3)
    against = f"forward passes alone: ResNet-18, {len(pictures)} × 224 × 224, 1,000 classes, f32, CPU"
    return lines("pipeline.forward", times["ours"], times["alone"], against=against)


def bench_ensemble(quick: bool) -> list[dict[str, Any]]:
    """Three ResNets in one precompute, beside a precompute of each."""
    models: list[nn.Module] = [Residual(18, 1_000, seed=seed) for seed in range(3)]
    pictures, size = Pictures(128 if quick else 512, 128 if quick else 160), 32
    members = [whole([model], pictures, batch_size=size, device="cpu") for model in models]

    def each() -> Spent:
        spent = [member() for member in members]
        return Spent(wall_s=sum(s.wall_s for s in spent), cpu_s=sum(s.cpu_s for s in spent))

    contenders = {"together": whole(models, pictures, batch_size=size, device="cpu"), "each": each}
    times = interleaved(contenders, rounds=3 if quick else 5)
    against = "the sum of its members, a precompute each: three ResNet-18, CPU"
    return lines("ensemble.members", times["together"], times["each"], against=against)


def bench_views(quick: bool) -> list[dict[str, Any]]:
    """Eight random crops of each picture, beside eight times as many pictures of the crops' size."""
    model, count, size = Residual(18, 1_000), 32 if quick else 64, 32
    crops = ViewsTable(count=8, transform="benchmarks.precompute_models:random_crop", arguments={"size": 128})
    contenders = {
        "views": whole([model], Pictures(count, 144), views=crops, batch_size=size, device="cpu"),
        "passes": whole([model], Pictures(8 * count, 128), batch_size=size, device="cpu"),
    }
    times = interleaved(contenders, rounds=3 if quick else 5)
    against = f"a precompute of {8 * count} pictures of the crops' size: ResNet-18, CPU"
    return lines("views.passes", times["views"], times["passes"], against=against)


def bench_memory(quick: bool) -> list[dict[str, Any]]:
    """Peak memory of 10⁷ rows beside that of 10⁴, each in a process of its own."""
    peaks = {}
    large = LARGE_ROWS // 10 if quick else LARGE_ROWS
    for rows in (SMALL_ROWS, large):
        make_folder(SCRATCH)
        folder = Path(tempfile.mkdtemp(dir=SCRATCH))
        command = [sys.executable, "-m", "benchmarks.precompute_memory", str(rows), str(folder)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[rows], rate = (float(figure) for figure in done.stdout.split())
        print(f"  {rows:,} rows: {peaks[rows]:.1f} MB, {rate:,.0f} rows/s", flush=True)
        shutil.rmtree(folder)
    return [
        line(
            f"memory.{large:.0e}_rows".replace("e+0", "e"),
            [peaks[large]],
            [peaks[SMALL_ROWS]],
            against="10⁴ rows",
            unit="MB",
        )
    ]


def bench_cuda(quick: bool) -> list[dict[str, Any]]:
    """A ResNet-50 in bf16 with heads of three sizes, on a CUDA device; its idle share."""
    if not torch.cuda.is_available():
        print("there is no CUDA device here: the figures of one were not measured", flush=True)
        return []
    found = []
    for classes, samples in ((1_000, 32_768), (14_000, 16_384), (128_000, 8_192)):
        model, pictures, size = Residual(50, classes), Pictures(samples, 224), 256
        metrics = SCRATCH / f"{classes}.jsonl"
        run: dict[str, Any] = {
            "batch_size": size,
            "device": "cuda",
            "precision": "bfloat16",
            "channels_last": True,
            "loaders": 4,
        }
        ours = whole([model], pictures, metrics=metrics, **run)
        alone = forward_alone(model, pictures, batch_size=size, device="cuda", half=True)
        alone()
        times = interleaved({"ours": ours, "alone": alone}, rounds=1 if quick else 5)
        against = (
            f"forward passes alone, ResNet-50 at 224 × 224, {classes:,} classes, bf16, {torch.cuda.get_device_name()}"
        )
        found += lines(f"pipeline.forward.cuda_{classes}", times["ours"], times["alone"], against=against)[:1]
        idle = json.loads(metrics.read_text().splitlines()[-1])["idle_share"]
        found.append({**line(f"pipeline.idle.cuda_{classes}", [idle], [1.0], against="the run's time", unit="share")})
        metrics.unlink()
    return found


PARTS = {
    "forward": bench_forward,
    "ensemble": bench_ensemble,
    "views": bench_views,
    "memory": bench_memory,
    "cuda": bench_cuda,
}


def main(chosen: list[str]) -> None:
    """Run everything, or some of it, print the table, write `benchmarks/out/precompute.json`."""
    torch.set_num_threads(os.cpu_count() or 1)
    path = OUT / "precompute.json"
    quick, chosen = QUICK in chosen, [name for name in chosen if name != QUICK]
    parts = {name: PARTS[name] for name in chosen or PARTS}
    table: dict[str, dict[str, Any]] = {}
    if chosen and path.is_file():
        table = {entry["what"]: entry for entry in json.loads(path.read_text())}
    try:
        for part in parts.values():
            for entry in part(quick):
                table[entry["what"]] = entry
                print(
                    f"{entry['what']:<28}{entry['ours']:>10,.6g}{entry['peer']:>10,.6g} {entry['unit']:<6}"
                    f"ratio {entry['ratio']:<9g}against {entry['against']}",
                    flush=True,
                )
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)
    path.write_text(json.dumps(list(table.values()), indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
