"""Encodings: bytes per row, error and time on real rows.

    python -m benchmarks.bench_encodings [--quick]

Needs `SOFTLABELS_DATA`, a folder with `logits/*.npy`. A table on the screen; `benchmarks/out/encodings.json` has a row
for each encoding, size and data set. Bases are learnt on rows that nothing is measured on: 800 of 1,000 photographs,
2,634 of 3,334 upsampled images. Truncated rows are captured at each temperature apart, since they can be had at no
other. Times are medians of one thread's
CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from time import thread_time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.encodings_sampling import importance_error, renormalised_error, sampled_error
from benchmarks.encodings_table import HEADING, TIMED_ROWS, Measured, show, verdicts
from softlabels.audit import Audit
from softlabels.encodings import Encoding, TopK, make_encoding, rng_keys, row_bytes
from softlabels.encodings.basis_learning import learn_basis
from softlabels.encodings.sampled import sampled_within

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
OUT = Path(__file__).parent / "out" / "encodings.json"
TEMPERATURES = (1.0, 4.0)
SIZES = (64, 80, 100, 128, 160, 204, 250, 290, 350, 404, 500, 580, 700, 830, 1000, 1050)
SAMPLED_SIZES = (48, 64, 96, 128, 192, 256, 384, 512)
# Heads that fill rows of 1,049, 829 and 579 bytes.
QUANTISED = ((8, 20), (8, 16), (8, 4), (7, 16), (6, 33), (6, 16), (5, 33), (5, 16), (4, 33), (4, 16), (3, 33), (2, 33))
CLASSIFIERS = {
    "lite0_photographs": ("imagenet1k_lite0_photographs.npy", 200),
    "lite2_photographs": ("imagenet1k_lite2_photographs.npy", 200),
    "lite2_upsampled": ("imagenet1k_lite2_upsampled_f16.npy", 700),
}
LANGUAGE = ("language_model", "language_model_49152_f16.npy")

Rows = NDArray[np.float32]


def rows_of(path: Path) -> Rows:
    """Logits with each row's largest at 0."""
    logits_BC: Rows = np.load(path).astype(np.float32)
    logits_BC -= logits_BC.max(axis=1, keepdims=True)
    return logits_BC


def split(rows: Rows, held: int) -> tuple[Rows, Rows]:
    """Rows to learn from and rows to measure on, mixed by a fixed seed."""
    order = np.random.default_rng(0).permutation(len(rows))
    return rows[order[:-held]], rows[order[-held:]]


def median_s(action: Callable[[], object], *, repeats: int) -> float:
    """Median CPU time of an action: a core's own, whoever else shares the machine."""
    times = []
    for _ in range(repeats):
        began = thread_time()
        action()
        times.append(thread_time() - began)
    return float(np.median(times))


def speeds(encoding: Encoding, rows: Rows, *, repeats: int) -> dict[str, float]:
    """Rows a second of encoding and decoding 256 rows, NumPy and torch, one thread."""
    batch = np.resize(rows, (TIMED_ROWS if rows.shape[1] <= 2048 else 16, rows.shape[1]))
    tensor = torch.from_numpy(batch)
    keys = rng_keys("bench", np.arange(len(batch)))
    encoded = encoding.encode(batch, keys_B=keys)
    encoded_torch = encoding.encode_torch(tensor, keys_B=keys)
    actions: dict[str, Callable[[], object]] = {
        "encode_rows_per_s": lambda: encoding.encode(batch, keys_B=keys),
        "decode_rows_per_s": lambda: encoding.decode(encoded),
        "encode_torch_rows_per_s": lambda: encoding.encode_torch(tensor, keys_B=keys),
        "decode_torch_rows_per_s": lambda: encoding.decode_torch(encoded_torch),
    }
    return {name: len(batch) / median_s(action, repeats=repeats) for name, action in actions.items()}


def audited(encoding: Encoding, rows: Rows, temperature: float, decode_at: tuple[float, ...]) -> dict[str, Any]:
    """The audit's summary of rows captured at `temperature`."""
    audit = Audit(decode_at)
    captured = rows / np.float32(temperature)
    for start in range(0, len(rows), 64):
        part = captured[start : start + 64]
        audit.add(part, encoding.decode(encoding.encode(part)), captured=temperature)
    return audit.summary()


def measure(encoding: Encoding, rows: Rows, data: str, *, repeats: int) -> Measured:
    """KL at both temperatures, and speeds."""
    if encoding.retemperable:
        at_one = at_four = audited(encoding, rows, 1.0, TEMPERATURES)
    else:
        at_one, at_four = (audited(encoding, rows, T, (T,)) for T in TEMPERATURES)
    return Measured(
        encoding=encoding.name,
        data=data,
        bytes=row_bytes(encoding),
        params=dict(encoding.params),
        kl_t1=at_one["kl_nats"]["1"]["mean"],
        kl_t4=at_four["kl_nats"]["4"]["mean"],
        kl_t1_p99=at_one["kl_nats"]["1"]["p99"],
        top1_agreement=at_one["top1_agreement"],
        note=f"rank {len(encoding.constants['widths'])}" if encoding.constants else "",
        **speeds(encoding, rows, repeats=repeats),
    )


def classifier(data: str, folder: Path, *, repeats: int) -> Iterator[Measured]:
    """Every encoding and size on one classifier's rows."""
    name, held = CLASSIFIERS[data]
    learnt, rows = split(rows_of(folder / name), held)
    classes = rows.shape[1]
    for dense in ("f32", "f16", "bf16"):
        yield measure(make_encoding(dense, classes=classes), rows, data, repeats=repeats)
    for bits, head in QUANTISED:
        yield measure(make_encoding(f"q{bits}", classes=classes, params={"head": head}), rows, data, repeats=repeats)
    for size in SIZES:
        topk = TopK(classes=classes, k=(size - 4) // 4)
        yield measure(topk, rows, data, repeats=repeats)
        # What is aimed at is known from the rows to learn from: half and a third of what top-k has there.
        goals = {T: audited(topk, learnt, T, (T,))["kl_nats"][f"{T:g}"]["mean"] / (1 + T / 2) for T in TEMPERATURES}
        yield measure(learn_basis(learnt, row_bytes=size, goals=goals), rows, data, repeats=repeats)


def language(folder: Path, *, repeats: int) -> Iterator[Measured]:
    """Dense, quantised and truncated rows, and sampled ones beside their peers, on a language model's."""
    data, name = LANGUAGE
    rows = rows_of(folder / name)
    classes = rows.shape[1]
    p_BC = np.exp(rows.astype(np.float64))
    p_BC /= p_BC.sum(axis=1, keepdims=True)
    for dense in ("f16", "bf16", "q8", "q6", "q4"):
        yield measure(make_encoding(dense, classes=classes), rows, data, repeats=3)
    for size in SAMPLED_SIZES:
        k = (size - 4) // 4
        yield measure(TopK(classes=classes, k=k), rows, data, repeats=3)
        errors = {
            "topk renormalise": renormalised_error(p_BC, size // 4),
            "importance sampling": importance_error(p_BC, size // 4, repeats=repeats),
        }
        for peer, rms_error in errors.items():
            yield Measured(encoding=peer, data=data, bytes=size, params={"entries": size // 4}, rms_error=rms_error)
        # The split between head and draws is chosen on one half of the positions.
        sampled = sampled_within(size, classes=classes, p_BC=p_BC[::2])
        rms_error, z = sampled_error(sampled, rows, p_BC, repeats=repeats)
        yield Measured(
            encoding="sampled",
            data=data,
            bytes=row_bytes(sampled),
            params={"budget": size, **sampled.params},
            rms_error=rms_error,
            note=f"bias z = {z:+.2f}",
            **speeds(sampled, rows, repeats=3),
        )


def main() -> int:
    """Measure everything, print it, write the JSON; 1 when something that must hold does not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats: errors as usual, times rough")
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in ONE_THREAD.items()):
        # Linear algebra libraries read these when they are loaded: start again with them set.
        command = [sys.executable, "-m", "benchmarks.bench_encodings", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **ONE_THREAD})
    root = os.environ.get("SOFTLABELS_DATA")
    folder = Path(root or ".") / "logits"
    if root is None or not folder.is_dir():
        print("bench-encodings needs real logits: set SOFTLABELS_DATA to a folder with logits/*.npy", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    repeats = 5 if options.quick else 41
    measured: list[Measured] = []
    print(HEADING)
    classifiers = (classifier(data, folder, repeats=repeats) for data in CLASSIFIERS)
    for m in chain(*classifiers, language(folder, repeats=repeats)):
        measured.append(m)
        print(show(m), flush=True)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps([asdict(m) for m in measured], indent=1) + "\n")
    holds = True
    for held, text in verdicts(measured):
        holds &= held
        print("holds " if held else "FAILS ", text)
    print(f"written: {OUT.relative_to(Path.cwd()) if OUT.is_relative_to(Path.cwd()) else OUT}")
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
