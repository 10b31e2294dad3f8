"""Results of the demo: the report, as text and JSON, and a picture of some digits with their soft targets."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.extras import needs_extra
from softlabels.target_store import TargetStore
from softlabels.transfer_set import ArrayTransferSet


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


def ambiguous_positions(
    store: TargetStore, data: ArrayTransferSet, *, among: int = 2_000, count: int = 6
) -> NDArray[np.int64]:
    """Return positions of digits with ambiguous targets: the highest entropy of the first `among`, one per class."""
    p_BC = store.batch(data.ids[:among]).p()
    entropy_B = -(p_BC * np.log(np.maximum(p_BC, 1e-30))).sum(axis=1)
    by_class: dict[int, int] = {}
    for position in np.argsort(-entropy_B).tolist():
        by_class.setdefault(int(p_BC[position].argmax()), position)
    return np.array(list(by_class.values())[:count], dtype=np.int64)


def draw(store: TargetStore, data: ArrayTransferSet, path: Path, *, high_temperature: float) -> None:
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
