"""Planned jobs: every encoding from the job file to a served batch, at the temperatures that it allows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import softlabels
from softlabels.errors import JobError, TemperatureLockedError, UnknownEncodingError
from softlabels.manifest import Manifest
from softlabels.precompute import load_job, precompute, resume
from softlabels.softmath import soften
from softlabels.store import StoreWriter

CLASSES = 40
WEIGHTS = np.array([1.0, 3.0])


@pytest.fixture
def exact(job_folder: Path) -> np.ndarray:
    """Mean logits of two teachers of 40 classes, whose weights replace those of the small job."""
    from safetensors.numpy import load_file, save_file

    rng = np.random.default_rng(5)
    for name in ("a", "b"):
        state = {
            "layer.weight": (2 * rng.normal(size=(CLASSES, 6))).astype(np.float32),
            "layer.bias": rng.normal(size=CLASSES).astype(np.float32),
        }
        save_file(state, job_folder / f"{name}.safetensors")
    inputs = np.random.default_rng(0).normal(size=(1000, 6)).astype(np.float32)
    states = [load_file(job_folder / f"{name}.safetensors") for name in ("a", "b")]
    members = np.stack([inputs @ state["layer.weight"].T + state["layer.bias"] for state in states])
    return np.average(members, axis=0, weights=WEIGHTS)


def run(job_folder: Path, encoding: str, **changes: str) -> Manifest:
    """Run the small job with 40 classes and another encoding."""
    text = (job_folder / "job.toml").read_text()
    text = text.replace('model = "parts.py:Linear"', f'model = "parts.py:Linear"\narguments = {{classes = {CLASSES}}}')
    text = text.replace('encoding = "f32"', f"encoding = {encoding}")
    for old, new in changes.items():
        text = text.replace(old, new)
    (job_folder / "edited.toml").write_text(text)
    return precompute(load_job(job_folder / "edited.toml"))


class TestRetemperable:
    @pytest.mark.parametrize(
        ("encoding", "atol"),
        [('"f16"', 2e-3), ('"bf16"', 2e-2), ('"q8"', 1e-2), ('{name = "q", bits = 6, head = 8}', 3e-2)],
    )
    def test_any_temperature_within_the_encodings_error(
        self, job_folder: Path, exact: np.ndarray, encoding: str, atol: float
    ) -> None:
        """Targets at T = 1, 4 and 20 are the exact ones, but for the encoding's own error."""
        run(job_folder, encoding)
        with softlabels.open(job_folder / "store") as store:
            for temperature in (1.0, 4.0, 20.0):
                found = store.batch(range(1000), temperature=temperature).p()
                np.testing.assert_allclose(found, soften(exact, temperature=temperature), atol=atol)

    def test_the_manifest_tells_the_error(self, job_folder: Path, exact: np.ndarray) -> None:
        """KL measured over every row, at T = 1 and at the job's own."""
        manifest = run(job_folder, '"q8"')
        assert manifest.audit is not None
        with softlabels.open(job_folder / "store") as store:
            for temperature in (1.0, 4.0):
                p_BC = soften(exact, temperature=temperature)
                q_BC = store.batch(range(1000), temperature=temperature).p()
                measured = (p_BC * np.log(p_BC / q_BC)).sum(axis=1).mean()
                told = manifest.audit["kl_nats"][f"{temperature:g}"]["mean"]
                assert told == pytest.approx(measured, rel=0.05, abs=1e-7)


class TestLearnt:
    def test_a_basis_is_learnt_kept_and_resumed(self, job_folder: Path, exact: np.ndarray) -> None:
        """What was learnt is in the store; a resumed run reads it and learns nothing again."""
        manifest = run(job_folder, '{name = "basis", row_bytes = 24}')
        assert manifest.encoding.constants == ("basis", "mean", "widths")
        before = {path.name: path.read_bytes() for path in (job_folder / "store" / "encoding").iterdir()}
        (job_folder / "store" / "ledger" / "00000002.json").unlink()
        (job_folder / "store" / "manifest.json").unlink()
        assert StoreWriter.resume(job_folder / "store").missing_shards() == [2]
        assert resume(job_folder / "store").digest == manifest.digest
        assert {path.name: path.read_bytes() for path in (job_folder / "store" / "encoding").iterdir()} == before
        with softlabels.open(job_folder / "store") as store:
            found = store.batch(range(1000), temperature=4.0).p()
        np.testing.assert_allclose(found, soften(exact, temperature=4.0), atol=0.05)

    def test_auto_takes_the_cheapest_within_its_budget(self, job_folder: Path, exact: np.ndarray) -> None:
        """A loose budget costs fewer bytes than a tight one, and both are met on every row written."""
        sizes = []
        for kl, folder in ((1e-2, "loose"), (1e-5, "tight")):
            manifest = run(job_folder, f'{{name = "auto", kl = {kl}}}', **{'path = "store"': f'path = "{folder}"'})
            sizes.append(manifest.target_row_bytes)
            assert manifest.audit is not None
            assert all(figures["mean"] < 2 * kl for figures in manifest.audit["kl_nats"].values())
        assert sizes[0] < sizes[1] < 4 * CLASSES


class TestLocked:
    @pytest.mark.parametrize("encoding", ['"topk8"', '{name = "sampled", head = 6, draws = 12}'])
    def test_truncated_and_drawn_rows_exist_at_one_temperature(
        self, job_folder: Path, exact: np.ndarray, encoding: str
    ) -> None:
        """They are taken at the job's T, and asking for another is an error."""
        manifest = run(job_folder, encoding)
        assert (manifest.temperature.captured, manifest.temperature.locked) == (4.0, True)
        with softlabels.open(job_folder / "store") as store:
            batch = store.batch(range(1000))
            assert batch.temperature == 4.0
            np.testing.assert_allclose(batch.p().sum(axis=1), 1.0, atol=1e-5)
            np.testing.assert_allclose(batch.p().mean(axis=0), soften(exact, temperature=4.0).mean(axis=0), atol=0.02)
            with pytest.raises(TemperatureLockedError):
                store.batch([0], temperature=1.0)

    def test_draws_are_the_same_whenever_they_are_drawn(self, job_folder: Path, exact: np.ndarray) -> None:
        """A shard drawn again after an interruption has the same bytes."""
        manifest = run(job_folder, '{name = "sampled", head = 6, draws = 12}')
        (job_folder / "store" / "ledger" / "00000001.json").unlink()
        (job_folder / "store" / "manifest.json").unlink()
        assert resume(job_folder / "store").digest == manifest.digest

    def test_members_of_truncated_rows_are_refused(self, job_folder: Path, exact: np.ndarray) -> None:
        """A mean of truncated rows is no mean of the members."""
        with pytest.raises(JobError, match="re-tempers"):
            run(job_folder, '"topk8"\nkeep = "members"')


class TestRefused:
    @pytest.mark.parametrize("encoding", ['"f17"', '{name = "topk"}', '{name = "q", bit = 4}', '{name = "auto"}'])
    def test_what_is_no_encoding_is_refused_before_anything_runs(self, job_folder: Path, encoding: str) -> None:
        """The message names the nearest known one."""
        with pytest.raises(UnknownEncodingError):
            run(job_folder, encoding)
        assert not (job_folder / "store").exists()
