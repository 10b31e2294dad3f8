"""Parsers of outside bytes under a fuzzer that follows their code's coverage: ten minutes each by default."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FRAME = Path(__file__).parents[1] / "hostile" / "parsers.py"
SECONDS = int(os.environ.get("SOFTLABELS_FUZZ_SECONDS", "600"))

NAMES = (
    "safetensors_file", "problem_details", "response_head", "sealed_document", "manifest", "receipt", "job_file",
    "job_document", "epoch_query", "batch_query", "batch_body", "sampler_state", "checkpoint", "cache_table",
    "sorted_ids", "positions",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_fuzzed(name: str, tmp_path: Path) -> None:
    """No input crashes the parser, makes it hang, takes its memory, or raises another error than ours."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris, which fuzzes, is not installed: it has wheels for Linux only")
    command = [sys.executable, str(FRAME), name, str(SECONDS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + 120, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "stat::number_of_executed_units" in done.stderr
