"""`verify --against-teacher`: the job's teachers agree with the store, whatever its layout; others, or data, do not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from softlabels.cli import main
from softlabels.errors import JobError
from softlabels.precompute import load_job, precompute
from softlabels.precompute.checks.verify_teachers import verify_against_teachers
from softlabels.precompute.planning.prepared_job import load_teachers
from softlabels.store.verify import verify


class TestAgainstTeacher:
    @pytest.mark.parametrize("encoding", ['"f16"', '"q8"', '"topk3"', '"f32"\nkeep = "members"'])
    def test_the_jobs_own_teachers_agree(
        self, job_folder: Path, encoding: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Whatever the encoding, cosine is at least 0.9999 and the exit code 0."""
        text = (job_folder / "job.toml").read_text().replace('encoding = "f32"', f"encoding = {encoding}")
        (job_folder / "job.toml").write_text(text)
        precompute(load_job(job_folder / "job.toml"))
        command = ["verify", str(job_folder / "store"), "--against-teacher", str(job_folder / "job.toml")]
        assert main(command) == 0, capsys.readouterr().out

    def test_other_weights_are_found_out(self, job_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A teacher whose weights changed after the job: exit code 1, with the rows."""
        precompute(load_job(job_folder / "job.toml"))
        state = load_file(job_folder / "a.safetensors")
        save_file({name: 1.3 * tensor for name, tensor in state.items()}, job_folder / "a.safetensors")
        command = ["verify", str(job_folder / "store"), "--against-teacher", str(job_folder / "job.toml")]
        assert main(command) == 1
        printed = capsys.readouterr().out
        assert "the teachers give another target" in printed
        assert re.search(r"teacher 0 \(.*\) has another weights_sha256", printed)
        assert "repair with" not in printed, "the stored bytes are intact: repair finds nothing"
        assert len(printed.splitlines()) == 3

    def test_other_data_are_found_out(self, job_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A transfer set that changed after the job: exit code 1."""
        precompute(load_job(job_folder / "job.toml"))
        text = (job_folder / "job.toml").read_text()
        (job_folder / "other.toml").write_text(
            text.replace('source = "parts.py:blobs"', 'source = "parts.py:blobs"\narguments = {seed = 1}')
        )
        command = ["verify", str(job_folder / "store"), "--against-teacher", str(job_folder / "other.toml")]
        assert main(command) == 1
        printed = capsys.readouterr().out
        assert "not the one that the teachers saw" in printed
        assert "give another target" not in printed, "what the teachers make of other inputs says nothing about them"
        assert len(printed.splitlines()) == 3
        assert main([*command, "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert [fault["kind"] for fault in found["faults"]] == ["agreement"]
        assert found["agreement"]["other_inputs"] > 0
        assert found["agreement"]["other_targets"] == 0

    def test_a_damaged_store_is_mended_before_the_teachers_are_asked(
        self, job_folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Damage is reported with `repair`, and that the teachers were not run."""
        precompute(load_job(job_folder / "job.toml"))
        (job_folder / "store" / "stray" / "x").mkdir(parents=True)
        (job_folder / "store" / "stray" / "x" / "y").write_bytes(b"0")
        command = ["verify", str(job_folder / "store"), "--against-teacher", str(job_folder / "job.toml")]
        assert main(command) == 1
        printed = capsys.readouterr().out
        assert "repair with" in printed
        assert "the teachers were not asked" in printed


TOKENS = """
import numpy as np
import torch
from softlabels.transfer_sets.ragged import RaggedTransferSet


def texts(seed=0):
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(0, 200, length).astype(np.int32) for length in (9, 0, 30, 4, 17, 1)]
    return RaggedTransferSet("texts", sequences, ids=np.array([f"t{n}" for n in range(6)]))


class Model(torch.nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(200, 8)
        self.head = torch.nn.Linear(8, 200)

    def forward(self, tokens):
        counts = 1 + torch.arange(tokens.shape[1])[:, None]
        return self.head(4 * self.embed(tokens.clamp(min=0)).cumsum(dim=1) / counts)

"""

SHIFT = """
import torch


def shift(scale=0.1):
    def one(sample, generator):
        return sample + scale * torch.randn(sample.shape, generator=generator)

    return one
"""

SEQUENCES = """
[store]
path = "store"
rows_per_shard = 16
rows_per_chunk = 4

[transfer_set]
source = "tokens.py:texts"

[sequences]
labels = "next"

[targets]
temperature = 1
encoding = {encoding}

[[teachers]]
model = "tokens.py:Model"
head = "head"

[run]
batch_size = 2
"""


class TestSequences:
    @pytest.mark.parametrize(
        "encoding",
        [
            '"f16"',
            '"topk20"',
            '{name = "sampled", head = 2, draws = 9}',
            '"hidden"',
            '{name = "hidden", kept_as = "q8"}',
        ],
    )
    def test_the_jobs_own_teacher_agrees(
        self, tmp_path: Path, encoding: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Position by position, the draws of `sampled` among them, by the command."""
        job = sequence_job(tmp_path, encoding)
        precompute(load_job(job))
        assert main(["verify", str(tmp_path / "store"), "--against-teacher", str(job)]) == 0, capsys.readouterr().out

    @pytest.mark.parametrize(("model", "data"), [("seed = 1", ""), ("", "seed = 1")])
    @pytest.mark.parametrize("encoding", ['"f16"', '"hidden"'])
    def test_another_teacher_or_text_is_found_out(
        self, tmp_path: Path, encoding: str, model: str, data: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """With the rows that differ."""
        job = sequence_job(tmp_path, encoding)
        precompute(load_job(job))
        text = job.read_text()
        text = text.replace('"tokens.py:Model"', f'"tokens.py:Model"\narguments = {{ {model} }}')
        text = text.replace('"tokens.py:texts"', f'"tokens.py:texts"\narguments = {{ {data} }}')
        (tmp_path / "other.toml").write_text(text)
        assert main(["verify", str(tmp_path / "store"), "--against-teacher", str(tmp_path / "other.toml")]) == 1
        expected = "give another target" if model else "not the one that the teachers saw"
        assert expected in capsys.readouterr().out

    def test_another_head_is_found_out(self, tmp_path: Path) -> None:
        """Hidden states that are the same are not enough: the store's head must be the teacher's."""
        job = load_job(sequence_job(tmp_path, '"hidden"'))
        precompute(job)
        (teacher,) = load_teachers(job, torch.device("cpu"))
        with torch.no_grad():
            teacher.head().weight_CD[7] += 2
        report = verify(tmp_path / "store")
        assert report.sound
        verify_against_teachers(tmp_path / "store", job, report, teachers=[teacher])
        assert not report.sound

    def test_a_job_of_another_kind_is_refused(self, tmp_path: Path) -> None:
        """One without [sequences] cannot verify sequences."""
        job = sequence_job(tmp_path, '"f16"')
        precompute(load_job(job))
        text = job.read_text().replace('[sequences]\nlabels = "next"\n', "")
        (tmp_path / "other.toml").write_text(text)
        with pytest.raises(JobError, match="keeps sequences"):
            verify_against_teachers(tmp_path / "store", load_job(tmp_path / "other.toml"), verify(tmp_path / "store"))


class TestViews:
    def test_every_view_is_made_and_asked_again(self, job_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Batches that cut a sample's views change nothing; another number of views is refused."""
        (job_folder / "shift.py").write_text(SHIFT)
        text = (job_folder / "job.toml").read_text()
        text = text.replace("batch_size = 100", "batch_size = 7").replace('"f32"', '"f16"')
        text = text.replace('source = "parts.py:blobs"', 'source = "parts.py:blobs"\narguments = { samples = 40 }')
        text += '\n[views]\ncount = 3\ntransform = "shift.py:shift"\n'
        (job_folder / "job.toml").write_text(text)
        precompute(load_job(job_folder / "job.toml"))
        command = ["verify", str(job_folder / "store"), "--against-teacher", str(job_folder / "job.toml")]
        assert main(command) == 0, capsys.readouterr().out
        (job_folder / "job.toml").write_text(text + "arguments = { scale = 0.2 }\n")
        assert main(command) == 1
        assert "not the one that the teachers saw" in capsys.readouterr().out


def sequence_job(folder: Path, encoding: str) -> Path:
    """A job file of sequences, and the module that it names."""
    (folder / "tokens.py").write_text(TOKENS)
    (folder / "job.toml").write_text(SEQUENCES.format(encoding=encoding))
    return folder / "job.toml"
