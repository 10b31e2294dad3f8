"""How does the demo run the product's own commands? As processes of their own, the way a user would."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from softlabels.errors import JobError, ServerUnreachableError

SERVING = "softlabels: serving"
"""How the line begins that `softlabels serve` prints when it answers; its last word is the address."""

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0


def run_command(arguments: Sequence[str]) -> None:
    """Run `softlabels …` to its end; it prints for itself.

    Raises:
        JobError: it failed.
    """
    print(f"\n$ softlabels {' '.join(arguments)}", flush=True)
    finished = subprocess.run([*_softlabels(), *arguments], check=False)
    if finished.returncode != 0:
        raise JobError(f"`softlabels {arguments[0]}` ended with exit code {finished.returncode}; its message is above")


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve the stores of a folder from a process of its own while the context lasts; yields its address.

    Raises:
        ServerUnreachableError: the server does not come up.
    """
    print(f"\n$ softlabels serve {folder} --port 0", flush=True)
    command = [*_softlabels(), "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        # A server that hangs before its first line would hold the demo for ever: it is ended then, and the pipe closes.
        watchdog = threading.Timer(START_TIMEOUT_S, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            address = next((line.split()[-1] for line in process.stdout if line.startswith(SERVING)), None)
            watchdog.cancel()
            if address is None:
                raise ServerUnreachableError("`softlabels serve` ended before it answered; its message is above")
            print(f"serving at {address}", flush=True)
            yield address
        finally:
            watchdog.cancel()
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=STOP_TIMEOUT_S)
            process.kill()


def _softlabels() -> list[str]:
    # Blocks of output would come late and out of order beside the demo's own lines.
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    return [sys.executable, "-m", "softlabels"]
