"""What does a precompute cost beside its teachers' forward passes alone? `make bench-precompute`.

Everything is random and made here: pictures of bytes, residual networks, stores in a scratch folder. Contenders take
turns, and every ratio is the median over rounds of neighbours in time. A precompute is counted whole, from the job to
the published manifest, asking the teachers about a first few rows included; forward passes alone are the same batches
of the same inputs, taken from memory. On a machine with a CUDA device the same runs there, in bf16, with heads of
1,000, 14,000 and 128,000 classes, and the device's idle share is told.

    python -m benchmarks.bench_precompute [forward] [ensemble] [memory] [cuda]     # some of it alone
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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.precompute_models import Pictures, Residual
from softlabels.precompute import Job, precompute, teacher_from_module
from softlabels.precompute.job import RunTable, StoreTable, TargetsTable, TeacherTable, TransferSetTable
from softlabels.store.files import make_folder

OUT = Path(__file__).parent / "out"
SCRATCH = OUT / "scratch" / "precompute"
SMALL_ROWS, LARGE_ROWS = 10_000, 10_000_000

Work = Callable[[], float]
"""Does some work once and returns its seconds: less is better."""


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


def whole(models: list[nn.Module], pictures: Pictures, *, metrics: Path | None = None, **run: Any) -> Work:
    """A precompute of all pictures with these models, from the job to the manifest."""

    def measured() -> float:
        make_folder(SCRATCH)
        folder = Path(tempfile.mkdtemp(dir=SCRATCH)) / "store"
        device = run.get("device", "cpu")
        teachers = [teacher_from_module(model, name=f"t{n}", device=device) for n, model in enumerate(models)]
        began_s = time.perf_counter()
        precompute(job(folder, **run), transfer_set=pictures, teachers=teachers, metrics=metrics)
        spent_s = time.perf_counter() - began_s
        shutil.rmtree(folder.parent)
        return spent_s

    return measured


def forward_alone(model: nn.Module, pictures: Pictures, *, batch_size: int, device: str, half: bool = False) -> Work:
    """Forward passes over the same batches, which lie on the device already."""
    model = model.to(device).eval()
    batch = torch.from_numpy(pictures.take(np.arange(min(batch_size, len(pictures)))).inputs).to(device)
    if half:
        model = model.to(memory_format=torch.channels_last)

    def measured() -> float:
        began_s = time.perf_counter()
        with torch.inference_mode(), torch.autocast(device, dtype=torch.bfloat16, enabled=half):
            for start in range(0, len(pictures), batch_size):
                model(batch[: min(batch_size, len(pictures) - start)])
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began_s

    return measured


def interleaved(contenders: Mapping[str, Work], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of everybody, round by round."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, work in contenders.items():
            found[name].append(work())
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


def bench_forward() -> list[dict[str, Any]]:
    """A ResNet-18 over 1,536 pictures of 224 × 224, on the CPU."""
    model, pictures, size = Residual(18, 1_000), Pictures(1_536, 224), 32
    alone = forward_alone(model, pictures, batch_size=size, device="cpu")
    forward_alone(model, Pictures(2 * size, 224), batch_size=size, device="cpu")()  # warms up
    times = interleaved({"ours": whole([model], pictures, batch_size=size, device="cpu"), "alone": alone}, rounds=3)
    against = "forward passes alone, ResNet-18 at 224 × 224, 1,000 classes, f32, CPU"
    return [line("pipeline.forward", times["ours"], times["alone"], against=against)]


def bench_ensemble() -> list[dict[str, Any]]:
    """Three ResNets in one precompute, beside a precompute of each."""
    models: list[nn.Module] = [Residual(18, 1_000, seed=seed) for seed in range(3)]
    pictures, size = Pictures(512, 160), 32
    contenders = {
        f"member {n}": whole([model], pictures, batch_size=size, device="cpu") for n, model in enumerate(models)
    }
    times = interleaved({"ensemble": whole(models, pictures, batch_size=size, device="cpu"), **contenders}, rounds=5)
    members = [sum(each) for each in zip(*(times[name] for name in contenders), strict=True)]
    against = "the sum of its members, a precompute each: three ResNet-18 at 160 × 160, CPU"
    return [line("ensemble.members", times["ensemble"], members, against=against)]


def bench_memory() -> list[dict[str, Any]]:
    """Peak memory of 10⁷ rows beside that of 10⁴, each in a process of its own."""
    peaks = {}
    for rows in (SMALL_ROWS, LARGE_ROWS):
        make_folder(SCRATCH)
        folder = Path(tempfile.mkdtemp(dir=SCRATCH))
        command = [sys.executable, "-m", "benchmarks.precompute_memory", str(rows), str(folder)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[rows], rate = (float(figure) for figure in done.stdout.split())
        print(f"  {rows:,} rows: {peaks[rows]:.1f} MB, {rate:,.0f} rows/s", flush=True)
        shutil.rmtree(folder)
    return [line("memory.1e7_rows", [peaks[LARGE_ROWS]], [peaks[SMALL_ROWS]], against="10⁴ rows", unit="MB")]


def bench_cuda() -> list[dict[str, Any]]:
    """A ResNet-50 in bf16 with heads of three sizes, on a CUDA device; its idle share."""
    if not torch.cuda.is_available():
        print("there is no CUDA device here: the figures of one were not measured", flush=True)
        return []
    found = []
    for classes, samples in ((1_000, 32_768), (14_000, 16_384), (128_000, 8_192)):
        model, pictures, size = Residual(50, classes), Pictures(samples, 224), 256
        metrics = SCRATCH / f"{classes}.jsonl"
        run = {"batch_size": size, "device": "cuda", "precision": "bfloat16", "channels_last": True, "loaders": 4}
        ours = whole([model], pictures, metrics=metrics, **run)
        alone = forward_alone(model, pictures, batch_size=size, device="cuda", half=True)
        alone()
        times = interleaved({"ours": ours, "alone": alone}, rounds=5)
        against = (
            f"forward passes alone, ResNet-50 at 224 × 224, {classes:,} classes, bf16, {torch.cuda.get_device_name()}"
        )
        found.append(line(f"pipeline.forward.cuda_{classes}", times["ours"], times["alone"], against=against))
        idle = json.loads(metrics.read_text().splitlines()[-1])["idle_share"]
        found.append({**line(f"pipeline.idle.cuda_{classes}", [idle], [1.0], against="the run's time", unit="share")})
        metrics.unlink()
    return found


PARTS = {"forward": bench_forward, "ensemble": bench_ensemble, "memory": bench_memory, "cuda": bench_cuda}


def main(chosen: list[str]) -> None:
    """Run everything, or some of it, print the table, write `benchmarks/out/precompute.json`."""
    torch.set_num_threads(os.cpu_count() or 1)
    path = OUT / "precompute.json"
    parts = {name: PARTS[name] for name in chosen or PARTS}
    table: dict[str, dict[str, Any]] = {}
    if chosen and path.is_file():
        table = {entry["what"]: entry for entry in json.loads(path.read_text())}
    try:
        for part in parts.values():
            for entry in part():
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
