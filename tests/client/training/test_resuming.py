"""A training that was broken off goes on as if nothing had happened: to the bit, whatever it keeps and draws."""

from __future__ import annotations

import csv
import dataclasses
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import softlabels
from softlabels.errors import (
    CheckpointMismatchError,
    ChecksumError,
    ConflictError,
    FormatVersionError,
    ManifestError,
    ReferenceLoadError,
    RequestError,
)
from softlabels.precompute import load_job, precompute
from softlabels.references import load_reference
from softlabels.transfer_set import ArrayTransferSet
from softlabels_client import DistillSettings, SoftTargetDataset, ViewDataset, distill, save_student
from softlabels_client.training.checkpoint import CheckpointFolder, pack, read_checkpoint, unpack
from softlabels_client.training.trainer import DistillResult
from softlabels_client.training.training_log import CsvLog, PairRecord, target_digest

SETTINGS = DistillSettings(epochs=3, batch_size=32, learning_rate=0.05, device="cpu")
SAMPLES = 300


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums of several threads are not the same to the bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory, make_store: Any) -> tuple[Path, ArrayTransferSet]:
    """300 samples of 8 numbers, 4 classes, a linear teacher."""
    rng = np.random.default_rng(3)
    inputs = rng.normal(size=(SAMPLES, 8)).astype(np.float32)
    logits_BC = (3 * inputs @ rng.normal(size=(8, 4))).astype(np.float32)
    data = ArrayTransferSet("lesson", inputs, labels=logits_BC.argmax(axis=1))
    return make_store(tmp_path_factory.mktemp("lessons") / "lesson", data, logits_BC), data


@pytest.fixture
def dataset(lesson: tuple[Path, ArrayTransferSet]) -> Iterator[SoftTargetDataset]:
    """The lesson, paired."""
    with softlabels.open(lesson[0]) as store:
        yield SoftTargetDataset(lesson[1], store)


class Forgetful(nn.Module):
    """Everything that could get lost: draws of torch, NumPy and Python, running means, a buffer nobody keeps."""

    visits: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)
        self.register_buffer("visits", torch.zeros(()), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """logits_BC; the mode of every kind of draw decides over them."""
        hidden = nn.functional.dropout(self.norm(self.first(inputs)).relu(), 0.2, self.training)
        if self.training:
            self.visits += 1
            hidden = hidden * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()) + self.visits / 1000)
        logits_BC: Tensor = self.last(hidden)
        return logits_BC


def student(kind: type[nn.Module] = Forgetful) -> nn.Module:
    """A student with the same first weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind()


def weights(model: nn.Module) -> Tensor:
    """All of a student's state in one row."""
    return torch.cat([value.detach().double().flatten() for value in model.state_dict().values()])


def rows_of(path: Path) -> list[dict[str, str]]:
    """A CSV file's rows."""
    return list(csv.DictReader(path.read_text().splitlines()))


def assert_same_state(one: Path, other: Path) -> None:
    """The newest checkpoints of two folders hold the same: optimiser, scaler, generators, place; all but the time."""
    kept = [CheckpointFolder(folder, resume=True).newest() for folder in (one, other)]
    for state in kept:
        del state["state"]["seconds"]
    (document, tensors), (expected, expected_tensors) = map(pack, kept)
    assert document == expected
    assert all(torch.equal(tensor, expected_tensors[name]) for name, tensor in tensors.items())


class BrokenOffError(Exception):
    """The process is gone."""


class Fuse:
    """Progress that ends the process once so many samples were learnt."""

    def __init__(self, samples: float) -> None:
        self.left = samples

    def advance(self, amount: int = 1) -> None:
        """Count; end."""
        self.left -= amount
        if self.left <= 0:
            raise BrokenOffError

    def note(self, text: str) -> None:
        """Nothing to show."""


def margin(model: nn.Module) -> float:
    """An evaluation that goes up and down."""
    return float(weights(model).sum() * 1000 % 7)


CHOICES: list[dict[str, Any]] = [
    {},
    {"momentum": 0.0, "schedule": "constant"},
    {"optimizer": "adamw", "learning_rate": 0.01, "precision": "bfloat16", "max_gradient_norm": 0.5},
    {"optimizer": "adam", "learning_rate": 0.01, "precision": "float16", "accumulate": 3},
    {"optimizer": "torch.optim:NAdam", "learning_rate": 0.01, "schedule": "cosine", "warm_up": 0.3},
    {"schedule": "step", "step_epochs": (1, 2), "batch_size": 7, "accumulate": 4},
    {"keep_best": True, "evaluate_every": 4},
    {"patience": 3, "evaluate_every": 2, "epochs": 9},
]


class TestResuming:
    @pytest.mark.parametrize("changes", CHOICES, ids=str)
    def test_a_training_broken_off_thrice_gives_the_same_student(
        self, dataset: SoftTargetDataset, tmp_path: Path, changes: dict[str, Any]
    ) -> None:
        """Weights to the bit, every epoch's figures, the log and the record, whatever was drawn in between."""
        settings = dataclasses.replace(SETTINGS, log_every=2, **changes)
        evaluate = margin if settings.keep_best or settings.patience else None

        def run(name: str, fuse: float) -> tuple[nn.Module, DistillResult]:
            model = student()
            folder = CheckpointFolder(tmp_path / name, every=2, resume=True)
            logs = [CsvLog(tmp_path / f"{name}.csv")]
            record = PairRecord(tmp_path / f"{name}.pairs")
            result = distill(
                model,
                dataset,
                settings,
                evaluate=evaluate,
                progress=Fuse(fuse),
                checkpoints=folder,
                logs=logs,
                record=record,
            )
            return model, result

        straight, expected = run("straight", float("inf"))
        learnt = int((tmp_path / "straight.pairs").read_text().count("\n")) - 1
        for number in (0.3, 0.1, 0.35):
            with pytest.raises(BrokenOffError):
                run("broken", number * learnt)
            torch.rand(3), random.random(), np.random.rand()
        resumed, result = run("broken", float("inf"))
        assert torch.equal(weights(resumed), weights(straight))
        assert isinstance(resumed.visits, Tensor)
        assert result.resumed_at
        same = ("losses", "divergences", "accuracies", "errors", "final_errors", "steps", "stopped_early")
        assert {name: getattr(result, name) for name in same} == {name: getattr(expected, name) for name in same}
        assert (tmp_path / "broken.pairs").read_text() == (tmp_path / "straight.pairs").read_text()
        assert_same_state(tmp_path / "broken", tmp_path / "straight")
        logged = [rows_of(tmp_path / f"{name}.csv") for name in ("straight", "broken")]
        for row in (*logged[0], *logged[1]):
            del row["seconds"], row["samples_per_second"]
        assert logged[0] == logged[1]

    def test_checkpoints_change_nothing(self, dataset: SoftTargetDataset, tmp_path: Path) -> None:
        """A training that keeps them gives the weights of one that does not, and draws of the caller are left alone."""
        kept, plain = student(), student()
        torch.manual_seed(5)
        distill(kept, dataset, SETTINGS, checkpoints=CheckpointFolder(tmp_path / "kept"))
        after = torch.rand(3)
        torch.manual_seed(5)
        distill(plain, dataset, SETTINGS)
        assert torch.equal(weights(kept), weights(plain))
        assert torch.equal(torch.rand(3), after)

    def test_other_workers_may_take_it_up(self, dataset: SoftTargetDataset, tmp_path: Path) -> None:
        """Who fetches is not part of what is learnt."""
        straight, broken = student(), student()
        distill(straight, dataset, SETTINGS)
        checkpoints = CheckpointFolder(tmp_path / "c", every=1)
        with pytest.raises(BrokenOffError):
            distill(broken, dataset, SETTINGS, progress=Fuse(400), checkpoints=checkpoints)
        again = dataclasses.replace(SETTINGS, workers=2)
        resumed = student()
        distill(resumed, dataset, again, checkpoints=CheckpointFolder(tmp_path / "c", resume=True))
        assert torch.equal(weights(resumed), weights(straight))

    def test_a_checkpoint_of_format_1_is_resumed(
        self, dataset: SoftTargetDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It has no sums for the accuracy, and the loader's state in it is not needed."""
        straight, resumed = student(), student()
        expected = distill(straight, dataset, SETTINGS)
        folder = CheckpointFolder(tmp_path / "c", every=1)
        with pytest.raises(BrokenOffError):
            distill(student(), dataset, SETTINGS, progress=Fuse(400), checkpoints=folder)
        path = folder.path / f"step-{folder.steps[-1]:012}.safetensors"
        saved = folder.newest()
        for name in ("sums", "logged_sums"):
            saved["state"][name] = saved["state"][name][:2].clone()
        del saved["state"]["accuracies"], saved["state"]["test_samples"]
        with monkeypatch.context() as patched:
            patched.setattr("softlabels_client.training.checkpoint.FORMAT", "softlabels-checkpoint/1")
            folder.write(folder.steps[-1], saved | {"place": {"format": "softlabels-place/1"}})
        with safe_open(path, "pt") as file:
            assert file.metadata()["softlabels.checkpoint"] == "softlabels-checkpoint/1"
        result = distill(resumed, dataset, SETTINGS, checkpoints=CheckpointFolder(folder.path, resume=True))
        assert torch.equal(weights(resumed), weights(straight))
        assert result.losses == expected.losses
        assert result.accuracies[0] is None

    def test_a_finished_training_is_not_learnt_again(self, dataset: SoftTargetDataset, tmp_path: Path) -> None:
        """It gives its student and its figures, whatever became of the file of weights."""
        first, second = student(), student()
        expected = distill(first, dataset, SETTINGS, checkpoints=CheckpointFolder(tmp_path / "c"))
        folder = CheckpointFolder(tmp_path / "c", resume=True)
        result = distill(second, dataset, SETTINGS, progress=Fuse(1), checkpoints=folder)
        assert torch.equal(weights(second), weights(first))
        assert result.losses == expected.losses
        assert result.resumed_at == expected.steps

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"learning_rate": 0.06}, "learning_rate is 0.05 there and 0.06 here"),
            ({"seed": 1}, "seed is 0 there and 1 here"),
            ({"epochs": 4, "batch_size": 16}, "epochs is 3 there and 4 here; batch_size"),
            ({"loss_args": {"soft_weight": 0.5}}, "loss_args"),
        ],
        ids=str,
    )
    def test_other_settings_are_refused(
        self, dataset: SoftTargetDataset, tmp_path: Path, changes: dict[str, Any], words: str
    ) -> None:
        """What differs is named, and the student is as it was."""
        distill(student(), dataset, SETTINGS, checkpoints=CheckpointFolder(tmp_path / "c"))
        model = student()
        before = weights(model)
        with pytest.raises(CheckpointMismatchError, match=words):
            distill(
                model,
                dataset,
                dataclasses.replace(SETTINGS, **changes),
                checkpoints=CheckpointFolder(tmp_path / "c", resume=True),
            )
        assert torch.equal(weights(model), before)

    def test_another_student_is_refused(self, dataset: SoftTargetDataset, tmp_path: Path) -> None:
        """By its modules, which tell rates of dropout too, and by the shapes of its weights."""
        distill(
            nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.1)),
            dataset,
            SETTINGS,
            checkpoints=CheckpointFolder(tmp_path / "c"),
        )
        for model, words in (
            (nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.2)), r"the student is \(1\): Dropout\(p=0.1"),
            (nn.Sequential(nn.Linear(8, 4, bias=False), nn.Dropout(0.1)), "weights '0.bias'"),
        ):
            with pytest.raises(CheckpointMismatchError, match=words):
                distill(model, dataset, SETTINGS, checkpoints=CheckpointFolder(tmp_path / "c", resume=True))

    def test_other_targets_are_refused(
        self, lesson: tuple[Path, ArrayTransferSet], dataset: SoftTargetDataset, tmp_path: Path, make_store: Any
    ) -> None:
        """Another store, another temperature, other samples."""
        distill(student(), dataset, SETTINGS, checkpoints=CheckpointFolder(tmp_path / "c"))
        logits_BC = np.random.default_rng(9).normal(size=(SAMPLES, 4)).astype(np.float32)
        some = ArrayTransferSet("lesson", lesson[1].inputs[:200])
        with softlabels.open(make_store(tmp_path / "lesson", lesson[1], logits_BC)) as store:
            for other, words in (
                (SoftTargetDataset(lesson[1], store), "store is"),
                (SoftTargetDataset(lesson[1], dataset.store, temperature=3), "temperature is 2.0 there and 3"),
                (SoftTargetDataset(some, dataset.store), "samples is 300 there and 200 here"),
            ):
                with pytest.raises(CheckpointMismatchError, match=words):
                    distill(student(), other, SETTINGS, checkpoints=CheckpointFolder(tmp_path / "c", resume=True))


PARTS = """
import numpy as np
import torch
from softlabels.transfer_set import ArrayTransferSet

def pictures():
    return ArrayTransferSet("pictures", np.random.default_rng(0).integers(0, 256, (50, 6, 6), dtype=np.uint8))

def crop():
    def one(sample, generator):
        top, left = torch.randint(0, 3, (2,), generator=generator).tolist()
        return sample[top : top + 4, left : left + 4].float() / 255
    return one

def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4))
"""

JOB = """
[store]
path = "store"
[transfer_set]
source = "parts.py:pictures"
[targets]
temperature = 2
[views]
count = 3
transform = "parts.py:crop"
[[teachers]]
model = "parts.py:net"
"""


class TestViews:
    def test_a_training_on_views_goes_on_with_the_same_view(self, tmp_path: Path) -> None:
        """Each epoch shows another view; broken off in the second, it goes on with the second's."""
        (tmp_path / "parts.py").write_text(PARTS)
        (tmp_path / "job.toml").write_text(JOB)
        precompute(load_job(tmp_path / "job.toml"))
        inputs = load_reference("parts.py:pictures", base=tmp_path)()
        settings = dataclasses.replace(SETTINGS, batch_size=10)

        def run(fuse: float, folder: CheckpointFolder | None) -> Tensor:
            model = student(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 4)))  # type: ignore[arg-type]
            with softlabels.open(tmp_path / "store") as store:
                views = ViewDataset(inputs, store, base=tmp_path, check="always")
                distill(model, views, settings, progress=Fuse(fuse), checkpoints=folder)
            return weights(model)

        expected = run(float("inf"), None)
        with pytest.raises(BrokenOffError):
            run(75, CheckpointFolder(tmp_path / "c", every=1))
        assert torch.equal(run(float("inf"), CheckpointFolder(tmp_path / "c", resume=True)), expected)


class TestCheckpointFolder:
    def test_the_last_few_are_kept(self, tmp_path: Path) -> None:
        """Whole files, by step; what a killed writer left is cleared away."""
        folder = CheckpointFolder(tmp_path / "c", keep=2)
        for step in (5, 10, 15):
            folder.write(step, {"a": torch.full((3,), step)})
        assert folder.steps == [10, 15]
        (tmp_path / "c" / ".step-000000000020.safetensors.7.part").write_bytes(b"half")
        again = CheckpointFolder(tmp_path / "c", resume=True)
        assert torch.equal(again.newest()["a"], torch.full((3,), 15))
        assert sorted(path.name[-24:] for path in (tmp_path / "c").iterdir()) == [
            "000000000010.safetensors",
            "000000000015.safetensors",
        ]

    def test_others_checkpoints_are_not_written_over(self, tmp_path: Path) -> None:
        """Unless somebody says that the training is to be resumed."""
        CheckpointFolder(tmp_path / "c").write(1, {})
        with pytest.raises(ConflictError, match="step 1"):
            CheckpointFolder(tmp_path / "c")

    def test_an_interrupted_write_leaves_what_was_there(self, tmp_path: Path) -> None:
        """Nothing of the new one, all of the old ones."""
        folder = CheckpointFolder(tmp_path / "c")
        folder.write(1, {"a": torch.ones(2)})
        with pytest.raises(RequestError, match="state/b/0 is a set"):
            folder.write(2, {"a": torch.ones(2), "b": [{1}]})
        assert folder.steps == [1]
        assert len(list((tmp_path / "c").iterdir())) == 1

    def test_any_tool_reads_the_weights(self, dataset: SoftTargetDataset, tmp_path: Path) -> None:
        """A checkpoint is a safetensors file with the student's weights by their names."""
        model = student()
        distill(model, dataset, SETTINGS, checkpoints=CheckpointFolder(tmp_path / "c"))
        (path,) = sorted((tmp_path / "c").iterdir())[-1:]
        with safe_open(path, "pt") as file:
            assert torch.equal(file.get_tensor("state/student/first.weight"), model.state_dict()["first.weight"])

    def test_damage_is_found(self, tmp_path: Path) -> None:
        """One bit anywhere, a cut, another form: each an error that says what to do, and never a wrong state."""
        folder = CheckpointFolder(tmp_path / "c")
        path = folder.write(1, {"a": torch.arange(64.0), "b": {3: (1.5, None, "x", True)}})
        whole = path.read_bytes()
        rng = np.random.default_rng(0)
        for position in rng.integers(8, len(whole), 60).tolist():
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
            with pytest.raises((ChecksumError, ManifestError, FormatVersionError), match="step-000000000001"):
                read_checkpoint(path)
        for size in (0, 7, 40, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(ManifestError, match="remove it"):
                read_checkpoint(path)
        save_student(nn.Linear(2, 2), path)
        with pytest.raises(FormatVersionError, match="softlabels-checkpoint/3"):
            read_checkpoint(path)

    def test_run_and_step_are_part_of_the_checksum(self, tmp_path: Path) -> None:
        """Neither can be another one's, nor can bytes follow the file's end."""
        folder = CheckpointFolder(tmp_path / "c")
        folder.run = "0123456789abcdef" * 2
        path = folder.write(12, {"a": torch.arange(4.0)})
        whole = path.read_bytes()
        for old, new in ((b'"step":"12"', b'"step":"13"'), (b"0123456789abcdef", b"0123456789abcdee")):
            assert old in whole
            path.write_bytes(whole.replace(old, new, 1))
            with pytest.raises(ChecksumError, match="step-000000000012"):
                read_checkpoint(path)
        path.write_bytes(whole + b"\0")
        with pytest.raises(ManifestError, match="step-000000000012"):
            read_checkpoint(path)

    def test_a_file_that_changes_after_it_was_read(self, tmp_path: Path) -> None:
        """The state is in memory of its own, and neither changed nor cut with its file."""
        folder = CheckpointFolder(tmp_path / "c")
        path = folder.write(1, {"a": torch.arange(1 << 16)})
        state = folder.newest()
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(b"\xff" * 4096)
            file.truncate()
        assert torch.equal(state["a"], torch.arange(1 << 16))

    def test_an_older_checkpoint_under_a_newer_name(self, dataset: SoftTargetDataset, tmp_path: Path) -> None:
        """Replayed from a copy: its own step says so, and removing it resumes from the one before."""
        straight, resumed = student(), student()
        distill(straight, dataset, SETTINGS)
        folder = CheckpointFolder(tmp_path / "c", every=1)
        with pytest.raises(BrokenOffError):
            distill(student(), dataset, SETTINGS, progress=Fuse(400), checkpoints=folder)
        paths = sorted((tmp_path / "c").iterdir())
        shutil.copyfile(paths[0], paths[-1])
        with pytest.raises(CheckpointMismatchError, match=f"of step {folder.steps[0]}, under the name of another"):
            distill(student(), dataset, SETTINGS, checkpoints=CheckpointFolder(folder.path, resume=True))
        paths[-1].unlink()
        distill(resumed, dataset, SETTINGS, checkpoints=CheckpointFolder(folder.path, resume=True))
        assert torch.equal(weights(resumed), weights(straight))

    def test_a_checkpoint_of_another_run(self, dataset: SoftTargetDataset, tmp_path: Path) -> None:
        """The same arguments and other first weights: what lies among another run's checkpoints is refused."""
        runs = []
        for name, first_weights in (("mine", 0), ("theirs", 1)):
            folder, model = CheckpointFolder(tmp_path / name, every=1), student()
            with torch.no_grad():
                next(model.parameters()).add_(first_weights)
            with pytest.raises(BrokenOffError):
                distill(model, dataset, SETTINGS, progress=Fuse(400), checkpoints=folder)
            runs.append(folder)
        mine, theirs = (folder.path / f"step-{folder.steps[-1]:012}.safetensors" for folder in runs)
        whole = mine.read_bytes()
        shutil.copyfile(theirs, mine)
        with pytest.raises(CheckpointMismatchError, match="began with different weights"):
            distill(student(), dataset, SETTINGS, checkpoints=CheckpointFolder(tmp_path / "mine", resume=True))
        mine.write_bytes(whole)
        distill(student(), dataset, SETTINGS, checkpoints=CheckpointFolder(tmp_path / "mine", resume=True))

    @pytest.mark.parametrize("numbers", [{"every": 0}, {"keep": 0}, {"keep": True}], ids=str)
    def test_numbers_that_cannot_be(self, tmp_path: Path, numbers: dict[str, Any]) -> None:
        """At once, not after the first epoch."""
        with pytest.raises(RequestError, match=next(iter(numbers))):
            CheckpointFolder(tmp_path / "c", **numbers)

    def test_a_folder_without_a_parent(self, tmp_path: Path) -> None:
        """Probably a misspelling."""
        with pytest.raises(RequestError, match="make it first"):
            CheckpointFolder(tmp_path / "no" / "c")


class TestTrees:
    def test_everything_comes_back_as_it_was(self) -> None:
        """Floats to the bit, tuples as tuples, whole numbers as keys, tensors of every type and shape."""
        tree = {
            "floats": [0.1, 1e-310, float("inf"), -0.0],
            3: (1, (None, True), {}, []),
            "tensors": [torch.ones((), dtype=torch.bfloat16), torch.zeros(0, 3), torch.arange(6).view(2, 3).t()],
        }
        document, tensors = pack(tree)
        back = unpack(document, tensors)
        assert back["floats"] == tree["floats"]
        assert str(back["floats"][3]) == "-0.0"
        assert back[3] == tree[3]
        for found, expected in zip(back["tensors"], tree["tensors"], strict=True):
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)

    def test_what_is_packed_stays_as_it_was(self) -> None:
        """The training goes on while it is written."""
        value = torch.ones(3)
        document, tensors = pack({"value": value})
        value += 1
        assert torch.equal(unpack(document, tensors)["value"], torch.ones(3))


class TestPairRecord:
    def test_every_sample_of_every_epoch_with_its_own_target(self, dataset: SoftTargetDataset, tmp_path: Path) -> None:
        """Once an epoch, in another order each, and the digest is of the row that the store has for it."""
        distill(student(), dataset, SETTINGS, record=PairRecord(tmp_path / "pairs.csv"))
        rows = rows_of(tmp_path / "pairs.csv")
        own = dataset.store.batch(range(SAMPLES)).logits()
        orders = []
        for epoch in ("1", "2", "3"):
            ids = [int(row["id"]) for row in rows if row["epoch"] == epoch]
            assert sorted(ids) == list(range(SAMPLES))
            orders.append(ids)
        assert orders[0] != orders[1] != orders[2]
        assert all(row["target"] == target_digest(own[int(row["id"])].tobytes()) for row in rows)


class TestAccumulation:
    def test_batches_of_one_step_are_one_large_batch(self, dataset: SoftTargetDataset) -> None:
        """Three of 32 rows are as one of 96, the odd rest at an epoch's end included."""
        large, parts = student(lambda: nn.Linear(8, 4)), student(lambda: nn.Linear(8, 4))  # type: ignore[arg-type]
        distill(large, dataset, dataclasses.replace(SETTINGS, batch_size=96))
        result = distill(parts, dataset, dataclasses.replace(SETTINGS, accumulate=3))
        assert result.steps == 3 * 4
        torch.testing.assert_close(weights(parts), weights(large), atol=1e-6, rtol=1e-5)


class TestStopping:
    def test_it_ends_when_nothing_improves_and_keeps_the_best(self, dataset: SoftTargetDataset) -> None:
        """After `patience` evaluations without a fall of more than `min_delta`; the student has its best weights."""
        figures, seen = iter([9.0, 5.0, 4.9, 5.0, 5.2, 1.0]), []

        def evaluate(model: nn.Module) -> float:
            seen.append(weights(model))
            return next(figures)

        model = student()
        settings = dataclasses.replace(SETTINGS, epochs=20, patience=3, min_delta=0.2)
        result = distill(model, dataset, settings, evaluate=evaluate)
        assert result.errors == (9.0, 5.0, 4.9, 5.0, 5.2)
        assert result.stopped_early
        assert result.final_errors == 5.0
        assert torch.equal(weights(model), seen[1])

    def test_the_best_weights_without_stopping(self, dataset: SoftTargetDataset) -> None:
        """`keep_best` alone goes on to the end."""
        figures = iter([3.0, 1.0, 2.0])
        result = distill(
            student(), dataset, dataclasses.replace(SETTINGS, keep_best=True), evaluate=lambda model: next(figures)
        )
        assert (result.errors, result.final_errors, result.stopped_early) == ((3.0, 1.0, 2.0), 1.0, False)

    def test_evaluations_by_steps_include_the_last(self, dataset: SoftTargetDataset) -> None:
        """10 steps an epoch, 30 in all: after 8, 16, 24 and 30."""
        result = distill(
            student(), dataset, dataclasses.replace(SETTINGS, evaluate_every=8), evaluate=lambda model: 1.0
        )
        assert len(result.errors) == 4

    @pytest.mark.parametrize("changes", [{"patience": 1}, {"keep_best": True}, {"evaluate_every": 1}], ids=str)
    def test_without_an_evaluation_there_is_nothing_to_stop_by(
        self, dataset: SoftTargetDataset, changes: dict[str, Any]
    ) -> None:
        """Said before the first step."""
        with pytest.raises(RequestError, match="evaluate"):
            distill(student(), dataset, dataclasses.replace(SETTINGS, **changes))

    def test_an_evaluation_that_is_no_number(self, dataset: SoftTargetDataset) -> None:
        """NaN is never better and never worse: patience would be blind."""
        with pytest.raises(RequestError, match="NaN"):
            distill(student(), dataset, SETTINGS, evaluate=lambda model: float("nan"))


class TestOptimisersByReference:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"optimizer": "torch.optim:Nadam"}, "Nadam"),
            ({"optimizer": "torch.nn:Identity"}, "not a torch.optim.Optimizer"),
            ({"optimizer_args": {"nesterof": True}}, "nesterof"),
        ],
        ids=str,
    )
    def test_what_makes_none_is_named(self, dataset: SoftTargetDataset, changes: dict[str, Any], words: str) -> None:
        """Before the first step."""
        with pytest.raises(ReferenceLoadError, match=words):
            distill(student(), dataset, dataclasses.replace(SETTINGS, **changes))
