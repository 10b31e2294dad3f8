"""The README's own words, run as a reader would run them: files written, commands typed, Python executed."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file

README = Path(__file__).resolve().parents[2] / "README.md"
BLOCK = re.compile(r"<!-- (file: (?P<name>\S+)|run|serve) -->\n```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with what the README takes for granted: the weights of two trained teachers."""
    from safetensors.torch import save_file

    for block in BLOCK.finditer(README.read_text()):
        if block["name"]:
            (tmp_path / block["name"]).write_text(block["text"])
    script = "import torch; torch.manual_seed(0); from teachers import Net; from safetensors.torch import save_file\n"
    script += "save_file(Net(64).state_dict(), 'large.safetensors'); save_file(Net().state_dict(), 'small.safetensors')"
    assert callable(save_file)
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    return tmp_path


def processes(workplace: Path, port: int) -> Iterator[tuple[str, subprocess.CompletedProcess[str]]]:
    """Every block of the README in order, run in `workplace`; the server runs beside what follows it."""
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(workplace)}
    server: subprocess.Popen[bytes] | None = None
    try:
        for block in BLOCK.finditer(README.read_text()):
            text = block["text"].replace("8000", str(port))
            if block.group(1) == "serve":
                server = subprocess.Popen(["bash", "-c", f"exec {text}"], cwd=workplace, env=environment)
                wait_until_it_answers(port)
            elif block.group(1) == "run":
                command = [sys.executable, "-c", text] if block["language"] == "python" else ["bash", "-ec", text]
                yield (
                    text,
                    subprocess.run(
                        command, cwd=workplace, env=environment, capture_output=True, text=True, check=False
                    ),
                )
    finally:
        if server is not None:
            server.terminate()
            server.wait(timeout=15)


def wait_until_it_answers(port: int) -> None:
    """Until the server's health route answers, a minute at most."""
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
        else:
            return
    pytest.fail("the README's server does not answer")


class TestReadme:
    def test_every_block_runs(self, workplace: Path) -> None:
        """The three users' examples work as written, in order, and leave what they promise."""
        ran = 0
        for text, process in processes(workplace, free_port()):
            assert process.returncode == 0, f"{text}\n{process.stdout}\n{process.stderr}"
            ran += 1
        assert ran == 4
        assert load_file(workplace / "batch.safetensors")["targets"].shape == (3, 5)
        assert (workplace / "student.safetensors").is_file()

    def test_every_block_is_accounted_for(self) -> None:
        """A code block without a mark would be one that nobody runs; the make commands are run by the build itself."""
        text = README.read_text()
        unmarked = [
            block for block in re.findall(r"(?<!-->\n)```\w*\n(.*?)```", text, re.DOTALL) if "softlabels " in block
        ]
        assert not unmarked

    def test_every_link_leads_somewhere(self) -> None:
        """Documents that the README points at exist."""
        for target in re.findall(r"\]\((?!http)([^)#]+)", README.read_text()):
            assert (README.parent / target).is_file(), target
