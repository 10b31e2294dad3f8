"""Jobs with `inputs = true`: the samples are kept beside their targets, whatever else is kept, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

import softlabels
from softlabels.errors import JobError, SoftLabelsError, TransferSetChangedError
from softlabels.precompute import Job, load_job, precompute
from softlabels.precompute.job import job_from_json
from softlabels.store.verify import verify
from softlabels.transfer_set import ArrayTransferSet

INPUTS = np.random.default_rng(0).normal(size=(1000, 6)).astype(np.float32)
"""What the job's `blobs` gives, see conftest.py."""


@pytest.fixture
def keeping(job_folder: Path) -> Callable[..., Job]:
    """The small job with `inputs = true`, and some words of its file replaced."""

    def make(old: str = "", new: str = "") -> Job:
        text = (job_folder / "job.toml").read_text().replace("[store]", "[store]\ninputs = true", 1)
        assert old in text
        (job_folder / "kept.toml").write_text(text.replace(old, new, 1) if old else text)
        return load_job(job_folder / "kept.toml")

    return make


class TestKeptInputs:
    @pytest.mark.parametrize("keep", ["mean", "members"])
    @pytest.mark.parametrize("container", ["zarr", "hdf5"])
    def test_they_stand_beside_their_targets(self, keeping: Any, keep: str, container: str) -> None:
        """Every sample by its id, with labels, mean or members, in either container; the store verifies."""
        job = keeping("temperature = 4", f'temperature = 4\nkeep = "{keep}"')
        job = job_from_json(
            {
                **{k: v for k, v in job.to_json().items() if k != "base"},
                "store": {**job.to_json()["store"], "format": container},
            },
            base=job.base,
        )
        manifest = precompute(job)
        assert manifest.arrays["inputs"].row_shape == (6,)
        with softlabels.open(job.store_path) as store:
            order = np.random.default_rng(1).permutation(1000)
            batch = store.batch(order, inputs=True)
            np.testing.assert_array_equal(batch.inputs, INPUTS[order])
            assert batch.labels is not None
        assert verify(job.store_path).sound

    def test_a_job_without_keeps_none(self, job_folder: Path) -> None:
        """The store is as it was before there was such a word."""
        manifest = precompute(load_job(job_folder / "job.toml"))
        assert set(manifest.arrays) == {"targets", "ids", "fingerprints", "labels"}

    def test_targets_are_the_same_with_and_without(self, job_folder: Path, keeping: Any) -> None:
        """Keeping inputs changes no target."""
        kept = keeping('path = "store"', 'path = "other"')
        precompute(load_job(job_folder / "job.toml"))
        precompute(kept)
        with softlabels.open(job_folder / "store") as a, softlabels.open(job_folder / "other") as b:
            np.testing.assert_array_equal(a.batch(range(1000)).logits(), b.batch(range(1000)).logits())


class TestRefusals:
    def test_a_word_that_is_no_yes_or_no(self, keeping: Any) -> None:
        """`inputs` is true or false."""
        with pytest.raises(JobError, match=r"expected `bool`, got `str` \(at `store.inputs`\)"):
            keeping("inputs = true", 'inputs = "yes"')

    def test_a_source_that_is_unknown(self, keeping: Any) -> None:
        """It is named when the job is read, with the nearest known one."""
        with pytest.raises(JobError, match="did you mean `image_folder`"):
            keeping('source = "parts.py:blobs"', 'source = "imagefolder"')

    def test_an_argument_that_is_unknown(self, keeping: Any) -> None:
        """Of one's own function too, with the nearest that it has."""
        job = keeping('source = "parts.py:blobs"', 'source = "parts.py:blobs"\narguments = { sampels = 3 }')
        with pytest.raises(JobError, match="did you mean `samples`"):
            precompute(job)

    def test_views_keep_no_inputs(self, keeping: Any, job_folder: Path) -> None:
        """A store of views would hold each sample once a view; the message names the word to leave out."""
        (job_folder / "augment.py").write_text("def make():\n    return lambda sample, generator: sample\n")
        job = keeping("[targets]", '[views]\ncount = 2\ntransform = "augment.py:make"\n\n[targets]')
        with pytest.raises(JobError, match="not in a store of views: leave out `inputs = true`"):
            precompute(job)

    def test_samples_of_a_type_that_no_store_keeps(self, keeping: Any) -> None:
        """Before anything is computed; the message says what to do."""
        swapped = ArrayTransferSet("swapped", INPUTS.astype(">f4").byteswap().view("<f4").view(">f4"))
        with pytest.raises((JobError, SoftLabelsError, ValueError), match=r"little-endian|byte order|native"):
            precompute(keeping(), transfer_set=swapped)

    def test_samples_that_change_their_type(self, keeping: Any) -> None:
        """A set that gives floats of another width later on: nothing is cast in silence."""
        job = keeping()
        job = replace(
            job, teachers=tuple(replace(teacher, preprocess="torch:Tensor.float") for teacher in job.teachers)
        )
        with pytest.raises(TransferSetChangedError, match="is not what it was when this run began"):
            precompute(job, transfer_set=Changing("blobs", INPUTS))
        assert not (job.store_path / "manifest.json").exists()


class Changing(ArrayTransferSet):
    """Gives its later samples as another type."""

    def take(self, positions: Any) -> Any:
        """As kept, but for batches that begin behind the sample 600."""
        found = super().take(positions)
        if positions[0] < 600:
            return found
        return type(found)(ids=found.ids, inputs=found.inputs.astype(np.float64), labels=found.labels)
