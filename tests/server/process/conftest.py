"""Fixtures for tests of whole server processes: `softlabels serve` started, watched and stopped."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import urllib3

START_S = 60.0
"""Far more than a start takes: the machine may be busy."""

Start = Callable[..., "Process"]


class Process:
    """A server process and what it printed so far."""

    def __init__(self, log: Path, arguments: tuple[object, ...]) -> None:
        self._log = log
        with log.open("wb") as output:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "softlabels", "serve", *map(str, arguments)],
                stdout=output,
                stderr=output,
                cwd=log.parent,
            )

    @property
    def printed(self) -> str:
        """Everything on standard output and error."""
        return self._log.read_text(encoding="utf-8")

    def address(self) -> str:
        """The address that it announces, once it does."""
        give_up = time.monotonic() + START_S
        while time.monotonic() < give_up and self.popen.poll() is None:
            if found := re.search(r"^softlabels: serving \d+ store\(s\) at (http://\S+)$", self.printed, re.MULTILINE):
                return found.group(1)
            time.sleep(0.05)
        pytest.fail(f"the server did not start (exit code {self.popen.poll()}):\n{self.printed}")

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal; the exit code."""
        self.popen.send_signal(number)
        return self.popen.wait(timeout=30)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start `softlabels serve` with these arguments; ended with the test."""
    processes: list[Process] = []

    def begin(*arguments: object) -> Process:
        processes.append(Process(tmp_path / f"log-{len(processes)}", arguments))
        return processes[-1]

    yield begin
    for process in processes:
        if process.popen.poll() is None:
            process.popen.kill()
        process.popen.wait()


@pytest.fixture
def get() -> Callable[..., urllib3.BaseHTTPResponse]:
    """Send one GET request on a connection of its own."""

    def send(url: str, **headers: str) -> urllib3.BaseHTTPResponse:
        with urllib3.PoolManager() as pool:
            return pool.request("GET", url, headers=headers, retries=False, timeout=30)

    return send
