"""The plain training loop: it learns, repeats itself under a seed, and keeps its constraints."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from softlabels.demo.nets import Mlp, student_mlp, teacher_mlp
from softlabels.demo.teachers import (
    Jitter,
    constrain_incoming_weights,
    fast_arithmetic,
    fit_hard,
    hard_labels,
    has_bfloat16_products,
)
from softlabels.errors import JobError
from softlabels.transfer_set import ArrayTransferSet
from softlabels_client.training.step import count_errors

torch.set_num_threads(1)


def blobs(rows: int = 600) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images of 6 x 6 in three classes: a bright patch in one of three corners over noise."""
    rng = np.random.Generator(np.random.PCG64(0))
    labels = rng.integers(0, 3, rows)
    images = rng.integers(0, 60, (rows, 6, 6)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        top, left = ((1, 1), (1, 3), (3, 1))[label]
        image[top : top + 2, left : left + 2] += 150
    return images, labels


def net(*, seed: int = 0) -> Mlp:
    """A small net with dropout, its weights by the seed."""
    torch.manual_seed(seed)
    return teacher_mlp(in_features=36, hidden=32, classes=3)


def trained(*, seed: int, max_norm: float | None = None) -> Mlp:
    """A small net after three epochs with dropout and jitter."""
    model = net()
    images, labels = blobs()
    fit_hard(
        model,
        images,
        labels,
        epochs=3,
        batch_size=50,
        learning_rate=0.1,
        seed=seed,
        augment=Jitter(1),
        max_norm=max_norm,
    )
    return model


class Counter:
    """Progress that counts."""

    def __init__(self) -> None:
        self.done, self.notes = 0, list[str]()

    def advance(self, amount: int = 1) -> None:
        """Count."""
        self.done += amount

    def note(self, text: str) -> None:
        """Keep."""
        self.notes.append(text)


class TestFitHard:
    def test_it_learns_what_can_be_learnt(self) -> None:
        """From chance to almost no errors."""
        images, labels = blobs()
        model = student_mlp(in_features=36, hidden=32, classes=3)
        fit_hard(model, images, labels, epochs=10, batch_size=50, learning_rate=0.1, seed=0)
        assert count_errors(model, ArrayTransferSet("blobs", images, labels=labels)) < 6

    def test_the_same_seed_gives_the_same_weights(self) -> None:
        """Shuffles, jitter and dropout all hang on it; another seed gives others."""
        first, second, other = trained(seed=1), trained(seed=1), trained(seed=2)
        for mine, same, different in zip(first.parameters(), second.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine, same)
            assert not torch.equal(mine, different)

    def test_the_global_generator_is_left_as_it_was(self) -> None:
        """A caller's own draws do not depend on whether a net was trained before."""
        model = net()
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        images, labels = blobs(50)
        fit_hard(model, images, labels, epochs=1, batch_size=50, learning_rate=0.1, seed=0)
        assert torch.equal(expected, torch.rand(3))

    def test_max_norm_holds_after_training(self) -> None:
        """No unit's incoming weights are longer than allowed."""
        for name, parameter in trained(seed=1, max_norm=0.5).named_parameters():
            if name.endswith("weight"):
                assert float(parameter.detach().norm(dim=1).max()) <= 0.5 + 1e-5

    def test_progress_hears_of_every_row(self) -> None:
        """A batch that is left over at the end of an epoch is not trained on, and not counted."""
        images, labels = blobs(230)
        counter = Counter()
        fit_hard(net(), images, labels, epochs=2, batch_size=50, learning_rate=0.1, seed=0, progress=counter)
        assert counter.done == 400
        assert counter.notes == ["epoch 1 of 2", "epoch 2 of 2"]

    def test_a_batch_larger_than_the_data_is_all_of_it(self) -> None:
        """Not an epoch of no steps."""
        images, labels = blobs(30)
        counter = Counter()
        fit_hard(net(), images, labels, epochs=1, batch_size=1_000, learning_rate=0.1, seed=0, progress=counter)
        assert counter.done == 30

    def test_no_epochs_change_nothing(self) -> None:
        """The model is as it was."""
        model = net()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        fit_hard(model, *blobs(), epochs=0, batch_size=50, learning_rate=0.1, seed=0)
        assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


class TestJitter:
    def test_each_image_moves_by_its_own_whole_pixels(self) -> None:
        """A single lit pixel in the middle lands within two pixels, on every one of the 25 places."""
        images = torch.zeros(2_000, 9, 9, dtype=torch.uint8)
        images[:, 4, 4] = 255
        moved = Jitter(2)(images, torch.Generator().manual_seed(0))
        assert moved.shape == images.shape
        assert moved.dtype == torch.uint8
        places = moved.nonzero()[:, 1:]
        assert len(places) == 2_000
        assert {tuple(place) for place in places.tolist()} == {(y, x) for y in range(2, 7) for x in range(2, 7)}

    def test_what_leaves_the_image_is_gone(self) -> None:
        """What comes in at the rim is 0, not the other side."""
        images = torch.zeros(500, 5, 5, dtype=torch.uint8)
        images[:, 0, 0] = 255
        moved = Jitter(2)(images, torch.Generator().manual_seed(0))
        assert set(moved.sum(dim=(1, 2), dtype=torch.int64).tolist()) == {0, 255}
        assert int(moved[:, 3:, :].sum()) == 0

    def test_no_pixels_move_nothing(self) -> None:
        """A rim of 0."""
        images = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8)
        assert torch.equal(images, Jitter(0)(images, torch.Generator()))


class TestConstrainIncomingWeights:
    def test_long_rows_are_cut_and_short_ones_left(self) -> None:
        """Directions stay; a row of zeros stays one."""
        linear = torch.nn.Linear(2, 3)
        linear.weight.data = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
        constrain_incoming_weights(linear, 1.0)
        torch.testing.assert_close(linear.weight.data, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


class TestHasBfloat16Products:
    def test_only_matrix_tiles_make_it_worth_while(self) -> None:
        """BF16 instructions without tiles were slower than float32, and emulation by far."""
        assert has_bfloat16_products({"amx_bf16": True, "avx512_bf16": True})
        assert not has_bfloat16_products({"amx_bf16": False, "avx512_bf16": True})
        assert not has_bfloat16_products({})

    def test_this_machine_can_be_asked(self) -> None:
        """Whatever it answers, training takes the answer."""
        with fast_arithmetic():
            assert torch.is_autocast_enabled("cpu") == has_bfloat16_products()


class TestHardLabels:
    def test_a_set_without_all_its_labels_is_refused(self) -> None:
        """It says how many are missing."""
        images, labels = blobs(10)
        whole = ArrayTransferSet("whole", images, labels=labels)
        np.testing.assert_array_equal(labels, hard_labels(whole))
        labels[3] = -1
        with pytest.raises(JobError, match="1 of 10 samples of 'part'"):
            hard_labels(ArrayTransferSet("part", images, labels=labels))
        with pytest.raises(JobError, match="10 of 10 samples of 'none'"):
            hard_labels(ArrayTransferSet("none", images))
