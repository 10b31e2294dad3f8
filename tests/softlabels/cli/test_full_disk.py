"""What becomes of a run whose disk takes no more?"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

from softlabels.cli import main

PARTS = """
import numpy as np, torch
from softlabels.transfer_set import ArrayTransferSet

def samples():
    return ArrayTransferSet("noise", np.random.default_rng(0).normal(size=(1024, 8)).astype("f4"))

def teacher():
    torch.manual_seed(0)
    return torch.nn.Linear(8, 400)
"""

JOB = """
[store]
path = "store"
rows_per_shard = 256
rows_per_chunk = 64
[transfer_set]
source = "parts.py:samples"
[targets]
temperature = 2
encoding = "f32"
[[teachers]]
model = "parts.py:teacher"
"""


def limit_files_to_100_kb() -> None:
    """A shard of this job takes 400 kB: the kernel refuses the rest of it, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


class TestAFullDisk:
    """Plain words, nothing half-written, and the same command goes on."""

    def test_the_run_ends_in_one_message_and_goes_on_later(self, tmp_path: Path) -> None:
        """Exit code 1, no traceback, no temporary file; with room again the store is finished."""
        (tmp_path / "parts.py").write_text(PARTS)
        (tmp_path / "job.toml").write_text(JOB)
        command = [sys.executable, "-m", "softlabels", "precompute", str(tmp_path / "job.toml")]
        ended = subprocess.run(
            command,
            capture_output=True,
            text=True,
            preexec_fn=limit_files_to_100_kb,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            timeout=120,
        )
        assert ended.returncode == 1
        assert "File too large" in ended.stderr
        assert "run the same command again" in ended.stderr
        assert "Traceback" not in ended.stderr
        assert not list((tmp_path / "store").rglob("*.tmp*"))
        assert main(["precompute", str(tmp_path / "job.toml")]) == 0
        assert main(["verify", str(tmp_path / "store")]) == 0
