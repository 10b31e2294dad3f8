"""Precision, memory layout and kernels of the teachers: as the [run] table says, and nothing unknown."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch import Tensor, nn

import softlabels
from softlabels.errors import JobError, StoreExistsError, TeacherError
from softlabels.manifest import Manifest
from softlabels.precompute import Job, load_job, precompute, resume, teacher_from_module
from softlabels.precompute.job import RunTable
from softlabels.precompute.pipeline.inference import with_compile, with_numerics

Run = Callable[[str], Job]


@pytest.fixture
def run(job_folder: Path) -> Run:
    """The small job with further lines in its [run] table."""

    def edit(lines: str) -> Job:
        (job_folder / "edited.toml").write_text((job_folder / "job.toml").read_text() + lines)
        return load_job(job_folder / "edited.toml")

    return edit


class Convolution(nn.Module):
    """Notes how its inputs lie in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)
        self.seen: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 4]."""
        self.seen.append(images.is_contiguous(memory_format=torch.channels_last))
        return self.layer(images).mean(dim=(2, 3))


class Scatters(nn.Module):
    """Uses an operation that has no deterministic form."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Its inputs, through `put_`."""
        return torch.zeros_like(inputs).put_(torch.arange(inputs.numel()), inputs)


class TestPrecision:
    @pytest.mark.parametrize("precision", ["bfloat16", "float16"])
    def test_targets_are_those_of_the_precision_and_the_manifest_names_it(
        self, run: Run, precision: str, job_folder: Path
    ) -> None:
        """Near those of float32, but not the same; what the store says survives reading it."""
        half = run(f'precision = "{precision}"\n')
        manifest = precompute(half)
        assert manifest.precision == precision
        assert Manifest.from_json(manifest.to_json()).precision == precision
        full = replace(load_job(job_folder / "job.toml"), store=replace(half.store, path="full"))
        precompute(full)
        with softlabels.open(half.store_path) as a, softlabels.open(full.store_path) as b:
            p, exact = a.batch(range(1000)).p(), b.batch(range(1000)).p()
        assert 0 < np.abs(p - exact).max() < 0.03

    def test_float32_is_not_named(self, run: Run) -> None:
        """A store of float32 says what stores have always said, so that its digest is what it was."""
        manifest = precompute(run('precision = "float32"\n'))
        assert "precision" not in manifest.to_json()

    def test_another_precision_is_another_store(self, run: Run) -> None:
        """Shards of two precisions are never mixed, and the message names what differs."""
        precompute(run(""))
        with pytest.raises(StoreExistsError, match="precision"):
            precompute(run('precision = "bfloat16"\n'))

    def test_resume_computes_in_the_same_one(self, run: Run) -> None:
        """The job that the store keeps says which."""
        job = run('precision = "bfloat16"\n')
        digest = precompute(job).digest
        shutil.rmtree(job.store_path / "ledger")
        (job.store_path / "manifest.json").unlink()
        assert resume(job.store_path).digest == digest


class TestLayoutAndKernels:
    def test_channels_last(self) -> None:
        """Images and convolutions lie with their channels last, and the answer is the same but for rounding."""
        model, images = Convolution().eval(), torch.randn(2, 3, 8, 8)
        with torch.inference_mode():
            expected = model(images)
        (teacher,) = with_numerics([teacher_from_module(model, name="t")], RunTable(channels_last=True))
        torch.testing.assert_close(teacher.logits(images), expected)
        assert model.seen == [False, True]
        assert model.layer.weight.is_contiguous(memory_format=torch.channels_last)

    def test_what_is_not_deterministic_is_refused(self) -> None:
        """With torch's own words on which operation it is; torch's setting is as it was afterwards."""
        teacher = teacher_from_module(Scatters(), name="t")
        (strict,) = with_numerics([teacher], RunTable(deterministic=True))
        teacher.logits(torch.ones(2, 3))
        with pytest.raises(TeacherError, match="put_ does not have a deterministic implementation"):
            strict.logits(torch.ones(2, 3))
        assert not torch.are_deterministic_algorithms_enabled()

    def test_what_is_deterministic_passes(self, run: Run) -> None:
        """The same store as without."""
        plain = precompute(run("")).digest
        assert precompute(run("deterministic = true\n")).digest == plain

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, while it imports its compiler
    @pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
    def test_with_compile(self, run: Run, exact_logits: np.ndarray) -> None:
        """Targets are those of the teachers, whose modules stay in sight."""
        job = run("compile = true\n")
        precompute(job)
        expected = np.average(exact_logits, axis=0, weights=[1.0, 3.0])
        with softlabels.open(job.store_path) as store:
            np.testing.assert_allclose(
                store.batch(range(1000)).logits(), expected - expected.max(axis=1, keepdims=True), atol=1e-4
            )
        (teacher,) = with_compile([teacher_from_module(Convolution(), name="t")])
        assert sum(isinstance(part, nn.Conv2d) for part in teacher.model.modules()) == 1
        teacher.model.train()
        with pytest.raises(TeacherError, match="training mode"):
            teacher.logits(torch.randn(2, 3, 8, 8))


class TestTheTable:
    @pytest.mark.parametrize(
        ("old", "new", "words"),
        [
            ("batch_size = 100", 'batch_size = "large"', "'auto'"),
            ("batch_size = 100", "batch_size = 0", "`int` >= 1"),
            ("batch_size = 100", "batch_size = true", r"`int \| str`"),
            ("batch_size = 100", 'precision = "int8"', "'bfloat16'"),
            ("batch_size = 100", 'compile = "yes"', "bool"),
            ("batch_size = 100", "deterministic = 1", "bool"),
            ("batch_size = 100", "memory_limit_gib = 0", "> 0"),
            ("batch_size = 100", "memory_limit_gib = nan", "> 0"),
            ("batch_size = 100", "memory_limit_gb = 4", "did you mean `memory_limit_gib`"),
            ("batch_size = 100", "channel_last = true", "did you mean `channels_last`"),
        ],
    )
    def test_what_it_does_not_know_is_refused(self, job_folder: Path, old: str, new: str, words: str) -> None:
        """By name, with what may stand there."""
        (job_folder / "job.toml").write_text((job_folder / "job.toml").read_text().replace(old, new))
        with pytest.raises(JobError, match=words):
            load_job(job_folder / "job.toml")
