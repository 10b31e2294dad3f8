"""Power loss at every point of a commit, finish, repair, merge and convert: what was acknowledged is there, whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.errors import SoftLabelsError
from softlabels.store.copies import convert_store, merge
from softlabels.store.repair import repair
from softlabels.store.store_documents import load_manifest
from softlabels.store.store_reader import LocalRows
from softlabels.store.verify import verify
from tests.faults.power_loss import TRACED, Disk, materialize, parse_trace

STATES = int(os.environ.get("SOFTLABELS_POWER_LOSSES", "5"))
"""Ways in which unsynced writes are lost, kept or torn, tried at each point."""

KINDS = ("zarr", "hdf5-int", "zarr-sequences")
Tree = Callable[[Path], dict[str, str]]
Check = Callable[[Path, tuple[str, ...], str], None]


@pytest.fixture(scope="module", autouse=True)
def _needs_strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    if subprocess.run(["strace", "-e", "trace=close", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("strace may not trace here (ptrace is not permitted)")


class Recorder:
    """Records every change of a task of the fork server, and replays it with power losses."""

    def __init__(
        self,
        fork_server: Any,
        stopped: Callable[[int], None],
        go_on: Callable[[int], None],
        folder: Path,
        rng: np.random.Generator,
    ) -> None:
        self._fork_server, self._stopped, self._go_on = fork_server, stopped, go_on
        self._folder, self._rng = folder, rng

    def trace(self, do: str, **task: Any) -> str:
        """Run a task to its end; return the log of its system calls."""
        log = self._folder / "strace.log"
        pid = self._fork_server.start(do, wait=True, **task)
        self._stopped(pid)
        calls = ",".join(f"?{name}" for name in TRACED)
        command = ["strace", "-f", "-y", "-xx", "-s", "4000000", "-p", str(pid), "-o", str(log), "-e", f"trace={calls}"]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert tracer.stderr is not None
        assert "attached" in tracer.stderr.readline()
        self._go_on(pid)
        code = self._fork_server.wait()
        tracer.stderr.close()
        tracer.wait(timeout=60)
        assert code == 0, self._fork_server.said()
        return log.read_text()

    def replay(self, before: Disk, root: Path, log: str, check: Check) -> tuple[int, int]:
        """Lose power after every call that changes something; return the points, and the different states found.

        Args:
            before: the disk before the task, all of it safe.
            root: store that the task writes.
            log: its system calls.
            check: called with a folder that holds what was left, what had been acknowledged, and the moment in words.
        """
        points, seen = 0, set()
        at = self._folder / "after"
        for number, call in enumerate(parse_trace(log)):
            if not before.apply(call):
                continue
            points += 1
            for state in before.crashes(self._rng, STATES):
                key = hash((before.acknowledged, tuple(sorted(state.items(), key=lambda item: item[0]))))
                if key in seen:
                    continue
                seen.add(key)
                shutil.rmtree(at, ignore_errors=True)
                materialize(state, root, at)
                check(at, before.acknowledged, f"power lost after call {number}, {call.name}({call.arguments[:120]})")
        assert "finished" in before.acknowledged
        return points, len(seen)


@pytest.fixture
def recorder(
    fork_server: Any,
    stopped: Callable[[int], None],
    go_on: Callable[[int], None],
    tmp_path: Path,
    rng: np.random.Generator,
) -> Recorder:
    """Records and replays tasks of the fork server."""
    return Recorder(fork_server, stopped, go_on, tmp_path, rng)


@pytest.fixture
def expect_acknowledged(
    refuse_wrong_rows: Callable[[Path, str], int], kind_of: Callable[..., Any]
) -> Callable[[Path, str, tuple[str, ...], str], None]:
    """What was acknowledged is readable and right; nothing else is wrong; what a receipt lists is whole."""

    def check(root: Path, kind: str, acknowledged: tuple[str, ...], moment: str) -> None:
        refuse_wrong_rows(root, kind)
        try:
            manifest = load_manifest(root)
        except SoftLabelsError:
            assert not acknowledged, f"{moment}: the store is gone"
            return
        faults = verify(root, every_fault=True).faults
        assert {fault.kind for fault in faults} <= {"unfinished"}, f"{moment}: {faults}"
        committed = _committed(root)
        rows = LocalRows(root)
        for word in acknowledged:
            if word == "finished":
                assert manifest.finished, f"{moment}: the published store is unfinished again"
            elif word.startswith("shard/"):
                shard = int(word.removeprefix("shard/"))
                assert shard in committed, f"{moment}: shard {shard} was acknowledged and is gone"
        for shard in committed:
            size = kind_of(kind).plan.shards.rows_per_shard
            first = np.arange(shard * size, min((shard + 1) * size, manifest.rows))
            rows.fetch_rows(first, tuple(manifest.arrays))

    return check


def _committed(root: Path) -> list[int]:
    return sorted(int(path.stem) for path in (root / "ledger").glob("*.json")) if (root / "ledger").is_dir() else []


@pytest.mark.parametrize("kind", KINDS)
class TestPowerLoss:
    def test_while_a_store_is_written_and_published(
        self,
        recorder: Recorder,
        fork_server: Any,
        undisturbed: Callable[[str], Path],
        tmp_path: Path,
        tree: Tree,
        kind_of: Callable[..., Any],
        expect_acknowledged: Callable[[Path, str, tuple[str, ...], str], None],
        kind: str,
    ) -> None:
        """Creation, three commits and the finish: resumed from any state, the store is bit-identical."""
        root, expected, began = tmp_path / "s", tree(undisturbed(kind)), time.monotonic()
        log = recorder.trace("write", root=root, kind=kind)

        def check(at: Path, acknowledged: tuple[str, ...], moment: str) -> None:
            expect_acknowledged(at, kind, acknowledged, moment)
            kind_of(kind).write(at)
            assert tree(at) == expected, moment

        points, states = recorder.replay(Disk(), root, log, check)
        print(f"{kind}: {points} points, {states} states, {time.monotonic() - began:.0f} s")
        assert points > 60
        assert states > points

    def test_while_a_store_is_repaired(
        self,
        recorder: Recorder,
        undisturbed: Callable[[str], Path],
        tmp_path: Path,
        tree: Tree,
        kind_of: Callable[..., Any],
        refuse_wrong_rows: Callable[[Path, str], int],
        kind: str,
    ) -> None:
        """A damaged shard moved out and an index rebuilt: repaired again and resumed, the store is bit-identical."""
        root, expected = tmp_path / "s", tree(undisturbed(kind))
        shutil.copytree(undisturbed(kind), root)
        damage_a_shard(root)
        before = Disk.of(root)
        log = recorder.trace("repair", root=root)

        def check(at: Path, acknowledged: tuple[str, ...], moment: str) -> None:
            refuse_wrong_rows(at, kind)
            assert {0, 2} <= set(_committed(at)), f"{moment}: an intact shard is gone"
            repair(at)
            kind_of(kind).write(at)
            assert tree(at) == expected, moment

        points, states = recorder.replay(before, root, log, check)
        print(f"{kind}: {points} points, {states} states")
        assert points > 10

    def test_while_stores_are_merged(
        self,
        recorder: Recorder,
        undisturbed: Callable[[str], Path],
        tmp_path: Path,
        tree: Tree,
        kind_of: Callable[..., Any],
        expect_acknowledged: Callable[[Path, str, tuple[str, ...], str], None],
        kind: str,
    ) -> None:
        """Two parts of a store united: merged again from any state, the store is bit-identical."""
        expected, parts = tree(undisturbed(kind)), [tmp_path / "one", tmp_path / "two"]
        for number, part in enumerate(parts):
            kind_of(kind).race(part, number)
        kind_of(kind).race(parts[1], 2)
        root = tmp_path / "s"
        log = recorder.trace("merge", root=root, sources=parts)

        def check(at: Path, acknowledged: tuple[str, ...], moment: str) -> None:
            expect_acknowledged(at, kind, acknowledged, moment)
            assert merge(parts, at).digest is not None
            assert tree(at) == expected, moment

        points, states = recorder.replay(Disk(), root, log, check)
        print(f"{kind}: {points} points, {states} states")
        assert points > 60

    def test_while_a_store_is_converted(
        self,
        recorder: Recorder,
        undisturbed: Callable[[str], Path],
        tmp_path: Path,
        tree: Tree,
        expect_acknowledged: Callable[[Path, str, tuple[str, ...], str], None],
        kind: str,
    ) -> None:
        """Into the other container: converted again from any state, the copy is bit-identical."""
        container: Any = "hdf5" if kind.startswith("zarr") else "zarr"
        convert_store(undisturbed(kind), tmp_path / "expected", container=container)
        expected, root = tree(tmp_path / "expected"), tmp_path / "s"
        log = recorder.trace("convert", root=root, source=undisturbed(kind), container=container)

        def check(at: Path, acknowledged: tuple[str, ...], moment: str) -> None:
            expect_acknowledged(at, kind, acknowledged, moment)
            convert_store(undisturbed(kind), at, container=container)
            assert tree(at) == expected, moment

        points, states = recorder.replay(Disk(), root, log, check)
        print(f"{kind}: {points} points, {states} states")
        assert points > 60


def damage_a_shard(root: Path) -> None:
    """Flip a bit in the middle of shard 1, in whichever file holds its targets."""
    found = [root / "shards" / "00000001.h5", *(root / "targets" / "c" / "1").rglob("*")]
    path = next(path for path in found if path.is_file())
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)
