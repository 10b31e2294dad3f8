"""A student trained over a cache: the same weights, and a second training that asks for no row."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from benchmarks.slow_link import Link, SlowLink
from softlabels.cli import main

PARTS = """
import numpy as np
import torch
from softlabels.transfer_set import ArrayTransferSet

def net():
    return torch.nn.Linear(4, 10)

def noise():
    return ArrayTransferSet("noise", np.random.default_rng(7).normal(size=(200, 4)).astype(np.float32))
"""


def test_distill_takes_a_cache(
    served_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--cache`, with a folder or without: the weights are those of a training without it, to the bit."""
    (tmp_path / "parts.py").write_text(PARTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOFTLABELS_CACHE", str(tmp_path / "named"))
    port = re.search(r":(\d+)/", served_store)
    assert port is not None
    weights, asked = [], []
    with SlowLink(int(port.group(1)), Link(rtt_s=0.0, bytes_per_s=1e9)) as link:
        for number, cache in enumerate(([], ["--cache", "kept"], ["--cache", "kept"], ["--cache"])):
            link.questions.clear()
            out = f"{number}.safetensors"
            what = ["--student", "parts.py:net", "--inputs", "parts.py:noise", "--out", out, *cache]
            how = ["--epochs", "2", "--batch-size", "32", "--learning-rate", "0.01", "--device", "cpu"]
            url = f"http://127.0.0.1:{link.port}/tiny"
            assert main(["distill", url, *what, *how]) == 0
            weights.append({name: array.tobytes() for name, array in load_file(out).items()})
            asked.append(sum(question.startswith("/v1/stores/tiny/epochs/") for question in link.questions))
    assert weights == weights[:1] * 4
    assert asked[0] == 2  # one stream an epoch
    assert asked[1] == asked[3] == 1
    assert asked[2] == 0
    assert len(list(tmp_path.glob("*/rows-v2/*/rows"))) == 2
    assert "200 samples" in capsys.readouterr().out
