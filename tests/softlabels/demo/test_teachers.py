"""How a teacher comes to be, on the digits that come with scikit-learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from softlabels.data.digits import load_digits
from softlabels.demo.nets import teacher_mlp
from softlabels.demo.teachers import TeacherSchedule, TrainedTeacher, train_teacher
from softlabels_client.training.step import count_errors

pytest.importorskip("sklearn", reason="scikit-learn, which bundles the digits, is not installed")
torch.set_num_threads(1)

SHORT = TeacherSchedule(epochs=10, batch_size=64, jitter_pixels=1)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> TrainedTeacher:
    """A teacher trained for a second."""
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
