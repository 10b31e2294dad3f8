"""What a job will cost before it runs, and how far it is while it does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from softlabels.cli import main
from softlabels.cli.jobs import lines, size
from softlabels.precompute import load_job, precompute
from softlabels.precompute.planning.forecast import Forecast, forecast
from softlabels.store.ledger import read_status

MODULE = """
import time, numpy as np, torch
from softlabels.transfer_set import ArrayTransferSet

class Slow:
    name = "slow"
    def __init__(self, delay_s=0.0, samples=600):
        inputs = np.random.default_rng(0).normal(size=(samples, 4)).astype("f4")
        self.inner, self.delay_s = ArrayTransferSet("slow", inputs), delay_s
    def __len__(self): return len(self.inner)
    def take(self, positions):
        time.sleep(self.delay_s)
        return self.inner.take(positions)

def teacher():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 24)
"""

JOB = """
[store]
path = "store"
rows_per_shard = 100
rows_per_chunk = 50
[transfer_set]
source = "parts.py:Slow"
arguments = {{ delay_s = {delay_s} }}
[targets]
temperature = 4
encoding = "q6"
[[teachers]]
model = "parts.py:teacher"
[run]
batch_size = 100
"""

WORDS = """
import numpy as np, torch
from softlabels.transfer_sets.ragged import RaggedTransferSet

def texts():
    rng = np.random.default_rng(0)
    return RaggedTransferSet("texts", [rng.integers(0, 4200, n) for n in range(1, 21)], ids=np.arange(20) * 7)

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(4200, 8), torch.nn.Linear(8, 4200))

def shown(tokens):
    return tokens.clamp(min=0)
"""

WORDS_JOB = """
[store]
path = "store"
rows_per_shard = 64
rows_per_chunk = 32
[transfer_set]
source = "words.py:texts"
[sequences]
labels = "next"
[targets]
temperature = 1
encoding = {name = "topk", k = 40}
[[teachers]]
model = "words.py:model"
preprocess = "words.py:shown"
head = "1"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small job of six shards."""
    (tmp_path / "parts.py").write_text(MODULE)
    (tmp_path / "job.toml").write_text(JOB.format(delay_s=0.0))
    return tmp_path


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Forecast]:
    """A job of sequences with many classes, and its forecast."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("words")
    (folder / "words.py").write_text(WORDS)
    (folder / "words.toml").write_text(WORDS_JOB)
    return folder, forecast(load_job(folder / "words.toml"))


class TestPlan:
    def test_the_figures_are_those_of_the_run(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Bytes a row as the store then has them, KL near what the audit then finds; nothing is written."""
        assert main(["plan", str(folder / "job.toml")]) == 0
        text = capsys.readouterr().out
        assert not (folder / "store").exists()
        manifest = precompute(load_job(folder / "job.toml"))
        assert f"q6: {manifest.target_row_bytes} bytes a row" in text
        assert "600 samples × 24 classes" in text
        line = next(
            line for line in text.splitlines() if line.startswith(f"q6 head={manifest.encoding.params['head']} ")
        )
        assert manifest.audit is not None
        assert float(line.split()[6]) == pytest.approx(manifest.audit["kl_nats"]["4"]["mean"], rel=0.3)

    @pytest.mark.parametrize("option", ["--samples", "--rows"])
    def test_a_larger_job_is_reckoned_from_a_part(
        self, folder: Path, option: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Days, bytes and money of a billion samples."""
        assert main(["plan", str(folder / "job.toml"), option, "1000000000", "--price", "3"]) == 0
        text = capsys.readouterr().out
        assert "1,000,000,000 samples" in text
        assert "at 3 an hour" in text

    def test_rows_of_sequences_are_counted(self, words: tuple[Path, Forecast]) -> None:
        """Positions and not samples, with what sequences keep once a sample; bytes are those of the store."""
        folder, found = words
        assert lines(found, price=None)[0].startswith("20 samples (210 rows) × 4,200 classes")
        precompute(load_job(folder / "words.toml"))
        files = (file for file in (folder / "store").rglob("*") if file.is_file() and file.parent.name != "ledger")
        kept = sum(file.stat().st_size for file in files if file.suffix in ("", ".npy"))
        assert found.store_bytes(found.own[1]) == pytest.approx(kept, rel=0.05)  # headers of very small files

    def test_what_suits_many_classes_is_tried(self, words: tuple[Path, Forecast]) -> None:
        """Small rows of `topk` and `sampled`, and hidden states; for the rows on paper, with time and price."""
        text = "\n".join(lines(replace(words[1], rows=1_000_000_000), price=2.0))
        assert "(1,000,000,000 rows)" in text
        for label, row_bytes in (("topk k=31 ", "128"), ("hidden kept_as=f16", "16"), ("hidden kept_as=q8", "12")):
            (line,) = (line for line in text.splitlines() if line.startswith(label))
            assert line[34:46].strip() == row_bytes
        assert all("∞" in line for line in text.splitlines() if line.startswith("sampled"))
        assert text.count("sampled head") == 4
        assert text.count("cost") == 1

    def test_sizes_for_people(self) -> None:
        """Three digits and a unit."""
        assert [size(n) for n in (12, 2_560_000_000, 1.9e13)] == ["12 B", "2.56 GB", "19 TB"]


class TestStatus:
    def test_it_is_told_from_outside_while_the_run_goes_on(self, folder: Path) -> None:
        """Another process sees committed shards, a rate and the time left; in the end, that it is finished."""
        (folder / "job.toml").write_text(JOB.format(delay_s=0.3))
        command = [sys.executable, "-m", "softlabels", "precompute", str(folder / "job.toml")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as run:
            ledger = folder / "store" / "ledger"
            give_up = time.monotonic() + 60
            while len(list(ledger.glob("*.json")) if ledger.is_dir() else []) < 3 and time.monotonic() < give_up:
                time.sleep(0.01)
            status = read_status(folder / "store")
            assert not status.manifest.finished
            assert 300 <= status.rows < 600
            assert len(status.in_work) <= 2  # one computed, one written
            assert status.rows_per_s is not None
            assert status.left_s is not None
            assert status.audit["rows"] == status.rows
            assert run.wait(timeout=60) == 0
        status = self.ask(folder)
        assert status["manifest"]["finished"]
        assert (status["rows"], status["in_work"], status["left_s"]) == (600, [], 0.0)

    def test_nothing_begun_is_an_error(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """With exit code 1 and the code of the error."""
        assert main(["status", str(tmp_path)]) == 1
        assert "[unknown-store]" in capsys.readouterr().err

    @staticmethod
    def ask(folder: Path) -> dict[str, dict[str, object]]:
        """What the command prints for programs."""
        command = [sys.executable, "-m", "softlabels", "status", str(folder / "store"), "--json"]
        found: dict[str, dict[str, object]] = json.loads(
            subprocess.run(command, capture_output=True, check=True).stdout
        )
        return found
