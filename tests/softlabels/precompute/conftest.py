"""A small real job: a transfer set, two linear teachers with weights in safetensors, and the file that names them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

MODULE = '''
import time
import numpy as np
import torch
from softlabels.transfer_set import ArrayTransferSet, Samples


def blobs(samples=1000, seed=0, labelled=True, ids="int"):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(samples, 6)).astype(np.float32)
    names = np.array([f"image-{i:05d}" for i in rng.permutation(samples)]) if ids == "str" else None
    return ArrayTransferSet("blobs", inputs, labels=rng.integers(0, 5, samples) if labelled else None, ids=names)


class SlowBlobs:
    """Takes its time, so that a run can be interrupted."""

    def __init__(self, samples=1000, delay_s=0.02):
        self._inner, self._delay_s, self.name = blobs(samples), delay_s, "blobs"

    def __len__(self):
        return len(self._inner)

    def take(self, positions):
        time.sleep(self._delay_s)
        return self._inner.take(positions)


class Linear(torch.nn.Module):
    def __init__(self, classes=5, blow_up_at=None):
        super().__init__()
        self.layer = torch.nn.Linear(6, classes)
        self.blow_up_at = blow_up_at

    def forward(self, x):
        out = self.layer(x)
        if self.blow_up_at is not None:
            out = torch.where(x[:, :1] > self.blow_up_at, torch.nan, out)
        return out


class Restless(Linear):
    def forward(self, x):
        return torch.nn.functional.dropout(super().forward(x), training=True)
'''

JOB = """
[store]
path = "store"
rows_per_shard = 256
rows_per_chunk = 64

[transfer_set]
source = "parts.py:blobs"

[targets]
temperature = 4
mean = "geometric"
encoding = "f32"

[[teachers]]
model = "parts.py:Linear"
weights = "a.safetensors"

[[teachers]]
model = "parts.py:Linear"
weights = "b.safetensors"
weight = 3.0

[run]
batch_size = 100
"""


@pytest.fixture
def job_folder(tmp_path: Path) -> Path:
    """A folder with `job.toml`, `parts.py` and the weights of two teachers."""
    torch.set_num_threads(1)
    (tmp_path / "parts.py").write_text(MODULE)
    for seed, name in enumerate(("a", "b")):
        generator = torch.Generator().manual_seed(seed)
        state = {
            "layer.weight": torch.randn(5, 6, generator=generator) * 3,
            "layer.bias": torch.randn(5, generator=generator),
        }
        save_file(state, tmp_path / f"{name}.safetensors")
    (tmp_path / "job.toml").write_text(JOB)
    return tmp_path


@pytest.fixture
def exact_logits(job_folder: Path) -> np.ndarray:
    """What the two teachers say of `blobs()`: [members, samples, classes], straight from their weights."""
    from safetensors.numpy import load_file

    inputs = np.random.default_rng(0).normal(size=(1000, 6)).astype(np.float32)
    states = [load_file(job_folder / f"{name}.safetensors") for name in ("a", "b")]
    return np.stack([inputs @ state["layer.weight"].T + state["layer.bias"] for state in states])
