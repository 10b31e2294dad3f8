"""`verify --against-teacher`: the teachers of the job agree with the store; others, or other data, do not."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from softlabels.cli import main
from softlabels.precompute import load_job, precompute


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
        assert "the teachers say something else" in capsys.readouterr().out

    def test_other_data_are_found_out(self, job_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A transfer set that changed after the job: exit code 1."""
        precompute(load_job(job_folder / "job.toml"))
        text = (job_folder / "job.toml").read_text()
        (job_folder / "other.toml").write_text(
            text.replace('source = "parts.py:blobs"', 'source = "parts.py:blobs"\narguments = {seed = 1}')
        )
        command = ["verify", str(job_folder / "store"), "--against-teacher", str(job_folder / "other.toml")]
        assert main(command) == 1
        assert "not the one that the teachers saw" in capsys.readouterr().out
