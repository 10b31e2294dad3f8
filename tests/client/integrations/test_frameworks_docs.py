"""docs/frameworks.md does what it says: its blocks run, in order, against a real server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.references import load_reference

DOCS = Path(__file__).resolve().parents[3] / "docs"
STUDENT = re.compile(r"<!-- file: student.py -->\n```python\n(.*?)```", re.DOTALL)
BLOCK = re.compile(r"<!-- run -->\n```python\n(.*?)```", re.DOTALL)

for package in ("lightning", "transformers", "accelerate"):
    pytest.importorskip(package, reason=f"{package} is not installed, and the page is about it")


@pytest.mark.slow
def test_every_block_runs(tmp_path: Path, make_store: Any, serve: Any) -> None:
    """As written but for the port, with the student of the page on training."""
    student = STUDENT.search((DOCS / "training.md").read_text(encoding="utf-8"))
    assert student
    (tmp_path / "student.py").write_text(student[1], encoding="utf-8")
    data = load_reference("student.py:photographs", base=tmp_path)()
    logits_BC = np.random.default_rng(1).normal(size=(len(data), 5)).astype(np.float32)
    make_store(tmp_path / "stores" / "photographs", data, logits_BC, encoding="f16")
    address = serve(tmp_path / "stores")
    blocks = BLOCK.findall((DOCS / "frameworks.md").read_text(encoding="utf-8"))
    assert len(blocks) == 3
    for text in blocks:
        done = subprocess.run(
            [sys.executable, "-c", text.replace("http://127.0.0.1:8000", address)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "kept").is_dir()
    assert (tmp_path / "trained" / "checkpoint-10").is_dir()
    assert (tmp_path / "state").is_dir()
