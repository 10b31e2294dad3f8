"""kill -9 at random moments: nothing is lost, and the resumed store is bit-identical with an undisturbed one."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.store.verify import verify

KILLS = 200
Tree = Callable[[Path], dict[str, str]]

MODULE = """
import numpy as np
import torch
from softlabels.transfer_set import ArrayTransferSet

def noise(samples=400):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(samples, 6)).astype(np.float32)
    return ArrayTransferSet("noise", inputs, labels=rng.integers(0, 5, samples))

def teacher():
    layer = torch.nn.Linear(6, 5)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(30).reshape(5, 6).sin() * 3)
        layer.bias.copy_(torch.arange(5).cos())
    return layer
"""

JOB = """
[store]
path = "{path}"
name = "noise"
format = "{container}"
rows_per_shard = 32
rows_per_chunk = 8

[transfer_set]
source = "parts.py:noise"

[targets]
temperature = 4

[[teachers]]
model = "parts.py:teacher"

[run]
batch_size = 16
device = "cpu"
"""


@pytest.fixture(scope="module")
def torch_fork_server(make_fork_server: Callable[..., Any]) -> Any:
    """A fork server that has torch and precompute loaded."""
    return make_fork_server("--torch")


class TestPrecompute:
    @pytest.mark.parametrize("container", ["zarr", "hdf5"])
    def test_killed_at_a_random_moment_and_resumed(
        self, torch_fork_server: Any, tmp_path: Path, tree: Tree, rng: np.random.Generator, container: str
    ) -> None:
        """A real precompute, 100 kills for each container; some runs are killed again while they resume."""
        (tmp_path / "parts.py").write_text(MODULE)
        for name in ("undisturbed", "killed"):
            (tmp_path / f"{name}.toml").write_text(JOB.format(path=name, container=container))
        job, store = tmp_path / "killed.toml", tmp_path / "killed"
        started = time.monotonic()
        assert torch_fork_server.run("precompute", job=tmp_path / "undisturbed.toml") == 0, torch_fork_server.said()
        took_s = time.monotonic() - started
        expected = without_job(tree(tmp_path / "undisturbed"))
        interrupted = 0
        while interrupted < KILLS // 2:
            shutil.rmtree(store, ignore_errors=True)
            alive = 0
            while True:
                pid = torch_fork_server.start("precompute", job=job)
                time.sleep(rng.uniform(0, 1.1 * took_s))
                kill(pid)
                if torch_fork_server.wait() == 0:
                    break
                interrupted += 1
                refuse_faults(store)
                if rng.random() < 0.7:
                    assert torch_fork_server.run("precompute", job=job) == 0, torch_fork_server.said()
                    break
                alive += 1
            assert without_job(tree(store)) == expected
            assert verify(store).sound


class TestWriter:
    def test_killed_at_a_random_moment_of_each_kind(
        self,
        fork_server: Any,
        undisturbed: Callable[[str], Path],
        kind_name: str,
        tmp_path: Path,
        tree: Tree,
        rng: np.random.Generator,
        refuse_wrong_rows: Callable[[Path, str], int],
    ) -> None:
        """Every kind of store, 25 kills each: what the killed writer left returns no wrong row, and is resumed."""
        root = tmp_path / "s"
        started = time.monotonic()
        assert fork_server.run("write", root=tmp_path / "timed", kind=kind_name) == 0, fork_server.said()
        took_s = time.monotonic() - started
        interrupted = 0
        while interrupted < 25:
            shutil.rmtree(root, ignore_errors=True)
            pid = fork_server.start("write", root=root, kind=kind_name)
            time.sleep(rng.uniform(0, took_s))
            kill(pid)
            if fork_server.wait() == 0:
                continue
            interrupted += 1
            refuse_faults(root)
            refuse_wrong_rows(root, kind_name)
            assert fork_server.run("write", root=root, kind=kind_name) == 0, fork_server.said()
            assert tree(root) == tree(undisturbed(kind_name))


def kill(pid: int) -> None:
    """kill -9, unless it has ended by itself."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def refuse_faults(root: Path) -> None:
    """A killed writer's store may be unfinished or not created, and nothing else."""
    if (root / "plan.json").exists():
        assert {fault.kind for fault in verify(root, every_fault=True).faults} <= {"unfinished"}


def without_job(found: dict[str, str]) -> dict[str, str]:
    """A tree without the job, which names the folder that it was begun in."""
    return {path: digest for path, digest in found.items() if path != "job.json"}
