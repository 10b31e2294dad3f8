"""The guard of mapped files: in processes of their own, since what it prevents is their end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MAPPED = """
import ctypes, faulthandler, mmap, os, signal, sys, threading
from softlabels.mapping_guard import GuardedRange, libc

def mapped(path, pages):
    with open(path, "wb") as file:
        file.write(b"x" * (pages * mmap.PAGESIZE))
    with open(path, "r+b") as file:
        found = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    import numpy as np
    return found, np.frombuffer(found, np.uint8)

path, *arguments = sys.argv[1:]
"""

TRUNCATED = """
before = "before" in arguments
if before:
    faulthandler.enable()
mapping, contents = mapped(path, 4)
guard = GuardedRange(contents.ctypes.data, contents.nbytes)
if "after" in arguments:
    faulthandler.enable()
os.truncate(path, mmap.PAGESIZE + 10)
assert contents[0] == ord("x") and contents[mmap.PAGESIZE + 20] == 0
assert guard.lost_pages == 0
if "forked" in arguments and (child := os.fork()):
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
assert contents.sum() > 0
assert guard.lost_pages == 2, guard.lost_pages
print("alive")
"""

FOREIGN = """
if "faulthandler" in arguments:
    faulthandler.enable()
mapping, contents = mapped(path, 4)
other, unguarded = mapped(path + "2", 4)
guard = GuardedRange(contents.ctypes.data, contents.nbytes)
os.truncate(path + "2", 0)
print(unguarded[5])
"""

SENT = """
mapping, contents = mapped(path, 4)
guard = GuardedRange(contents.ctypes.data, contents.nbytes)
os.kill(os.getpid(), signal.SIGBUS)
print("alive")
"""

MANY = """
import numpy as np
mapping, contents = mapped(path, 64)
guard = GuardedRange(contents.ctypes.data, contents.nbytes)
os.truncate(path, 0)
threads = [threading.Thread(target=lambda: np.copy(contents)) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert guard.lost_pages >= 64
print("alive")
"""


def run(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a piece of code in a process of its own, with the path of a file to map."""
    command = [sys.executable, "-c", MAPPED + code, str(folder / "mapped"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="the guard works on Linux")
class TestBusErrors:
    @pytest.mark.parametrize("arguments", [(), ("before",), ("after",), ("forked",), ("before", "forked")])
    def test_lost_pages_are_zeros_and_counted(self, tmp_path: Path, arguments: tuple[str, ...]) -> None:
        """With faulthandler on or off, before or after the guard, and in a child process."""
        done = run(TRUNCATED, tmp_path, *arguments)
        assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr

    @pytest.mark.parametrize("arguments", [(), ("faulthandler",)])
    def test_a_fault_elsewhere_ends_the_process(self, tmp_path: Path, arguments: tuple[str, ...]) -> None:
        """As it does without the guard, with the report of faulthandler where that is enabled."""
        done = run(FOREIGN, tmp_path, *arguments)
        assert done.returncode == -7, done.stderr
        assert ("Fatal Python error: Bus error" in done.stderr) == bool(arguments)

    def test_a_signal_that_is_sent_ends_the_process(self, tmp_path: Path) -> None:
        """`kill -BUS` is no fault of a mapping."""
        assert run(SENT, tmp_path).returncode == -7

    def test_many_threads_at_once(self, tmp_path: Path) -> None:
        """Every thread goes on."""
        done = run(MANY, tmp_path)
        assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
