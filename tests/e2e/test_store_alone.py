"""From a folder of pictures to a student that never saw it: inputs travel in the store, and a URL is all it takes."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import softlabels
from softlabels.transfer_set import sample_fingerprints

COUNT = 90

PARTS = """
import torch

torch.set_num_threads(1)


class Net(torch.nn.Module):
    def __init__(self, classes=3, hidden=8):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, classes)
        )

    def forward(self, pictures):
        return self.layers(pictures.float() / 255)
"""

JOB = """
[store]
path = "stores/pictures"
inputs = true
rows_per_shard = 32
rows_per_chunk = 16

[transfer_set]
source = "image_folder"
arguments = { path = "pictures", size = 8, resize = 9 }

[targets]
temperature = 2

[[teachers]]
model = "parts.py:Net"
arguments = { hidden = 32 }

[run]
batch_size = 16
device = "cpu"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job, its parts and 90 pictures in two classes, or beside them in none; the store is made."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    where = tmp_path_factory.mktemp("alone")
    rng = np.random.default_rng(5)
    for number in range(COUNT):
        place = where / "pictures" / ("cat/", "dog/", "")[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        image.fromarray(rng.integers(0, 256, (10 + number % 4, 12, 3), dtype=np.uint8)).save(
            place / f"{number:02d}.png"
        )
    (where / "parts.py").write_text(PARTS)
    (where / "job.toml").write_text(JOB)
    done = command(where, "precompute", "job.toml")
    assert done.returncode == 0, done.stderr
    return where


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """The store behind `softlabels serve` in a process of its own."""
    log = folder / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "softlabels", "serve", str(folder / "stores"), "--port", "0"],
            stdout=output,
            stderr=output,
        )
    try:
        give_up = time.monotonic() + 60
        while not (found := re.search(r" at (http://\S+)", log.read_text())):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < give_up, log.read_text()
            time.sleep(0.05)
        yield f"{found.group(1)}/pictures"
    finally:
        server.terminate()
        server.wait(timeout=20)


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A `softlabels` command, run in a process of its own inside the folder."""
    return subprocess.run(
        [sys.executable, "-m", "softlabels", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def distilled(folder: Path, name: str, *arguments: str) -> dict[str, np.ndarray]:
    """The weights of a student that `softlabels distill` trains for two epochs."""
    more = ["--student", "parts.py:Net", "--out", name, "--epochs", "2", "--batch-size", "16", "--device", "cpu"]
    done = command(folder, "distill", *arguments, *more)
    assert done.returncode == 0, done.stderr
    assert "90 samples of 'pictures'" in done.stdout
    return load_file(folder / name)


class TestStoreAlone:
    def test_inputs_come_over_the_wire_and_are_what_the_teacher_saw(self, folder: Path, url: str) -> None:
        """Bit by bit the same as on disk, with fingerprints that fit, mixed labels, and ids that are paths."""
        with softlabels.open(url) as far, softlabels.open(folder / "stores" / "pictures") as near:
            ids = near.ids()
            assert far.ids().tolist() == ids.tolist()
            assert {name.partition("/")[0] for name in ids.tolist() if "/" in name} == {"cat", "dog"}
            batches = [store.batch(ids[::-1], inputs=True, fingerprints=True) for store in (far, near)]
            for batch in batches:
                assert batch.inputs is not None
                np.testing.assert_array_equal(sample_fingerprints(batch.inputs), batch.fingerprints)
                np.testing.assert_array_equal(batch.inputs, batches[0].inputs)
                assert np.unique(batch.labels).tolist() == [-1, 0, 1]

    def test_a_url_alone_trains_the_student_that_the_inputs_would(self, folder: Path, url: str) -> None:
        """Without `--inputs`, and with the pictures at hand: the same weights, to the bit."""
        alone = distilled(folder, "alone.safetensors", url)
        arguments = '{"path": "pictures", "size": 8, "resize": 9}'
        brought = distilled(folder, "brought.safetensors", url, "--inputs", "image_folder", "--inputs-args", arguments)
        for name, weights in alone.items():
            np.testing.assert_array_equal(weights, brought[name])

    def test_other_pictures_are_still_refused(self, folder: Path, url: str) -> None:
        """A student that brings pictures of another cut is told so, whatever the store keeps."""
        done = command(
            folder,
            *("distill", url, "--student", "parts.py:Net", "--out", "x.safetensors", "--device", "cpu"),
            *("--inputs", "image_folder", "--inputs-args", '{"path": "pictures", "size": 8}'),
        )
        assert done.returncode != 0
        assert "fingerprint" in done.stderr or "not those" in done.stderr

    def test_plan_counts_the_inputs(self, folder: Path) -> None:
        """Bytes a sample and in all, before anything is run."""
        done = command(folder, "plan", "job.toml")
        assert done.returncode == 0, done.stderr
        assert "inputs: 192 bytes a sample" in done.stdout
