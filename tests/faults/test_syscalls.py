"""Each system call of a writer fails once, or is its last: nothing partial is ever read as complete."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softlabels.store.verify import verify

Tree = Callable[[Path], dict[str, str]]

CHANGING = (
    "openat",
    "write",
    "writev",
    "fsync",
    "rename",
    "renameat",
    "renameat2",
    "mkdir",
    "close",
    "unlink",
    "flock",
)
READING = ("read", "pread64", "newfstatat", "fstat", "lseek", "getdents64")
"""Calls that a writer makes; those that it does not make are left out by themselves."""

KINDS = ("zarr", "hdf5-int", "zarr-sequences")


def errors_of(call: str) -> tuple[str, ...]:
    """What each call is made to fail with."""
    full = ("ENOSPC",) if call in ("openat", "write", "writev", "fsync", "rename", "mkdir") else ()
    return ("EIO", *full)


@pytest.fixture(scope="module", autouse=True)
def _needs_strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    probe = subprocess.run(["strace", "-e", "trace=close", "true"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip("strace may not trace here (ptrace is not permitted)")


class Tracer:
    """Runs a task of a fork server under strace."""

    def __init__(
        self, fork_server: Any, stopped: Callable[[int], None], go_on: Callable[[int], None], log: Path
    ) -> None:
        self._fork_server, self._stopped, self._go_on, self._log = fork_server, stopped, go_on, log

    def run(self, calls: str, inject: str | None, do: str, **task: Any) -> tuple[int, str]:
        """The task's exit code and what strace wrote of these calls."""
        pid = self._fork_server.start(do, wait=True, **task)
        self._stopped(pid)
        self._log.unlink(missing_ok=True)
        command = ["strace", "-f", "-p", str(pid), "-o", str(self._log), "-e", f"trace={calls}"]
        tracer = subprocess.Popen(
            command + (["-e", f"inject={inject}"] if inject else []), stderr=subprocess.PIPE, text=True
        )
        assert tracer.stderr is not None
        assert "attached" in tracer.stderr.readline()
        self._go_on(pid)
        code = self._fork_server.wait()
        tracer.stderr.close()
        tracer.wait(timeout=60)
        return code, self._log.read_text()


@pytest.fixture
def tracer(fork_server: Any, stopped: Callable[[int], None], go_on: Callable[[int], None], tmp_path: Path) -> Tracer:
    """Runs a task of the fork server under strace."""
    return Tracer(fork_server, stopped, go_on, tmp_path / "strace.log")


def count_calls(tracer: Tracer, root: Path, kind: str) -> Counter[str]:
    """How often a writer makes each call while it writes a whole store."""
    code, log = tracer.run(",".join((*CHANGING, *READING)), None, "write", root=root, kind=kind)
    assert code == 0
    return Counter(match for match in re.findall(r"^\d+ +(\w+)\(", log, flags=re.MULTILINE))


@pytest.mark.parametrize("kind", KINDS)
class TestWriting:
    def test_every_call_fails_once(
        self,
        fork_server: Any,
        tracer: Tracer,
        undisturbed: Callable[[str], Path],
        tmp_path: Path,
        tree: Tree,
        refuse_wrong_rows: Callable[[Path, str], int],
        kind: str,
    ) -> None:
        """The error is reported, a shard is whole or absent, and the resumed store is bit-identical."""
        expected = tree(undisturbed(kind))
        calls = count_calls(tracer, tmp_path / "counted", kind)
        assert {"openat", "writev", "fsync", "rename", "mkdir", "close"} <= set(calls), calls
        root, trials = tmp_path / "s", 0
        for call, times in calls.items():
            for error in errors_of(call):
                for number in range(1, times + 1):
                    shutil.rmtree(root, ignore_errors=True)
                    what = f"{call} number {number} of {times} fails with {error}"
                    code, log = tracer.run(call, f"{call}:error={error}:when={number}", "write", root=root, kind=kind)
                    if "INJECTED" not in log:
                        continue
                    trials += 1
                    assert code in (0, 3), f"{what}: {fork_server.said()}"
                    if code == 0:  # what failed was not needed
                        assert tree(root) == expected, what
                    refuse_half_done(root, what)
                    refuse_wrong_rows(root, kind)
                    assert fork_server.run("write", root=root, kind=kind) == 0, f"{what}; then: {fork_server.said()}"
                    assert tree(root) == expected, what
        print(f"{kind}: {trials} calls failed once")
        assert trials > 300

    def test_every_call_is_the_last(
        self,
        fork_server: Any,
        tracer: Tracer,
        undisturbed: Callable[[str], Path],
        tmp_path: Path,
        tree: Tree,
        kind: str,
    ) -> None:
        """kill -9 at every call that changes anything: resumed, and what was left over is purged."""
        expected = tree(undisturbed(kind))
        calls = count_calls(tracer, tmp_path / "counted", kind)
        root, trials, left_over = tmp_path / "s", 0, 0
        for call in CHANGING:
            for number in range(1, calls.get(call, 0) + 1):
                shutil.rmtree(root, ignore_errors=True)
                what = f"killed at {call} number {number}"
                code, _ = tracer.run(call, f"{call}:signal=KILL:when={number}", "write", root=root, kind=kind)
                assert code == -9, what
                trials += 1
                left_over += bool(list(root.rglob("*.part")))
                refuse_half_done(root, what)
                assert fork_server.run("write", root=root, kind=kind) == 0, f"{what}; then: {fork_server.said()}"
                assert tree(root) == expected, what
                assert list(root.rglob("*.part")) == [], what
        print(f"{kind}: killed at {trials} calls, {left_over} times with half-written files left over")
        assert trials > 150
        assert left_over > 20


class TestFullDisk:
    @pytest.mark.parametrize("kind", ["zarr", "hdf5"])
    def test_a_disk_that_fills_up(
        self, fork_server: Any, undisturbed: Callable[[str], Path], tmp_path: Path, tree: Tree, kind: str
    ) -> None:
        """Every size of a small disk up to one that suffices: an error, whole shards; resumed when there is room."""
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting a small tmpfs is not permitted here")
        try:
            refused = 0
            for pages in range(3, 200):
                remount(disk, pages)
                code = fork_server.run("write", root=disk / "s", kind=kind)
                if code == 0:
                    break
                assert code == 3, fork_server.said()
                assert "No space left" in fork_server.said()
                refused += 1
                refuse_half_done(disk / "s", f"{pages} pages")
                if refused % 3 == 0:  # else what is there already counts towards the next, larger disk
                    shutil.rmtree(disk / "s")
            assert refused > 5
            assert tree(disk / "s") == tree(undisturbed(kind))
        finally:
            unmount(disk)


def refuse_half_done(root: Path, what: str) -> None:
    """A store after a failure: not created, unfinished, or finished; never damaged."""
    if (root / "plan.json").exists():
        faults = verify(root, every_fault=True).faults
        assert {fault.kind for fault in faults} <= {"unfinished"}, f"{what}: {faults}"


def remount(disk: Path, pages: int) -> None:
    """Give a tmpfs another size."""
    subprocess.run(["mount", "-o", f"remount,size={pages * 4}k", str(disk)], check=True)


def unmount(disk: Path) -> None:
    """Unmount, also while a reader still has files mapped."""
    for _ in range(50):
        if subprocess.run(["umount", str(disk)], capture_output=True, check=False).returncode == 0:
            return
        time.sleep(0.1)
    subprocess.run(["umount", "-l", str(disk)], check=True)
