"""What came of the demo: errors of teacher and students, the share of the gap closed, and the report on disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """Figures of one run; errors are wrong samples of the test set.

    Attributes:
        data: what was trained on, and where it came from.
        teacher_errors: of each member; ensemble_errors: of their geometric mean.
        alone_errors: the student on hard labels. distilled_errors: the same student on the service's soft targets.
        temperature: of the soft targets.
        target_bytes_a_sample: what the store keeps of a sample's target.
        kl_nats: error of the encoding, by temperature.
        seconds: by part of the demo.
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
        """Share of the gap between the student alone and the ensemble that distillation closes; None without a gap."""
        gap = self.alone_errors - self.ensemble_errors
        return None if gap <= 0 else (self.alone_errors - self.distilled_errors) / gap

    def lines(self) -> list[str]:
        """The figures for people."""
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
