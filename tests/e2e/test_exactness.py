"""Every sample of an epoch once and with its own target: whatever the workers, ranks, batch sizes and interruptions."""

from __future__ import annotations

import collections
import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softlabels

pytest.importorskip("torch", reason="torch is not installed: `pip install softlabels[torch]`")

HERE = Path(__file__).parent
SAMPLES, KILLS = 200, 50
ALL_WORKERS = [(0, None), *itertools.product((1, 4), ("fork", "spawn", "forkserver"))]


@pytest.fixture(scope="module")
def own_pairs(tiny_store: Path, taking: Any) -> dict[int, str]:
    """Of each sample of the tiny store the digest of its own target, read from the disk without a server."""
    with softlabels.open(tiny_store) as store:
        logits = store.batch(np.arange(SAMPLES)).logits()
    return {sample: taking.digest_of(row) for sample, row in enumerate(logits)}


@pytest.fixture(scope="module")
def taking() -> Any:
    """The trainer's module, by a name under which other processes find it, too."""
    sys.path.insert(0, str(HERE))
    yield importlib.import_module("taking")
    sys.path.remove(str(HERE))


def taken_pairs(folder: Path) -> dict[int, list[tuple[int, str]]]:
    """By epoch the pairs that were taken: of an interrupted run those up to the place that the next one began at."""
    runs: dict[int, list[list[Any]]] = collections.defaultdict(list)
    for path in sorted(folder.glob("pairs-*.log")):
        # A killed run may leave half a line, whose batch no place tells of.
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if lines:
            runs[int(path.stem.split("-")[1])].append([json.loads(line) for line in lines])
    begins = {run: logs[0][0] for run, logs in runs.items()}
    assert all(log[0] == begins[run] for run, logs in runs.items() for log in logs)
    taken: dict[int, list[tuple[int, str]]] = collections.defaultdict(list)
    for run, following in itertools.zip_longest(sorted(runs), sorted(runs)[1:]):
        for log in runs[run]:
            for epoch, cursor, pairs in log[1:]:
                if following is None or [epoch, cursor] <= begins[following]:
                    taken[epoch] += [(sample, digest) for sample, digest in pairs]
    return taken


def assert_exact(folder: Path, own_pairs: dict[int, str], epochs: int) -> None:
    """Each epoch is every sample once, with its own target."""
    taken = taken_pairs(folder)
    assert sorted(taken) == list(range(epochs))
    for pairs in taken.values():
        assert len(pairs) == SAMPLES
        assert dict(pairs) == own_pairs


def torchrun(ranks: int, script: str, *arguments: str | Path) -> None:
    """Run a script of this folder under torchrun, with gloo."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, f"--nproc-per-node={ranks}", HERE / script, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


class TestRanks:
    @pytest.mark.slow
    @pytest.mark.timeout(1600)
    @pytest.mark.parametrize("ranks", [1, 2, 3])
    def test_every_way_to_fetch(self, served_store: str, own_pairs: dict[int, str], tmp_path: Path, ranks: int) -> None:
        """0, 1 and 4 workers by fork, spawn and forkserver, batch sizes that leave a rest and one that leaves ranks
        without a sample."""
        tasks = {
            f"{kind}-{workers}-{method}": {
                "kind": kind,
                "workers": workers,
                "method": method,
                "epochs": 2,
                "batch_size": {"fork": 7, "spawn": 33, "forkserver": 16, None: 1}[method],
            }
            for kind, (workers, method) in itertools.product(("map", "stream"), ALL_WORKERS)
        }
        torchrun(ranks, "taking.py", served_store, tmp_path, json.dumps(tasks))
        for name in tasks:
            assert_exact(tmp_path / name, own_pairs, 2)

    def test_three_ranks_go_on_where_one_process_stopped(
        self, served_store: str, own_pairs: dict[int, str], tmp_path: Path, taking: Any
    ) -> None:
        """Under torchrun, with another batch size; and they take epochs of their own, with a worker each."""
        tasks = {
            "stream": {"kind": "stream", "run": 1, "batch_size": 10, "epochs": 1},
            "map": {"kind": "map", "workers": 1, "method": "fork", "epochs": 2},
            # 66 steps, and two samples for three ranks: one of them learns from none, and the others wait for it.
            "learn": {"kind": "map", "batch_size": 1, "learn": True},
        }
        folder = tmp_path / "stream"
        folder.mkdir()
        loader = taking.loader_of(served_store, kind="stream", batch_size=7, workers=0, method=None)
        pairs = []
        for batch in itertools.islice(loader, 9):
            rows = batch.targets.logits_BC.numpy()
            pairs += [[int(sample), taking.digest_of(row)] for sample, row in zip(batch.ids, rows, strict=True)]
        state = loader.state_dict()
        taking.keep(folder / taking.PLACE, state)
        (folder / "pairs-000-0.log").write_text(f"[0, 0]\n{json.dumps([0, state['cursor'], pairs])}\n")
        torchrun(3, "taking.py", served_store, tmp_path, json.dumps(tasks))
        assert_exact(folder, own_pairs, 1)
        assert_exact(tmp_path / "map", own_pairs, 2)
        assert_exact(tmp_path / "learn", own_pairs, 1)
        assert len({path.read_text() for path in (tmp_path / "learn").glob("weights-*.json")}) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("framework", "needs"),
    [("lightning", "lightning"), ("accelerate", "accelerate"), ("huggingface", "transformers")],
)
@pytest.mark.parametrize("ranks", [2, 3])
def test_frameworks_share_an_epoch_once(
    served_store: str, own_pairs: dict[int, str], tmp_path: Path, framework: str, needs: str, ranks: int
) -> None:
    """On several ranks none of them shares out once more what the loader has shared out already."""
    pytest.importorskip(needs, reason=f"{needs} is not installed: `pip install softlabels[{needs}]`")
    torchrun(ranks, "framework_ranks.py", served_store, tmp_path, framework)
    assert_exact(tmp_path, own_pairs, 2)


class Killed:
    """Runs of a trainer that are killed at random moments, each going on under other ranks, workers and batch sizes.

    Args:
        url: of the served store.
        folder: of the notes.
        kind: "map" or "stream".
        taking: the trainer's module.
    """

    def __init__(self, url: str, folder: Path, kind: str, taking: Any, seed: int) -> None:
        self.url, self.folder, self.kind = url, folder, kind
        self.draw = random.Random(seed)
        self.target = taking.forked_rank
        # Forked from a process that has imported everything: seconds less for each of hundreds.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["taking"])

    def start(self, run: int, epochs: int, pause_s: float) -> list[Any]:
        """The ranks of a run."""
        world = self.draw.choice((1, 2, 3))
        options = {
            "kind": self.kind,
            "world": world,
            "run": run,
            "batch_size": self.draw.choice((1, 3, 5, 8)),
            "workers": self.draw.choice((0, 1, 2, 4)),
            "method": "fork",
            "epochs": epochs,
            "pause_s": pause_s,
        }
        if not options["workers"]:
            options["method"] = None
        ranks = [
            self.context.Process(target=self.target, args=(self.url, str(self.folder), {**options, "rank": rank}))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        return ranks

    def kill(self, ranks: list[Any]) -> str:
        """Kill -9 a loader process of a rank, where it has one, or else the trainer; the whole run ends with it."""
        victim = self.draw.choice(ranks)
        children = Path(f"/proc/{victim.pid}/task/{victim.pid}/children")
        workers = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        what = "trainer"
        if workers and self.draw.random() < 0.5:
            what = "worker"
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.draw.choice(workers), signal.SIGKILL)
            time.sleep(self.draw.uniform(0, 0.3))  # the others go on for a moment, until somebody notices
        self.end(ranks)
        return what

    def end(self, ranks: list[Any]) -> None:
        """Kill -9 all ranks with their workers."""
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        for process in ranks:
            process.join()

    def place(self) -> tuple[int, int]:
        """The place kept."""
        path = self.folder / "place.json"
        state = json.loads(path.read_text()) if path.exists() else {"epoch": 0, "cursor": 0}
        return state["epoch"], state["cursor"]


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("kind", ["map", "stream"])
def test_killed_at_random_moments(
    served_store: str, own_pairs: dict[int, str], tmp_path: Path, taking: Any, kind: str
) -> None:
    """Fifty times in mid-epoch, each time resumed under other ranks, workers and batch sizes, and nothing is lost."""
    runs = Killed(served_store, tmp_path, kind, taking, seed=len(kind))
    kills: collections.Counter[str] = collections.Counter()
    before = runs.place()
    for run in itertools.count():
        if kills.total() == KILLS:
            break
        # More epochs than any run can take: only a kill ends it, some steps after its first.
        ranks = runs.start(run, epochs=10_000, pause_s=0.01)
        steps = runs.draw.randrange(8)
        try:
            give_up, moved = time.monotonic() + 120, 0
            while moved <= steps and time.monotonic() < give_up and all(process.is_alive() for process in ranks):
                moved, before = moved + (runs.place() != before), runs.place()
                time.sleep(0.002)
            assert all(process.is_alive() for process in ranks), [process.exitcode for process in ranks]
            time.sleep(runs.draw.uniform(0, 0.05))
            kills[runs.kill(ranks)] += 1
        finally:
            runs.end(ranks)
    epochs = runs.place()[0] + 1
    last = runs.start(KILLS, epochs=epochs, pause_s=0.0)
    for process in last:
        process.join(timeout=300)
    assert [process.exitcode for process in last] == [0] * len(last)
    print(f"{kind}: {dict(kills)} killed, {epochs} epochs of {SAMPLES} samples")
    assert_exact(tmp_path, own_pairs, epochs)
