"""A student learns from soft targets: the loop, its settings, and what is kept of it."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_model
from torch import nn

import softlabels
from softlabels.errors import DivergenceError, FingerprintMismatchError, RequestError, ShapeMismatchError
from softlabels.losses import distillation_loss
from softlabels.transfer_set import ArrayTransferSet
from softlabels_client import CsvLog, DistillSettings, SoftTargetDataset, count_errors, distill, save_student
from softlabels_client.data.stream_dataset import has_store_order
from softlabels_client.training.step import make_optimizer, make_scheduler, measure_errors, one_cycle

SETTINGS = DistillSettings(epochs=3, batch_size=32, learning_rate=0.05, device="cpu")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Two cores are shared with servers and other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory, make_store: Any) -> tuple[Path, ArrayTransferSet]:
    """A store that can be learnt: 512 samples of 8 numbers, 4 classes, a linear teacher; three quarters unlabelled."""
    rng = np.random.default_rng(3)
    inputs = rng.normal(size=(512, 8)).astype(np.float32)
    logits_BC = (3 * inputs @ rng.normal(size=(8, 4))).astype(np.float32)
    labels = np.where(np.arange(512) % 4 == 0, logits_BC.argmax(axis=1), -1)
    data = ArrayTransferSet("lesson", inputs, labels=labels)
    return make_store(tmp_path_factory.mktemp("lessons") / "lesson", data, logits_BC), data


@pytest.fixture
def dataset(lesson: tuple[Path, ArrayTransferSet]) -> Iterator[SoftTargetDataset]:
    """The lesson, paired, at T = 2."""
    with softlabels.open(lesson[0]) as store:
        yield SoftTargetDataset(lesson[1], store)


def student(seed: int = 0, classes: int = 4) -> nn.Sequential:
    """A small net with dropout, its first weights by the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, classes))


def weights(model: nn.Module) -> torch.Tensor:
    """All of a student's weights in one row."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class TestDistill:
    def test_a_student_learns_what_the_teacher_knows(self, dataset: SoftTargetDataset) -> None:
        """Loss and divergence fall epoch by epoch, and it agrees with the teacher on samples without a label."""
        model, settings = student(), dataclasses.replace(SETTINGS, epochs=15)
        result = distill(model, dataset, settings)
        assert len(result.losses) == len(result.divergences) == 15
        assert result.losses[-1] < result.losses[0] / 1.5
        assert result.divergences[-1] < result.divergences[0] / 5
        assert result.errors == ()
        assert result.seconds > 0
        targets = dataset.store.batch(range(512)).p()
        model.eval()
        with torch.no_grad():
            guesses = model(torch.from_numpy(dataset.samples.take(np.arange(512)).inputs)).argmax(dim=1).numpy()
        assert (guesses == targets.argmax(axis=1)).mean() > 0.95

    def test_the_first_step_is_the_papers(self, dataset: SoftTargetDataset) -> None:
        """One step of plain SGD on the whole set is the gradient of T² × soft + weight × hard, nothing else."""
        settings = DistillSettings(
            epochs=1, batch_size=512, learning_rate=0.1, momentum=0, schedule="constant", hard_weight=0.3, device="cpu"
        )
        model, expected = student().eval(), student().eval()
        model[2] = expected[2] = nn.Identity()
        distill(model, dataset, settings)
        batch = dataset.__getitems__(range(512))
        distillation_loss(expected(batch.inputs), batch.targets, hard_weight=0.3).total.backward()
        with torch.no_grad():
            for parameter in expected.parameters():
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad
        torch.testing.assert_close(weights(model), weights(expected), atol=1e-6, rtol=1e-5)

    def test_the_seed_makes_it_repeatable(self, dataset: SoftTargetDataset) -> None:
        """Same arguments, same weights, whatever was drawn before; another seed, others."""
        models = [student() for _ in range(3)]
        distill(models[0], dataset, SETTINGS)
        torch.rand(7)
        distill(models[1], dataset, SETTINGS)
        distill(models[2], dataset, dataclasses.replace(SETTINGS, seed=1))
        assert torch.equal(weights(models[0]), weights(models[1]))
        assert not torch.equal(weights(models[0]), weights(models[2]))

    def test_near_far_and_workers_train_the_same_student(
        self, lesson: tuple[Path, ArrayTransferSet], serve: Any
    ) -> None:
        """To the bit: where rows come from and who fetches them changes nothing."""
        trained = []
        for where, workers in ((lesson[0], 0), (f"{serve(lesson[0])}/lesson", 0), (lesson[0], 2)):
            with softlabels.open(where) as store:
                model = student()
                distill(model, SoftTargetDataset(lesson[1], store), dataclasses.replace(SETTINGS, workers=workers))
                trained.append(weights(model))
        assert torch.equal(trained[0], trained[1])
        assert torch.equal(trained[0], trained[2])

    def test_torchs_global_draws_are_left_alone(self, dataset: SoftTargetDataset) -> None:
        """What the caller draws afterwards does not depend on the training."""
        torch.manual_seed(11)
        expected = torch.rand(4)
        torch.manual_seed(11)
        distill(student(), dataset, SETTINGS)
        assert torch.equal(torch.rand(4), expected)

    @pytest.mark.parametrize(
        "changes",
        [
            {"optimizer": "adamw", "learning_rate": 0.01},
            {"optimizer": "adam", "learning_rate": 0.01, "optimizer_args": {"betas": [0.8, 0.9]}},
            {"optimizer": "torch.optim:NAdam", "learning_rate": 0.01},
            {"schedule": "constant"},
            {"schedule": "cosine", "warm_up": 0.1},
            {"schedule": "step", "step_epochs": (2, 4), "step_factor": 0.5},
            {"precision": "bfloat16"},
            {"precision": "float16"},
            {"accumulate": 3},
            {"momentum": 0.0},
            {"weight_decay": 0.001},
            {"hard_weight": 0.0},
            {"batch_size": 1000},
        ],
        ids=str,
    )
    def test_every_choice_learns(self, dataset: SoftTargetDataset, changes: dict[str, Any]) -> None:
        """Each setting is one that works."""
        result = distill(student(), dataset, dataclasses.replace(SETTINGS, epochs=6, **changes))
        assert result.losses[-1] < result.losses[0]

    def test_evaluation_comes_after_each_epoch(self, dataset: SoftTargetDataset) -> None:
        """In eval mode, without gradients; training goes on in train mode."""
        seen = []

        def evaluate(model: nn.Module) -> float:
            seen.append((model.training, torch.is_grad_enabled()))
            return float(len(seen))

        model = student()
        assert distill(model, dataset, SETTINGS, evaluate=evaluate).errors == (1.0, 2.0, 3.0)
        assert seen == [(False, False)] * 3

    def test_progress_counts_every_row(self, dataset: SoftTargetDataset) -> None:
        """Three epochs of 512 samples, and a few words on each."""

        class Counting:
            def __init__(self) -> None:
                self.rows, self.notes = 0, list[str]()

            def advance(self, amount: int = 1) -> None:
                self.rows += amount

            def note(self, text: str) -> None:
                self.notes.append(text)

        progress = Counting()
        distill(student(), dataset, SETTINGS, evaluate=lambda model: 7, progress=progress)
        assert progress.rows == 3 * 512
        assert [note.partition(",")[0] for note in progress.notes] == [f"epoch {n} of 3" for n in (1, 2, 3)]
        assert progress.notes[-1].endswith("errors 7")

    def test_a_student_of_other_classes_is_refused(self, dataset: SoftTargetDataset) -> None:
        """The first batch says so, in words."""
        with pytest.raises(ShapeMismatchError, match="4 outputs"):
            distill(student(classes=5), dataset, SETTINGS)

    def test_a_training_that_diverges_ends(self, dataset: SoftTargetDataset) -> None:
        """A loss that is no number is no result."""
        with pytest.raises(DivergenceError, match="diverged"):
            distill(student(), dataset, dataclasses.replace(SETTINGS, learning_rate=1e30))

    def test_other_data_ends_it_before_the_first_step(self, dataset: SoftTargetDataset) -> None:
        """The student is as it was."""
        other = ArrayTransferSet("other", np.zeros((512, 8), np.float32))
        model = student()
        with pytest.raises(FingerprintMismatchError):
            distill(model, SoftTargetDataset(other, dataset.store), SETTINGS)
        assert torch.equal(weights(model), weights(student()))

    def test_a_device_that_is_none(self, dataset: SoftTargetDataset) -> None:
        """The names that work are listed."""
        with pytest.raises(RequestError, match="'auto', 'cpu'"):
            distill(student(), dataset, dataclasses.replace(SETTINGS, device="toaster"))


class TestMetrics:
    def test_accuracy_is_of_the_labelled_samples(self, dataset: SoftTargetDataset, tmp_path: Path) -> None:
        """In percent, per epoch; of the test set too where errors are counted; and the rate is positive."""
        settings = dataclasses.replace(SETTINGS, epochs=8)
        result = distill(
            student(),
            dataset,
            settings,
            evaluate=lambda model: measure_errors(model, dataset.samples),
            logs=[CsvLog(tmp_path / "log.csv")],
        )
        assert len(result.accuracies) == 8
        assert result.accuracies[0] is not None
        assert result.accuracies[-1] is not None
        assert result.accuracies[0] < result.accuracies[-1] <= 100
        assert result.test_samples == 128
        assert result.samples_per_second > 0
        rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
        assert [float(row["accuracy"]) for row in rows] == list(result.accuracies)
        assert float(rows[-1]["test_accuracy"]) == pytest.approx(100 * (1 - result.errors[-1] / 128))
        assert all(float(row["samples_per_second"]) > 0 for row in rows)

    def test_without_labels_there_is_no_accuracy(self, lesson: tuple[Path, ArrayTransferSet]) -> None:
        """None, rather than 0 or 100 percent."""
        data = ArrayTransferSet("lesson", lesson[1].inputs, labels=np.full(512, -1))
        with softlabels.open(lesson[0]) as store:
            assert distill(student(), SoftTargetDataset(data, store), SETTINGS).accuracies == (None,) * 3


class TestStreaming:
    def test_streams_and_requests_train_the_same_student(self, dataset: SoftTargetDataset) -> None:
        """To the bit; a subclass may fetch its batches in its own way, so it is not streamed."""

        class Requested(SoftTargetDataset):
            pass

        streamed, requested = student(), student()
        distill(streamed, dataset, SETTINGS)
        distill(requested, Requested(dataset.samples, dataset.store), SETTINGS)
        assert torch.equal(weights(streamed), weights(requested))

    def test_only_the_stores_samples_in_the_stores_order_are_streamed(
        self, lesson: tuple[Path, ArrayTransferSet], dataset: SoftTargetDataset
    ) -> None:
        """Others are requested, and train as well."""
        data, order = lesson[1], np.random.default_rng(0).permutation(512)
        assert data.labels is not None
        shuffled = ArrayTransferSet("lesson", data.inputs[order], labels=data.labels[order], ids=data.ids[order])
        part = ArrayTransferSet("lesson", data.inputs[:100], labels=data.labels[:100])
        assert has_store_order(dataset)
        for other in (shuffled, part):
            pairs = SoftTargetDataset(other, dataset.store)
            assert not has_store_order(pairs)
            assert distill(student(), pairs, SETTINGS).losses


class TestSchedules:
    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({}, [0, 0.5, 1, 0.5 * (1 + math.cos(math.pi / 8)), 0.5 * (1 + math.cos(math.pi / 4))]),
            ({"schedule": "cosine"}, [0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(5)]),
            (
                {"schedule": "cosine", "warm_up": 0.1},
                [0, 1, *(0.5 * (1 + math.cos(math.pi * n / 9)) for n in (1, 2, 3))],
            ),
            ({"schedule": "step", "step_epochs": (1, 2), "step_factor": 0.5}, [1, 1, 0.5, 0.5, 0.25]),
            ({"schedule": "constant", "warm_up": 0.3}, [0, 1 / 3, 2 / 3, 1, 1]),
        ],
        ids=str,
    )
    def test_rates_of_the_first_steps(self, changes: dict[str, Any], expected: list[float]) -> None:
        """5 epochs of 2 steps; a scheduler that is made in between continues at the same rates."""
        settings = DistillSettings(epochs=5, learning_rate=0.2, momentum=0, **changes)
        optimizer = make_optimizer(nn.Linear(2, 2), settings)
        scheduler = make_scheduler(optimizer, settings, steps_per_epoch=2)
        seen = []
        for _ in expected:
            seen.append(optimizer.param_groups[0]["lr"] / 0.2)
            scheduler.step()
        assert seen == pytest.approx(expected, abs=1e-12)
        make_scheduler(optimizer, settings, steps_per_epoch=2, done_steps=3)
        assert optimizer.param_groups[0]["lr"] / 0.2 == seen[3]


class TestOneCycle:
    def test_it_rises_then_falls_to_nothing(self) -> None:
        """From 0 over 1 after a fifth of the steps to 0."""
        assert [one_cycle(done) for done in (0.0, 0.1, 0.2)] == [0.0, 0.5, 1.0]
        assert one_cycle(0.6) == pytest.approx(0.5)
        assert one_cycle(1.0) == pytest.approx(0.0)


class TestDistillSettings:
    @pytest.mark.parametrize(
        "changes",
        [
            {"epochs": 0},
            {"epochs": 2.5},
            {"batch_size": 0},
            {"batch_size": True},
            {"workers": -1},
            {"seed": -1},
            {"learning_rate": 0},
            {"learning_rate": float("nan")},
            {"learning_rate": "0.1"},
            {"hard_weight": -0.1},
            {"hard_weight": float("inf")},
            {"momentum": 1.0},
            {"weight_decay": -1},
            {"optimizer": "adagrad"},
            {"schedule": "linear"},
            {"schedule": "step"},
            {"step_epochs": (2,)},
            {"step_epochs": (0,), "schedule": "step"},
            {"step_factor": -1},
            {"warm_up": 1.0},
            {"precision": "int8"},
            {"accumulate": 0},
            {"evaluate_every": 0},
            {"patience": 0},
            {"min_delta": -1},
            {"log_every": 0},
        ],
        ids=str,
    )
    def test_a_value_that_cannot_be_is_named(self, changes: dict[str, Any]) -> None:
        """Before anything is loaded or fetched."""
        with pytest.raises(RequestError, match=next(iter(changes))):
            DistillSettings(**changes)

    def test_they_are_frozen(self) -> None:
        """A run's settings are those it was started with."""
        with pytest.raises(dataclasses.FrozenInstanceError):
            SETTINGS.epochs = 5  # type: ignore[misc]


class TestCountErrors:
    def test_labelled_samples_are_counted(self, lesson: tuple[Path, ArrayTransferSet]) -> None:
        """Whatever the batch size; the student's mode stays."""
        model = student().train()
        data = lesson[1]
        assert data.labels is not None
        with torch.no_grad():
            guesses = model.eval()(torch.from_numpy(data.inputs)).argmax(dim=1).numpy()
        model.train()
        expected = int(((guesses != data.labels) & (data.labels >= 0)).sum())
        assert expected > 10
        assert [count_errors(model, data, batch_size=size) for size in (7, 512, 2000)] == [expected] * 3
        assert model.training

    def test_without_labels_there_is_nothing_to_count(self) -> None:
        """Zero errors would look like a perfect student."""
        with pytest.raises(RequestError, match="no sample of 'x'"):
            count_errors(student(), ArrayTransferSet("x", np.zeros((3, 8), np.float32)))


class TestSaveStudent:
    def test_weights_come_back(self, tmp_path: Path) -> None:
        """As safetensors, with the facts given."""
        path = tmp_path / "student.safetensors"
        save_student(student(1), path, metadata={"softlabels.store": "abc"})
        other = student(2)
        load_model(other, path)
        assert torch.equal(weights(other), weights(student(1)))
        with safe_open(path, "pt") as kept:
            assert kept.metadata()["softlabels.store"] == "abc"

    def test_tied_weights_are_kept_once(self, tmp_path: Path) -> None:
        """Shared tensors are no error."""
        model = student()
        model.add_module("tied", model[0])
        save_student(model, tmp_path / "tied.safetensors")
        assert (tmp_path / "tied.safetensors").stat().st_size < 4 * (8 * 32 + 32 + 32 * 4 + 4) + 2000

    def test_an_interrupted_write_leaves_what_was_there(self, tmp_path: Path) -> None:
        """The old student, and nothing half written beside it."""
        path = tmp_path / "student.safetensors"
        save_student(student(1), path)
        before = path.read_bytes()

        class Unsaveable(nn.Module):
            def state_dict(self, *args: Any, **kwargs: Any) -> Any:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            save_student(Unsaveable(), path)
        assert path.read_bytes() == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["student.safetensors"]

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        """The operating system's error, with the path."""
        with pytest.raises(Exception, match="missing"):
            save_student(student(), tmp_path / "missing" / "student.safetensors")
