"""Plots and tables of docs/encodings.md, made from the measurements.

    python -m benchmarks.encodings_page

Reads `benchmarks/out/encodings.json` (written by `make bench-encodings`), writes `docs/encodings/*.svg` and the tables
between the marks of `docs/encodings.md`. Needs matplotlib (`softlabels[demo]`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "benchmarks" / "out" / "encodings.json"
PAGE = ROOT / "docs" / "encodings.md"
PLOTS = ROOT / "docs" / "encodings"
BEGIN, END = "<!-- measured: {} -->", "<!-- end -->"
TITLES = {
    "lite0_photographs": "EfficientNet-Lite0 on photographs, 1,000 classes",
    "lite2_photographs": "EfficientNet-Lite2 on photographs, 1,000 classes",
    "lite2_upsampled": "EfficientNet-Lite2 on upsampled small images, 1,000 classes (flat rows, the hard case)",
    "language_model": "SmolLM2-135M on WikiText-2, 49,152 tokens",
}
COLOURS = {"dense": "#555555", "quantised": "#1f77b4", "basis": "#2ca02c", "topk": "#d62728", "sampled": "#9467bd"}

Row = Mapping[str, Any]


def family(row: Row) -> str:
    """What a curve goes through."""
    name = str(row["encoding"])
    if name in ("f32", "f16", "bf16"):
        return "dense"
    return "quantised" if name.startswith("q") else name


def plot_kl(rows: Sequence[Row], data: str) -> Figure:
    """Bytes a row against KL, T = 1 and T = 4 side by side."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, key, title in zip(
        figure.subplots(1, 2, sharey=True), ("kl_t1", "kl_t4"), ("T = 1", "T = 4"), strict=True
    ):
        for name in ("topk", "basis", "quantised", "dense"):
            points = sorted((row["bytes"], row[key]) for row in rows if family(row) == name and row[key])
            if points:
                style = "o" if name == "dense" else "o-"
                axes.plot(*zip(*points, strict=True), style, color=COLOURS[name], label=name, markersize=3.5)
        axes.set(xscale="log", yscale="log", xlabel="bytes a row", title=title)
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("mean KL to the exact row, nats")
    figure.axes[0].legend()
    figure.suptitle(TITLES[data])
    return figure


def plot_sampled(rows: Sequence[Row]) -> Figure:
    """Bytes a token against the total error, sampled rows and their peers."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    colours = {"sampled": COLOURS["sampled"], "topk renormalise": COLOURS["topk"], "importance sampling": "#ff7f0e"}
    for name, colour in colours.items():
        points = sorted((row["bytes"], row["rms_error"]) for row in rows if row["encoding"] == name)
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=name, markersize=4)
    axes.set(xscale="log", yscale="log", xlabel="bytes a token", ylabel="rms of ‖kept - exact‖₂ at T = 1")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    axes.set_title(TITLES["language_model"])
    return figure


def kl_table(rows: Sequence[Row]) -> str:
    """Encodings of one classifier by size."""
    lines = [
        "| encoding | bytes | KL, T = 1 | KL, T = 4 | top-1 kept | encode, rows/s | decode, rows/s |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in sorted(rows, key=lambda row: (row["bytes"], row["kl_t1"])):
        lines.append(
            f"| {label(row)} | {row['bytes']:,} | {row['kl_t1']:.1e} | {row['kl_t4']:.1e} | "
            f"{100 * row['top1_agreement']:.1f}% | {row['encode_rows_per_s']:,.0f} | {row['decode_rows_per_s']:,.0f} |"
        )
    return "\n".join(lines)


def sampled_table(rows: Sequence[Row]) -> str:
    """Errors of sampled rows and peers by budget."""
    lines = ["| budget, bytes | top-k renormalised | importance sampling | sampled |", "|--:|--:|--:|--:|"]
    for sampled in (row for row in rows if row["encoding"] == "sampled"):
        budget = sampled["params"]["budget"]
        peers = {row["encoding"]: row["rms_error"] for row in rows if row["bytes"] == budget and row["rms_error"]}
        lines.append(
            f"| {budget} | {peers['topk renormalise']:.3f} | {peers['importance sampling']:.3f} | "
            f"**{sampled['rms_error']:.3f}** |"
        )
    return "\n".join(lines)


def label(row: Row) -> str:
    """Name and what of the parameters tells rows apart."""
    params = row["params"]
    if row["encoding"] == "topk":
        return f"topk, k = {params['k']}"
    if row["encoding"] == "basis":
        rest = f", {params['residual_bits']}-bit rest" if params["residual_bits"] else ""
        return f"basis, {row['note']}, head {params['head']}{rest}"
    return f"{row['encoding']}, head {params['head']}" if "head" in params else str(row["encoding"])


def filled(page: str, name: str, table: str) -> str:
    """The page with the text after the mark replaced."""
    before, mark, after = page.partition(BEGIN.format(name))
    if not mark:
        raise SystemExit(f"{PAGE} has no place for {name!r}: add {BEGIN.format(name)} and {END}")
    return f"{before}{mark}\n{table}\n{END}{after.partition(END)[2]}"


def main() -> None:
    """Write plots and tables."""
    rows: list[Row] = json.loads(MEASURED.read_text())
    mpl.rcParams["svg.hashsalt"] = "softlabels"  # the same measurements give the same files
    PLOTS.mkdir(exist_ok=True)
    page = PAGE.read_text()
    for data in ("lite0_photographs", "lite2_photographs", "lite2_upsampled"):
        own = [row for row in rows if row["data"] == data]
        plot_kl(own, data).savefig(PLOTS / f"{data}.svg", metadata={"Date": None})
        page = filled(page, data, kl_table(own))
    language = [row for row in rows if row["data"] == "language_model"]
    plot_sampled(language).savefig(PLOTS / "language_model.svg", metadata={"Date": None})
    page = filled(page, "language_model", sampled_table(language))
    PAGE.write_text(page)
    print(f"written: {PAGE.relative_to(ROOT)} and {len(list(PLOTS.glob('*.svg')))} plots")


if __name__ == "__main__":
    main()
