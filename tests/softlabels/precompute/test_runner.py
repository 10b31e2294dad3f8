"""A precompute run: what it keeps, what it refuses, and that nothing committed is lost."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs

import softlabels
from softlabels.errors import (
    JobError,
    NonFiniteLogitsError,
    ReferenceLoadError,
    RowsNotCommittedError,
    StoreExistsError,
    TeacherError,
    TeacherShapeError,
    TemperatureError,
    TemperatureLockedError,
    UnknownStoreError,
)
from softlabels.precompute import Job, load_job, precompute, resume, teacher_from_module
from softlabels.precompute.job import TeacherTable
from softlabels.softmath import mean_arithmetic, soften

Edited = Callable[[str, str], Job]
WEIGHTS = np.array([1.0, 3.0])


@pytest.fixture
def edited(job_folder: Path) -> Edited:
    """The job with one piece of its file replaced."""

    def edit(old: str, new: str) -> Job:
        text = (job_folder / "job.toml").read_text()
        assert old in text
        (job_folder / "edited.toml").write_text(text.replace(old, new))
        return load_job(job_folder / "edited.toml")

    return edit


def tree_digest(root: Path) -> dict[str, str]:
    """SHA-256 of every file of a store that belongs to its version."""
    files = (p for p in sorted(root.rglob("*")) if p.is_file() and p.parent.name not in ("locks", "staging"))
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.name != "job.json"}


class TestTargets:
    def test_the_geometric_mean_is_kept_and_retempers(self, job_folder: Path, exact_logits: np.ndarray) -> None:
        """Targets at any T are the softmax of the weighted mean logits over T."""
        precompute(load_job(job_folder / "job.toml"))
        mean_logits = np.average(exact_logits, axis=0, weights=WEIGHTS)
        with softlabels.open(job_folder / "store") as store:
            for temperature in (None, 1.0, 20.0):
                batch = store.batch(np.arange(1000), temperature=temperature)
                expected = soften(mean_logits, temperature=temperature or 4.0)
                np.testing.assert_allclose(batch.p(), expected, atol=2e-6)

    def test_the_arithmetic_mean_is_kept_and_locked(self, edited: Edited, exact_logits: np.ndarray) -> None:
        """Targets are the weighted mean of the members' distributions at T, and at no other T."""
        job = edited('"geometric"', '"arithmetic"')
        precompute(job)
        expected = np.exp(mean_arithmetic(exact_logits, temperature=4.0, weights_M=WEIGHTS))
        with softlabels.open(job.store_path) as store:
            np.testing.assert_allclose(store.batch(np.arange(1000)).p(), expected, atol=2e-6)
            with pytest.raises(TemperatureLockedError, match="captured at temperature 4"):
                store.batch([0], temperature=1.0)

    def test_members_leave_mean_and_temperature_open(self, edited: Edited, exact_logits: np.ndarray) -> None:
        """A store of members serves either mean, any weights and any T, each as the teachers themselves would."""
        job = edited('encoding = "f32"', 'encoding = "f32"\nkeep = "members"')
        precompute(job)
        everyone = np.arange(1000)
        with softlabels.open(job.store_path) as store:
            for weights in (None, (2.0, 1.0)):
                shares = WEIGHTS if weights is None else np.array(weights)
                arithmetic = np.exp(mean_arithmetic(exact_logits, temperature=3.0, weights_M=shares))
                geometric = soften(np.average(exact_logits, axis=0, weights=shares), temperature=3.0)
                batch = store.batch(everyone, temperature=3.0, mean="arithmetic", weights=weights)
                np.testing.assert_allclose(batch.p(), arithmetic, atol=2e-6)
                assert batch.locked
                batch = store.batch(everyone, temperature=3.0, mean="geometric", weights=weights)
                np.testing.assert_allclose(batch.p(), geometric, atol=2e-6)
                np.testing.assert_allclose(batch.p(7.0).sum(axis=1), 1.0, atol=1e-5)

    def test_string_ids_and_unlabelled_samples(self, edited: Edited) -> None:
        """Row i is found by its name, whatever its position."""
        job = edited(
            'source = "parts.py:blobs"', 'source = "parts.py:blobs"\narguments = {ids = "str", labelled = false}'
        )
        manifest = precompute(job)
        assert manifest.ids.kind == "str"
        with softlabels.open(job.store_path) as store:
            batch = store.batch(["image-00007", "image-00003", "image-00007"])
            assert batch.labels is None
            np.testing.assert_array_equal(batch.logits()[0], batch.logits()[2])

    def test_the_manifest_binds_what_made_the_targets(self, job_folder: Path) -> None:
        """Weights, references, transfer set, versions and the measured error are all there."""
        manifest = precompute(load_job(job_folder / "job.toml"))
        digests = [hashlib.sha256((job_folder / f"{n}.safetensors").read_bytes()).hexdigest() for n in ("a", "b")]
        assert [teacher.weights_sha256 for teacher in manifest.teachers] == digests
        assert manifest.transfer_set.source == "parts.py:blobs"
        assert manifest.software["torch"] == torch.__version__
        assert manifest.audit is not None
        assert manifest.audit["rows"] == 1000
        assert manifest.audit["kl_nats"]["4"]["max"] < 1e-12

    def test_teachers_of_this_process_are_as_good(self, job_folder: Path) -> None:
        """A Python call with modules and data at hand keeps the same targets as the job file does."""
        job = load_job(job_folder / "job.toml")
        precompute(job)
        from softlabels.precompute.planning.prepared_job import load_teachers, load_transfer_set

        members = load_teachers(job, torch.device("cpu"))
        inline = [
            replace(teacher_from_module(member.model, name=f"t{n}"), spec=structs.replace(member.spec, name=f"t{n}"))
            for n, member in enumerate(members)
        ]
        other = structs.replace(job, store=structs.replace(job.store, path="other"))
        precompute(other, transfer_set=load_transfer_set(job), teachers=inline)
        with softlabels.open(job.store_path) as a, softlabels.open(other.store_path) as b:
            np.testing.assert_array_equal(a.batch(range(1000)).logits(), b.batch(range(1000)).logits())


class TestRefusals:
    def test_nan_names_the_samples_and_keeps_nothing_of_the_shard(self, job_folder: Path, edited: Edited) -> None:
        """The shard with the NaN is not committed; those before it are."""
        inputs = np.random.default_rng(0).normal(size=(1000, 6)).astype(np.float32)
        threshold = float(np.sort(inputs[:, 0])[-2])
        blamed = int(inputs[:, 0].argmax())
        old = 'model = "parts.py:Linear"\nweights = "a.safetensors"'
        job = edited(old, f"{old}\narguments = {{blow_up_at = {threshold!r}}}")
        with pytest.raises(NonFiniteLogitsError, match=rf"\b{blamed}\b") as caught:
            precompute(job)
        assert caught.value.context["ids"] == [blamed]
        with softlabels.open(job.store_path) as store:
            with pytest.raises(RowsNotCommittedError):
                store.batch([blamed])
            if blamed >= 256:
                store.batch([0])

    def test_members_of_different_class_counts(self, edited: Edited) -> None:
        """Shapes and teachers are named."""
        job = edited(
            'model = "parts.py:Linear"\nweights = "b.safetensors"',
            'model = "parts.py:Linear"\narguments = {classes = 7}',
        )
        with pytest.raises(TeacherShapeError, match="7"):
            precompute(job)

    def test_dropout_that_eval_mode_does_not_reach(self, edited: Edited) -> None:
        """A teacher that answers differently each time cannot be verified, so it is refused."""
        job = edited('model = "parts.py:Linear"\nweights = "a', 'model = "parts.py:Restless"\nweights = "a')
        with pytest.raises(TeacherError, match="twice differently"):
            precompute(job)

    @pytest.mark.parametrize(
        ("old", "new", "kind", "words"),
        [
            ("a.safetensors", "gone.safetensors", JobError, "no weights file"),
            ("a.safetensors", "parts.py", JobError, "no safetensors file"),
            ('source = "parts.py:blobs"', 'source = "parts.py:blogs"', ReferenceLoadError, "has no 'blogs'"),
            ('source = "parts.py:blobs"', 'source = "nowhere.py:blobs"', ReferenceLoadError, "there is no file"),
            ('source = "parts.py:blobs"', 'source = "parts.py:Linear"', JobError, "not a TransferSet"),
            (
                'source = "parts.py:blobs"',
                'source = "parts.py:blobs"\narguments = {sample = 1}',
                JobError,
                "did you mean `samples`",
            ),
            ("temperature = 4", "temperature = 0", TemperatureError, "temperature"),
            ("temperature = 4", "temperature = nan", TemperatureError, "temperature"),
            ("weight = 3.0", "weight = -1.0", JobError, "finite positive"),
            ("batch_size = 100", 'batch_size = 100\ndevice = "warp"', JobError, "warp"),
        ],
    )
    def test_bad_jobs(self, edited: Edited, old: str, new: str, kind: type[Exception], words: str) -> None:
        """Each with a message that says what is wrong, and no store begun."""
        job = edited(old, new)
        with pytest.raises(kind, match=words):
            precompute(job)
        assert not (job.store_path / "plan.json").exists()

    def test_another_job_on_the_same_store(self, job_folder: Path, edited: Edited) -> None:
        """A store holds one job's targets; what differs is named."""
        precompute(load_job(job_folder / "job.toml"))
        with pytest.raises(StoreExistsError, match="temperature"):
            precompute(edited("temperature = 4", "temperature = 5"))

    def test_a_folder_of_other_files(self, job_folder: Path) -> None:
        """Nobody's files are written over."""
        (job_folder / "store").mkdir()
        (job_folder / "store" / "thesis.tex").write_text("precious")
        with pytest.raises(StoreExistsError, match="not a store"):
            precompute(load_job(job_folder / "job.toml"))

    def test_resume_where_nothing_was_begun(self, tmp_path: Path) -> None:
        """It says how to begin."""
        with pytest.raises(UnknownStoreError, match="nothing to resume"):
            resume(tmp_path)

    def test_a_teacher_table_takes_only_modules(self, job_folder: Path) -> None:
        """A reference to something else is refused."""
        job = load_job(job_folder / "job.toml")
        wrong = structs.replace(job, teachers=(TeacherTable(model="parts.py:blobs"),))
        with pytest.raises(ReferenceLoadError, match="not a torch"):
            precompute(wrong)


class TestInterruption:
    def test_killed_and_resumed_it_is_the_same_store(self, job_folder: Path, edited: Edited) -> None:
        """kill -9 loses no committed shard, and the resumed store equals an undisturbed one byte for byte."""
        job = edited('source = "parts.py:blobs"', 'source = "parts.py:SlowBlobs"')
        command = [sys.executable, "-m", "softlabels", "precompute", str(job_folder / "edited.toml")]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        receipts = job.store_path / "ledger"
        deadline_s = time.monotonic() + 60
        while not (receipts.is_dir() and any(receipts.iterdir())) and time.monotonic() < deadline_s:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        committed = {p.name: p.stat().st_mtime_ns for p in receipts.iterdir()}
        assert 1 <= len(committed) < 4
        resume(job.store_path)
        assert {p.name: p.stat().st_mtime_ns for p in receipts.iterdir() if p.name in committed} == committed
        undisturbed = structs.replace(job, store=structs.replace(job.store, path="undisturbed", name="store"))
        torch.set_num_threads(1)
        precompute(undisturbed)
        assert tree_digest(job.store_path) == tree_digest(undisturbed.store_path)

    def test_ctrl_c_says_how_to_go_on(self, job_folder: Path, edited: Edited) -> None:
        """Exit code 130, one line with the command, and that command finishes the store."""
        job = edited('source = "parts.py:blobs"', 'source = "parts.py:SlowBlobs"\narguments = {delay_s = 0.5}')
        command = [sys.executable, "-m", "softlabels", "precompute", str(job_folder / "edited.toml")]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        deadline_s = time.monotonic() + 60
        while not (job.store_path / "job.json").exists() and time.monotonic() < deadline_s:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 130
        assert f"softlabels resume {job.store_path}" in stderr
        assert "Traceback" not in stderr

    def test_a_finished_store_is_left_alone(self, job_folder: Path) -> None:
        """Running the job again changes no file."""
        job = load_job(job_folder / "job.toml")
        first = precompute(job)
        before = tree_digest(job.store_path)
        assert precompute(job).digest == first.digest
        assert tree_digest(job.store_path) == before
