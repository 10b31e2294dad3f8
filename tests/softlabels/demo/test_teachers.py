"""Teachers of the demo: training on hard labels from a seed, jitter, and the file of weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from softlabels.data.digits import load_digits
from softlabels.demo.nets import Mlp, student_mlp, teacher_mlp
from softlabels.demo.teachers import (
    TeacherSchedule,
    TrainedTeacher,
    fit,
    hard_labels,
    has_bfloat16_products,
    jitter,
    train_teacher,
)
from softlabels.errors import JobError
from softlabels.progress import QUIET
from softlabels.transfer_set import ArrayTransferSet
from softlabels_client import count_errors

torch.set_num_threads(1)

SHORT = TeacherSchedule(epochs=10, batch_size=64, jitter_pixels=1)
FEW = TeacherSchedule(epochs=10, batch_size=50, learning_rate=0.1, jitter_pixels=0)


def blobs(rows: int = 600) -> ArrayTransferSet:
    """Images of 6 x 6 in three classes: a bright patch in one of three corners over noise."""
    rng = np.random.Generator(np.random.PCG64(0))
    labels = rng.integers(0, 3, rows)
    images = rng.integers(0, 60, (rows, 6, 6)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        top, left = ((1, 1), (1, 3), (3, 1))[label]
        image[top : top + 2, left : left + 2] += 150
    return ArrayTransferSet("blobs", images, labels=labels)


def net() -> Mlp:
    """A small network with dropout; the same weights each time."""
    torch.manual_seed(0)
    return teacher_mlp(in_features=36, hidden=32, classes=3)


def trained(*, seed: int) -> Mlp:
    """A small network after three epochs with jitter."""
    model = net()
    fit(model, blobs(), replace(FEW, epochs=3, jitter_pixels=1), seed=seed, progress=QUIET)
    return model


class CountingProgress:
    """Progress that counts."""

    def __init__(self) -> None:
        self.done, self.notes = 0, list[str]()

    def advance(self, amount: int = 1) -> None:
        """Count."""
        self.done += amount

    def note(self, text: str) -> None:
        """Keep the note."""
        self.notes.append(text)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> TrainedTeacher:
    """A teacher trained for a second."""
    pytest.importorskip("sklearn", reason="scikit-learn, which bundles the digits, is not installed")
    weights = tmp_path_factory.mktemp("teacher") / "new" / "teacher-0.safetensors"
    return train_teacher(load_digits(), load_digits(split="test"), weights=weights, schedule=SHORT, seed=0)


class TestTrainTeacher:
    def test_it_learns(self, taught: TrainedTeacher) -> None:
        """Far better than the 323 errors of a guess."""
        assert taught.errors < 60
        assert not taught.model.training
        assert taught.seconds > 0

    def test_its_weights_file_is_the_same_teacher(self, taught: TrainedTeacher) -> None:
        """Loaded into a fresh net, it makes the same errors; nothing else lies beside it."""
        model = teacher_mlp(in_features=64)
        model.load_state_dict(load_file(taught.weights))
        test = load_digits(split="test")
        assert taught.errors == count_errors(model, test)
        assert list(taught.weights.parent.iterdir()) == [taught.weights]

    def test_the_seed_decides_over_the_weights(self, taught: TrainedTeacher, tmp_path: Path) -> None:
        """The same seed gives the same file, another seed another member."""
        again, other = tmp_path / "again.safetensors", tmp_path / "other.safetensors"
        for path, seed in ((again, 0), (other, 1)):
            train_teacher(load_digits(), load_digits(split="test"), weights=path, schedule=SHORT, seed=seed)
        assert taught.weights.read_bytes() == again.read_bytes()
        assert taught.weights.read_bytes() != other.read_bytes()

    def test_the_global_generator_is_left_as_it_was(self, tmp_path: Path) -> None:
        """A caller's own random draws do not depend on whether a network was trained before."""
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        data = blobs(50)
        train_teacher(data, data, weights=tmp_path / "t.safetensors", schedule=replace(FEW, epochs=1), seed=0)
        assert torch.equal(expected, torch.rand(3))


class TestFit:
    def test_it_learns_what_can_be_learned(self) -> None:
        """From chance to almost no errors."""
        model = student_mlp(in_features=36, hidden=32, classes=3)
        fit(model, blobs(), FEW, seed=0, progress=QUIET)
        assert count_errors(model, blobs()) < 6

    def test_the_seed_decides_over_order_and_jitter(self) -> None:
        """Another seed gives other weights."""
        for mine, different in zip(trained(seed=1).parameters(), trained(seed=2).parameters(), strict=True):
            assert not torch.equal(mine, different)

    def test_progress_counts_every_row(self) -> None:
        """A batch that is left over at the end of an epoch is neither trained on nor counted."""
        progress = CountingProgress()
        fit(net(), blobs(230), replace(FEW, epochs=2), seed=0, progress=progress)
        assert progress.done == 400
        assert progress.notes == ["epoch 1 of 2", "epoch 2 of 2"]

    def test_a_batch_larger_than_the_data_is_all_of_it(self) -> None:
        """Not an epoch of no steps."""
        progress = CountingProgress()
        fit(net(), blobs(30), replace(FEW, epochs=1, batch_size=1_000), seed=0, progress=progress)
        assert progress.done == 30

    def test_no_epochs_change_nothing(self) -> None:
        """The model keeps its weights."""
        model = net()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        fit(model, blobs(), replace(FEW, epochs=0), seed=0, progress=QUIET)
        assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


class TestJitter:
    def test_each_image_moves_by_its_own_whole_pixels(self) -> None:
        """A single lit pixel in the middle lands within two pixels, at every one of the 25 positions."""
        images = torch.zeros(2_000, 9, 9, dtype=torch.uint8)
        images[:, 4, 4] = 255
        moved = jitter(images, 2, torch.Generator().manual_seed(0))
        assert moved.shape == images.shape
        assert moved.dtype == torch.uint8
        lit = moved.nonzero()[:, 1:]
        assert len(lit) == 2_000
        assert {tuple(position) for position in lit.tolist()} == {(y, x) for y in range(2, 7) for x in range(2, 7)}

    def test_what_leaves_the_image_is_gone(self) -> None:
        """The edge is padded with 0, not with the other side."""
        images = torch.zeros(500, 5, 5, dtype=torch.uint8)
        images[:, 0, 0] = 255
        moved = jitter(images, 2, torch.Generator().manual_seed(0))
        assert set(moved.sum(dim=(1, 2), dtype=torch.int64).tolist()) == {0, 255}
        assert int(moved[:, 3:, :].sum()) == 0

    def test_no_pixels_move_nothing(self) -> None:
        """The very same images come back."""
        images = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8)
        assert jitter(images, 0, torch.Generator()) is images


class TestHasBfloat16Products:
    def test_only_matrix_tiles_make_it_worth_while(self) -> None:
        """BF16 instructions without tiles were slower than float32, and emulation by far."""
        assert has_bfloat16_products({"amx_bf16": True, "avx512_bf16": True})
        assert not has_bfloat16_products({"amx_bf16": False, "avx512_bf16": True})
        assert not has_bfloat16_products({})

    def test_this_machine_can_be_asked(self) -> None:
        """By default."""
        assert has_bfloat16_products() in (True, False)


class TestHardLabels:
    def test_a_set_without_all_its_labels_is_refused(self) -> None:
        """The message says how many are missing."""
        whole = blobs(10)
        labels = hard_labels(whole).copy()
        np.testing.assert_array_equal(labels, whole.labels)
        labels[3] = -1
        with pytest.raises(JobError, match="1 of 10 samples of 'part'"):
            hard_labels(ArrayTransferSet("part", whole.inputs, labels=labels))
        with pytest.raises(JobError, match="10 of 10 samples of 'none'"):
            hard_labels(ArrayTransferSet("none", whole.inputs))
