"""Accuracy of `softlabels plan`: two jobs too large to run, planned from a pilot, beside small runs of them.

    python -m experiments.plans_on_paper             14,000 states × 700 million frames; 128,000 tokens × 10⁹ positions
    python -m experiments.plans_on_paper --quick     a tenth of the rows in the small runs

The teachers are untrained networks of those class counts: what is compared is bytes and time, not learning. A small run
is a whole `precompute` of the job; its bytes and seconds a row, times the rows on paper, stand beside the plan's.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softlabels.cli.jobs import lines, size
from softlabels.precompute import load_job, precompute
from softlabels.precompute.planning.forecast import forecast
from softlabels.transfer_sets.ragged import RaggedTransferSet

FEATURES = 80
_BESIDE = ("ledger", "locks", "staging")
"""Folders of a store that hold no rows."""


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A job on paper.

    Attributes:
        classes, rows: of the whole job.
        sequences, length: of the small run.
        source, model: made below.
        encoding: as the job says.
    """

    classes: int
    rows: int
    sequences: int
    length: int
    source: str
    model: str
    encoding: str


PAPERS = {
    "speech": Paper(
        classes=14_000,
        rows=700_000_000,
        sequences=60,
        length=400,
        source="utterances",
        model="frame_model",
        encoding='{ name = "sampled", row_bytes = 128 }',
    ),
    "language": Paper(
        classes=128_000,
        rows=1_000_000_000,
        sequences=24,
        length=128,
        source="documents",
        model="token_model",
        encoding='{ name = "sampled", row_bytes = 256 }',
    ),
}

JOB = """
[store]
path = "stores/{name}"

[transfer_set]
source = "experiments.plans_on_paper:{source}"
arguments = {{ sequences = {sequences}, length = {length} }}

[sequences]
positions_per_pass = 512

[targets]
temperature = 1.0
encoding = {encoding}

[[teachers]]
model = "experiments.plans_on_paper:{model}"
head = "1"
"""


class Tokens(torch.nn.Module):
    """Token ids, -1 for padding, to hidden states."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(vocabulary, width)
        self.layers = torch.nn.GRU(width, width, batch_first=True)

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """[B, L, D]."""
        out: torch.Tensor = self.layers(self.embed(tokens_BL.clamp(min=0)))[0]
        return out


def utterances(sequences: int, length: int) -> RaggedTransferSet:
    """Frames of features, of lengths around `length`."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(length // 2, length + length // 2, sequences)
    frames = [rng.normal(size=(count, FEATURES)).astype(np.float32) for count in lengths]
    return RaggedTransferSet("utterances", frames)


def documents(sequences: int, length: int) -> RaggedTransferSet:
    """Token ids, all of one length."""
    rng = np.random.default_rng(0)
    return RaggedTransferSet("documents", list(rng.integers(0, 128_000, (sequences, length)).astype(np.int32)))


def frame_model() -> torch.nn.Module:
    """A network a frame with 14,000 states."""
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Linear(FEATURES, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256))
    return _sharpened(torch.nn.Sequential(body, torch.nn.Linear(256, 14_000)))


def token_model() -> torch.nn.Module:
    """A recurrent network over tokens with 128,000 of them."""
    torch.manual_seed(0)
    return _sharpened(torch.nn.Sequential(Tokens(128_000, 256), torch.nn.Linear(256, 128_000)))


def _sharpened(model: torch.nn.Sequential) -> torch.nn.Sequential:
    # Untrained logits are nearly flat; times 40 they have the entropy of a trained model's.
    with torch.no_grad():
        model[1].weight *= 40
    return model


def check(folder: Path, name: str, paper: Paper, *, share: float) -> dict[str, Any]:
    """One job on paper, and a small run of it."""
    path = folder / f"{name}.toml"
    sequences = max(2, round(share * paper.sequences))
    text = JOB.format(
        name=name,
        source=paper.source,
        model=paper.model,
        sequences=sequences,
        length=paper.length,
        encoding=paper.encoding,
    )
    path.write_text(text, encoding="utf-8")
    job = load_job(path)
    found = forecast(job, rows=paper.rows)
    print("\n".join(lines(found, price=None)), flush=True)
    started_s = time.perf_counter()
    manifest = precompute(job)
    spent_s = time.perf_counter() - started_s
    # Planned before and after the run: on a machine that others use too, its speed may change in between.
    before, after = found.own[1], forecast(job, rows=paper.rows).own[1]
    own = replace(before, row_s=(before.row_s + after.row_s) / 2)
    size_bytes = sum(
        file.stat().st_size
        for file in job.store_path.rglob("*")
        if file.is_file() and file.suffix in ("", ".npy") and file.parent.name not in _BESIDE
    )
    small = replace(
        found, samples=manifest.layout.samples, rows=manifest.rows
    )  # the same plan, for the rows of the run
    return {
        "rows_on_paper": paper.rows,
        "bytes_on_paper": found.store_bytes(own),
        "hours_on_paper": found.hours(own),
        "rows_run": manifest.rows,
        "bytes_planned": small.store_bytes(own),
        "bytes_run": size_bytes,
        "bytes_ratio": small.store_bytes(own) / size_bytes,
        "seconds_planned": 3600 * small.hours(own),
        "seconds_planned_before_and_after": [before.row_s * manifest.rows, after.row_s * manifest.rows],
        "seconds_run": spent_s,
        "seconds_ratio": 3600 * small.hours(own) / spent_s,
    }


def main() -> None:
    """Plan, run a part, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows in the small runs")
    parser.add_argument("--out", type=Path, default=Path("runs/plans_on_paper"), help="(%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    figures = {}
    for name, paper in PAPERS.items():
        figures[name] = one = check(options.out, name, paper, share=0.1 if options.quick else 1.0)
        print(
            f"{name}: {size(one['bytes_on_paper'])} and {one['hours_on_paper']:,.0f} h on paper; of "
            f"{one['rows_run']:,} rows {size(one['bytes_planned'])} and {one['seconds_planned']:,.1f} s planned, "
            f"{size(one['bytes_run'])} and {one['seconds_run']:,.1f} s run: ratios {one['bytes_ratio']:.3f} and "
            f"{one['seconds_ratio']:.2f}",
            flush=True,
        )
    (options.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
