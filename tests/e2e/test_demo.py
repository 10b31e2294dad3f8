"""The demo, whole, on the bundled digits: every part of the product in its own process, and a report that adds up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that `softlabels demo --small` filled, and what it printed."""
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "softlabels", "demo", "--small", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout + done.stderr


class TestDemo:
    def test_the_report_adds_up(self, demo: tuple[Path, str]) -> None:
        """Errors of everybody, the share of the gap closed, the store's digest and the encoding's error."""
        out, _ = demo
        report = json.loads((out / "report.json").read_text())
        assert report["test_samples"] == 359
        assert len(report["teacher_errors"]) == 2
        assert 0 <= report["distilled_errors"] < 60
        gap = report["alone_errors"] - report["ensemble_errors"]
        closed = (report["alone_errors"] - report["distilled_errors"]) / gap if gap > 0 else None
        assert report["gap_closed"] == closed
        assert len(report["store_digest"]) == 64
        assert set(report["kl_nats"]) == {"1", "20"}

    def test_the_picture_is_a_png(self, demo: tuple[Path, str]) -> None:
        """Digits with their soft targets at two temperatures."""
        raw = (demo[0] / "soft_targets.png").read_bytes()
        assert raw.startswith(b"\x89PNG")
        assert len(raw) > 10_000

    def test_it_says_what_it_does(self, demo: tuple[Path, str]) -> None:
        """The commands it runs, progress of each long part, the comparison, and what to try next."""
        text = demo[1]
        for words in (
            "$ softlabels precompute",
            "$ softlabels serve",
            "$ softlabels distill",
            "student from the service",
            "samples/s",
            "try next",
        ):
            assert words in text

    def test_what_it_made_is_a_store_like_any_other(self, demo: tuple[Path, str]) -> None:
        """It verifies."""
        command = [sys.executable, "-m", "softlabels", "verify", str(demo[0] / "stores" / "digits")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
