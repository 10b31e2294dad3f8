"""Reading job files: what is understood, and what is refused and how."""

from __future__ import annotations

from pathlib import Path

import pytest

from softlabels.errors import JobError
from softlabels.precompute import load_job
from softlabels.precompute.job import job_from_json


class TestLoadJob:
    def test_a_full_file_is_understood(self, job_folder: Path) -> None:
        """Every table lands in its place, paths are relative to the file."""
        job = load_job(job_folder / "job.toml")
        assert job.store_path == job_folder / "store"
        assert (job.targets.temperature, job.targets.mean, job.targets.encoding) == (4.0, "geometric", "f32")
        assert [teacher.weight for teacher in job.teachers] == [1.0, 3.0]
        assert job.run.batch_size == 100

    def test_it_survives_json(self, job_folder: Path) -> None:
        """The copy that a store keeps reads back as the same job."""
        job = load_job(job_folder / "job.toml")
        document = job.to_json()
        assert job_from_json({k: v for k, v in document.items() if k != "base"}, base=job.base) == job

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        """The message names the file."""
        with pytest.raises(JobError, match=r"nowhere\.toml"):
            load_job(tmp_path / "nowhere.toml")

    @pytest.mark.parametrize(
        ("old", "new", "words"),
        [
            ("temperature = 4", "temprature = 4", "did you mean `temperature`"),
            ("[run]", "[runn]", "did you mean `run`"),
            ("temperature = 4", "", "required field `temperature` (at `targets`)"),
            ("temperature = 4", 'temperature = "warm"', "expected `float`, got `str` (at `targets.temperature`)"),
            ("temperature = 4", "temperature = true", "expected `float`, got `bool`"),
            ('mean = "geometric"', 'mean = "harmonic"', "'arithmetic', 'geometric'"),
            ("batch_size = 100", "batch_size = 0", "expected `int` >= 1 (at `run.batch_size`)"),
            ("batch_size = 100", "batch_size = 1.5", "expected `int | str`, got `float` (at `run.batch_size`)"),
            ("[transfer_set]", "[transfer_set", "cannot be read"),
        ],
    )
    def test_what_cannot_be_meant_is_refused(self, job_folder: Path, old: str, new: str, words: str) -> None:
        """Unknown keys come with the nearest known one, wrong values with what they must be."""
        text = (job_folder / "job.toml").read_text()
        assert old in text
        (job_folder / "bad.toml").write_text(text.replace(old, new, 1))
        with pytest.raises(JobError) as caught:
            load_job(job_folder / "bad.toml")
        assert words in str(caught.value)

    def test_a_job_without_teachers_is_refused(self, job_folder: Path) -> None:
        """A job needs at least one teacher."""
        text = (job_folder / "job.toml").read_text()
        (job_folder / "bad.toml").write_text(text.split("[[teachers]]")[0])
        with pytest.raises(JobError, match="no teacher is named"):
            load_job(job_folder / "bad.toml")
