"""docs/training.md, run as a reader would run it, against a real server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from softlabels.references import load_reference

PAGE = Path(__file__).resolve().parents[3] / "docs" / "training.md"
BLOCK = re.compile(r"<!-- (?:file: (?P<name>\S+)|run) -->\n```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path, make_store: Any, serve: Any) -> tuple[Path, str]:
    """A folder with the page's files, and the address of a server that has the page's store."""
    for block in BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        if block["name"]:
            (tmp_path / block["name"]).write_text(block["text"], encoding="utf-8")
    data = load_reference("student.py:photographs", base=tmp_path)()
    logits_BC = np.random.default_rng(1).normal(size=(len(data), 5)).astype(np.float32)
    make_store(tmp_path / "stores" / "photographs", data, logits_BC, encoding="f16")
    return tmp_path, serve(tmp_path / "stores")


def test_every_block_runs(workplace: tuple[Path, str]) -> None:
    """In order, as written but for the port, and what they promise is there."""
    folder, address = workplace
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(folder)}
    ran = 0
    for block in BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        if block["name"]:
            continue
        text = block["text"].replace("http://127.0.0.1:8000", address)
        command = [sys.executable, "-c", text] if block["language"] == "python" else ["bash", "-ec", text]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran == PAGE.read_text(encoding="utf-8").count("<!-- run -->")
    assert load_file(folder / "student.safetensors")["layers.1.weight"].shape == (32, 192)
    assert load_file(folder / "small.safetensors")["layers.1.weight"].shape == (16, 192)


def test_every_setting_is_described() -> None:
    """A setting that the page does not name would be found by nobody."""
    import dataclasses

    from softlabels_client import DistillSettings

    page = PAGE.read_text(encoding="utf-8")
    for setting in dataclasses.fields(DistillSettings):
        assert f"`{setting.name}`" in page
        if isinstance(setting.default, str):
            assert f"`{setting.default}`" in page
