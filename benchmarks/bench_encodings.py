"""What does each encoding cost in bytes, in error and in time, on real rows?

    python -m benchmarks.bench_encodings [--quick]

Needs `SOFTLABELS_DATA`, a folder with `logits/*.npy`. A table on the screen; `benchmarks/out/encodings.json` has a row
for each encoding, size and data set. Bases are learnt on rows that nothing is measured on: 800 of 1,000 photographs,
2,634 of 3,334 upsampled images. Truncated rows are captured at each temperature apart, since they can be had at no
other. Times are medians of one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

for _library in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_library, "1")

import numpy as np
import torch
from numpy.typing import NDArray

from softlabels.audit import Audit
from softlabels.encodings import Encoding, TopK, draw_keys, make_encoding, row_bytes
from softlabels.encodings.learning import learn_basis
from softlabels.encodings.sampled import sampled_within

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
TIMED_ROWS = 256

Rows = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row of the result."""

    encoding: str
    data: str
    bytes: int
    params: dict[str, Any]
    kl_t1: float | None = None
    kl_t4: float | None = None
    kl_t1_p99: float | None = None
    top1_agreement: float | None = None
    rms_error: float | None = None
    encode_rows_per_s: float = 0.0
    decode_rows_per_s: float = 0.0
    encode_torch_rows_per_s: float = 0.0
    decode_torch_rows_per_s: float = 0.0
    note: str = ""


def rows_of(path: Path) -> Rows:
    """Logits with each row's largest at 0."""
    logits_BC = np.load(path).astype(np.float32)
    return logits_BC - logits_BC.max(axis=1, keepdims=True)


def split(rows: Rows, held: int) -> tuple[Rows, Rows]:
    """Rows to learn from and rows to measure on, mixed by a fixed seed."""
    order = np.random.default_rng(0).permutation(len(rows))
    return rows[order[:-held]], rows[order[-held:]]


def median_s(action: Callable[[], object], *, repeats: int) -> float:
    """Median time of an action."""
    times = []
    for _ in range(repeats):
        began = perf_counter()
        action()
        times.append(perf_counter() - began)
    return float(np.median(times))


def speeds(encoding: Encoding, rows: Rows, *, repeats: int) -> dict[str, float]:
    """Rows a second of encoding and decoding 256 rows, NumPy and torch, one thread."""
    batch = np.resize(rows, (TIMED_ROWS if rows.shape[1] <= 2048 else 16, rows.shape[1]))
    tensor = torch.from_numpy(batch)
    keys = draw_keys("bench", np.arange(len(batch)))
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
            params=dict(sampled.params),
            rms_error=rms_error,
            note=f"bias z = {z:+.2f}",
            **speeds(sampled, rows, repeats=3),
        )


def sampled_error(encoding: Encoding, rows: Rows, p_BC: NDArray[np.float64], *, repeats: int) -> tuple[float, float]:
    """RMS over positions and repeats of ‖q - p‖, and the z-score of the mean error along a fixed direction."""
    direction_C = np.random.default_rng(1).choice([-1.0, 1.0], size=p_BC.shape[1])
    squares, along = [], []
    for repeat in range(max(8, repeats)):
        keys = draw_keys("bench", np.arange(len(rows)), repeat)
        for start in range(0, len(rows), 16):
            part = slice(start, start + 16)
            encoded = encoding.encode(rows[part], keys_B=keys[part])
            error_BC = np.exp(encoding.decode(encoded).astype(np.float64)) - p_BC[part]
            squares.append(np.square(error_BC).sum(axis=1))
            along.append(error_BC @ direction_C)
    found = np.concatenate(along)
    return float(np.sqrt(np.concatenate(squares).mean())), float(found.mean() / (found.std() / np.sqrt(len(found))))


def renormalised_error(p_BC: NDArray[np.float64], kept: int) -> float:
    """RMS of ‖q - p‖ for the `kept` largest scaled to sum to 1 (4 bytes each: id and value)."""
    ordered = -np.sort(-p_BC, axis=1)
    mass_B1 = ordered[:, :kept].sum(axis=1, keepdims=True)
    inside = np.square(ordered[:, :kept] * (1 / mass_B1 - 1)).sum(axis=1)
    return float(np.sqrt((inside + np.square(ordered[:, kept:]).sum(axis=1)).mean()))


def importance_error(p_BC: NDArray[np.float64], distinct: int, *, repeats: int) -> float:
    """RMS of ‖q - p‖ for independent draws from p, as many as give `distinct` ids (4 bytes each: id and count)."""
    rng = np.random.default_rng(2)
    squares = []
    for p_C in p_BC:
        upto = np.cumsum(p_C)
        for _ in range(max(2, repeats // 8)):
            ids = np.searchsorted(upto, rng.random(20 * distinct + 2000) * upto[-1], side="right")
            _, first = np.unique(ids, return_index=True)
            first.sort()
            ids = ids[: first[distinct]] if len(first) > distinct else ids
            found, counts = np.unique(np.minimum(ids, len(p_C) - 1), return_counts=True)
            q = counts / len(ids)
            squares.append(np.square(p_C).sum() - np.square(p_C[found]).sum() + np.square(q - p_C[found]).sum())
    return float(np.sqrt(np.mean(squares)))


def verdicts(measured: list[Measured]) -> Iterator[tuple[bool, str]]:
    """What must hold, and whether it does."""
    for bound_bytes, names, bound_1, bound_4, data in (
        (1050, ("q8",), 6e-6, 2.5e-6, "photographs"),
        (830, ("q6",), 7e-5, 3e-5, "photographs"),
        (580, ("q4",), 1e-3, 5e-4, "photographs"),
        (290, ("basis",), 1.2e-2, 1.5e-3, "upsampled"),
    ):
        for name in sorted({m.data for m in measured if data in m.data}):
            fits = [m for m in measured if m.data == name and m.encoding in names and m.bytes <= bound_bytes]
            held = [m for m in fits if (m.kl_t1 or 0) <= bound_1 and (m.kl_t4 or 0) <= bound_4]
            best = min(held or fits, key=lambda m: m.kl_t1 or 0)
            yield (
                bool(held),
                (
                    f"{name}: within {bound_bytes} B KL ≤ {bound_1:g} / {bound_4:g}: "
                    f"{best.encoding} {best.bytes} B has {best.kl_t1:.2g} / {best.kl_t4:.2g}"
                ),
            )
    yield from _against_topk(measured)
    for m in (m for m in measured if m.encoding == "sampled"):
        peers = [o for o in measured if o.rms_error and o.encoding != "sampled" and o.bytes == m.bytes]
        beaten = all((m.rms_error or 1) < (o.rms_error or 0) for o in peers)
        others = ", ".join(f"{o.encoding} {o.rms_error:.3f}" for o in peers)
        unbiased = abs(float(m.note.split("=")[1])) < 4
        yield beaten and unbiased, f"language model, {m.bytes} B: sampled {m.rms_error:.3f} ({m.note}); {others}"
    for m in (m for m in measured if m.encoding == "q8" and m.params["head"] == 16 and m.data in CLASSIFIERS):
        decode_ms = 1e3 * TIMED_ROWS / max(m.decode_rows_per_s, m.decode_torch_rows_per_s)
        encode = max(m.encode_rows_per_s, m.encode_torch_rows_per_s)
        fast = decode_ms < 0.3 and encode >= 50_000
        yield fast, f"{m.data}: q8 decodes 256 rows in {decode_ms:.3f} ms and encodes {encode:,.0f} rows a second"


def _against_topk(measured: list[Measured]) -> Iterator[tuple[bool, str]]:
    for data in CLASSIFIERS:
        ours = [m for m in measured if m.data == data and m.encoding in ("basis", *(f"q{b}" for b in range(2, 9)))]
        worst_1 = worst_4 = 0.0
        for topk in (m for m in measured if m.data == data and m.encoding == "topk" and 60 <= m.bytes <= 1000):
            fits = [m for m in ours if m.bytes <= topk.bytes]
            if not fits:
                continue
            assert topk.kl_t1 is not None and topk.kl_t4 is not None
            worst_1 = max(worst_1, min((m.kl_t1 or 0) for m in fits) / topk.kl_t1)
            worst_4 = max(worst_4, min((m.kl_t4 or 0) for m in fits) / topk.kl_t4)
        text = f"{data}: over all sizes at most {worst_1:.3f} of top-k's KL at T = 1 and {worst_4:.3f} at T = 4"
        yield worst_1 <= 0.5 and worst_4 <= 1 / 3, text


def show(m: Measured) -> str:
    """One line of the table."""
    error = f"{m.rms_error:9.4f} rms          " if m.rms_error is not None else f"{m.kl_t1:9.2e} {m.kl_t4:9.2e}    "
    speed = f"{m.encode_rows_per_s:10,.0f} {m.decode_rows_per_s:12,.0f}" if m.encode_rows_per_s else " " * 23
    shown = {key: value for key, value in m.params.items() if key not in ("depth", "unit_log2", "refine", "head_bits")}
    options = " ".join(f"{key}={value}" for key, value in shown.items())
    return f"{m.data:18} {m.encoding:20} {m.bytes:7,} {error} {speed}  {options} {m.note}"


def main() -> int:
    """Measure everything, print it, write the JSON; 1 when something that must hold does not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats: errors as usual, times rough")
    options = parser.parse_args()
    root = os.environ.get("SOFTLABELS_DATA")
    folder = Path(root or ".") / "logits"
    if root is None or not folder.is_dir():
        print("bench-encodings needs real logits: set SOFTLABELS_DATA to a folder with logits/*.npy", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    repeats = 5 if options.quick else 41
    measured: list[Measured] = []
    print(
        f"{'data':18} {'encoding':20} {'bytes':>7} {'KL T = 1':>9} {'KL T = 4':>9}     {'encode/s':>10} {'decode/s':>12}"
    )
    for rows in (
        *(classifier(data, folder, repeats=repeats) for data in CLASSIFIERS),
        language(folder, repeats=repeats),
    ):
        for m in rows:
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
