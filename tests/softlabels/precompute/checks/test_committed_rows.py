"""A store is continued, united and published with the data and the teachers that it was begun with, and no others."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from softlabels.cli import main
from softlabels.errors import ConflictError, JobError, TeacherChangedError, TransferSetChangedError
from softlabels.manifest import IdSpec
from softlabels.precompute import load_job, precompute, resume, teacher_from_module
from softlabels.precompute.checks.committed_rows import ask_about_stores
from softlabels.precompute.checks.data_snapshot import PLANNED_SAMPLES, PlannedSamples, planned_sha256
from softlabels.store.copies import merge
from softlabels.store.store_documents import load_plan
from softlabels.transfer_set import ArrayTransferSet

SAMPLES, FEATURES, CLASSES = 400, 6, 5

PARTS = """
import numpy as np
import torch

class Held(torch.nn.Module):
    # Weights as a plain array, which `state_dict` does not have.
    def __init__(self, file="own.npy"):
        super().__init__()
        self.w = np.load(file)

    def forward(self, x):
        return x @ torch.from_numpy(self.w).T

class Lazy(torch.nn.Module):
    # Nothing of the weights is in the module at all.
    def forward(self, x):
        return x @ torch.from_numpy(np.load("own.npy")).T

class Sure(Lazy):
    # One class is certain at T = 1, and another teacher is as certain of it.
    def forward(self, x):
        return 3 * super().forward(x) + 60 * torch.nn.functional.one_hot((x[:, 0] > 0).long(), 5)
"""

JOB = """
[store]
path = "store"
name = "t"
rows_per_shard = 100
rows_per_chunk = 10
{store}

[transfer_set]
source = "npy"
arguments = {{ inputs = "inputs.npy", labels = "labels.npy" }}

[targets]
temperature = 4.0
encoding = "f16"

[[teachers]]
model = "parts.py:{teacher}"
{arguments}

[run]
batch_size = 50
device = "cpu"
"""

Begun = Callable[..., Path]


def write_data(folder: Path, *, seed: int = 0) -> None:
    """Inputs and labels of one size and time, whatever the seed."""
    rng = np.random.default_rng([seed, 1])
    np.save(folder / "inputs.npy", rng.normal(size=(SAMPLES, FEATURES)).astype(np.float32))
    np.save(folder / "labels.npy", rng.integers(0, CLASSES, SAMPLES))
    keep_times(folder)


def write_weights(folder: Path, *, seed: int = 0) -> None:
    """The teacher's own file."""
    np.save(folder / "own.npy", np.random.default_rng([seed, 2]).normal(size=(CLASSES, FEATURES)).astype(np.float32))


def keep_times(folder: Path) -> None:
    """As a copy that preserves times leaves them."""
    for path in (folder / "inputs.npy", folder / "labels.npy"):
        os.utime(path, ns=(10**18, 10**18))


def drop(store: Path, *shards: int) -> None:
    """Take shards away, and what a finished store has."""
    for shard in shards:
        (store / "ledger" / f"{shard:08d}.json").unlink()
    (store / "manifest.json").unlink(missing_ok=True)


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Begun:
    """A job whose last two shards of four are not computed; returns its folder."""

    def make(teacher: str = "Lazy", *, arguments: str = "", store: str = "", name: str = "here") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        write_data(folder)
        write_weights(folder)
        (folder / "parts.py").write_text(PARTS)
        (folder / "job.toml").write_text(JOB.format(teacher=teacher, arguments=arguments, store=store))
        precompute(load_job(folder / "job.toml"))
        drop(folder / "store", 2, 3)
        return folder

    return make


class TestData:
    def test_data_of_the_same_size_and_time_are_found_out(self, begun: Begun) -> None:
        """By the digest of ids and contents in the plan, before a row is computed."""
        folder = begun()
        write_data(folder, seed=1)
        with pytest.raises(TransferSetChangedError, match="is not the one that the store was begun with"):
            resume(folder / "store")
        assert len(os.listdir(folder / "store" / "ledger")) == 2
        write_data(folder)
        assert resume(folder / "store").finished

    def test_samples_that_the_digest_does_not_cover(self, begun: Begun) -> None:
        """Committed rows have the fingerprints of what they were computed from."""
        folder = begun()
        inputs = np.load(folder / "inputs.npy")
        planned = np.unique(np.linspace(0, SAMPLES - 1, PLANNED_SAMPLES).astype(np.int64))
        inputs[np.setdiff1d(np.arange(SAMPLES), planned)] += 1
        np.save(folder / "inputs.npy", inputs)
        keep_times(folder)
        with pytest.raises(TransferSetChangedError, match="were computed from other samples"):
            resume(folder / "store")

    def test_other_labels_are_found_out(self, begun: Begun) -> None:
        """A store whose labels are of two versions would train a student on both."""
        folder = begun()
        np.save(folder / "labels.npy", (np.load(folder / "labels.npy") + 1) % CLASSES)
        keep_times(folder)
        with pytest.raises(TransferSetChangedError):
            resume(folder / "store")

    def test_a_change_during_the_run_keeps_the_store_from_being_published(self, begun: Begun) -> None:
        """What was computed before and after the change is not one data set."""
        folder = begun()

        def change(total: int, description: str, unit: str, **more: object) -> object:
            from softlabels.progress import silent

            with (folder / "inputs.npy").open("r+b") as file:
                file.seek(-400 * FEATURES, os.SEEK_END)
                file.write(np.ones(100 * FEATURES, dtype=np.float32).tobytes())
            keep_times(folder)
            return silent(total, description, unit)

        with pytest.raises(TransferSetChangedError, match=r"sample 3.. at position 3.. is not what it was"):
            precompute(load_job(folder / "job.toml"), show=change)  # type: ignore[arg-type]
        assert not (folder / "store" / "manifest.json").exists()
        assert not (folder / "store" / "ledger" / "00000003.json").exists(), "no row of the changed data is committed"

    def test_the_digest_is_of_ids_labels_and_contents(self) -> None:
        """Whatever the source is called, and however ids are cut into blocks."""
        x = np.arange(300.0).reshape(100, 3)

        def digest(ids: np.ndarray, inputs: np.ndarray = x, labels: np.ndarray | None = None) -> str:
            spec = IdSpec(kind="str", width_bytes=9) if ids.dtype.kind == "U" else IdSpec(kind="int")
            data = ArrayTransferSet("x", inputs, ids=ids, labels=labels)
            return planned_sha256(data, spec, PlannedSamples(data))

        names = np.array([f"s{n}" for n in range(100)])
        swapped = names.copy()
        swapped[[50, 51]] = swapped[[51, 50]]  # neither is among the samples that are read
        found = [
            digest(names),
            digest(swapped),
            digest(np.arange(100) * 3),
            digest(names, x + (np.arange(100) == 99)[:, None]),
            digest(names, x.astype(np.float32)),
            digest(names, labels=np.zeros(100, dtype=np.int64)),
            digest(names, labels=np.ones(100, dtype=np.int64)),
        ]
        assert len(set(found)) == len(found)
        assert digest(names) == found[0]


class TestTeachers:
    @pytest.mark.parametrize("teacher", ["Held", "Lazy", "Sure"])
    def test_a_teacher_that_loads_its_own_file(self, begun: Begun, teacher: str) -> None:
        """By its digest where the weights are in the module, else by what it answers now."""
        folder = begun(teacher)
        plan = load_plan(folder / "store")
        write_weights(folder, seed=1)
        with pytest.raises(
            TeacherChangedError, match="state_sha256" if teacher == "Held" else "asked again about rows"
        ):
            resume(folder / "store")
        assert len(os.listdir(folder / "store" / "ledger")) == 2
        write_weights(folder)
        assert resume(folder / "store").finished
        assert load_plan(folder / "store") == plan

    def test_a_file_named_in_the_arguments(self, begun: Begun) -> None:
        """Its bytes are part of the teacher's identity."""
        folder = begun("Held", arguments='arguments = { file = "own.npy" }')
        first = load_plan(folder / "store").teachers[0].state_sha256
        shutil.copy(folder / "own.npy", folder / "copy.npy")
        (folder / "own.npy").write_bytes((folder / "own.npy").read_bytes() + b"\0")
        with pytest.raises(TeacherChangedError, match="another state_sha256"):
            resume(folder / "store")
        shutil.copy(folder / "copy.npy", folder / "own.npy")
        assert resume(folder / "store").teachers[0].state_sha256 == first

    def test_a_change_during_the_run_keeps_the_store_from_being_published(self, begun: Begun) -> None:
        """The last look is after the last shard."""
        folder = begun("Lazy")

        def change(total: int, description: str, unit: str, **more: object) -> object:
            from softlabels.progress import silent

            write_weights(folder, seed=1)
            return silent(total, description, unit)

        with pytest.raises(TeacherChangedError, match="asked again about rows"):
            precompute(load_job(folder / "job.toml"), show=change)  # type: ignore[arg-type]
        assert not (folder / "store" / "manifest.json").exists()

    def test_other_code_under_the_same_name(self, begun: Begun) -> None:
        """The message says what differs."""
        folder = begun("Held")
        text = (folder / "parts.py").read_text()
        (folder / "parts.py").write_text(
            text.replace("return x @ torch.from_numpy(self.w).T", "return x @ torch.from_numpy(self.w).T + 0")
        )
        with pytest.raises(TeacherChangedError, match="another code_sha256") as caught:
            resume_elsewhere(folder)
        assert caught.value.context["differs"] == ["code_sha256"]

    def test_modules_of_this_process_have_a_digest_too(self) -> None:
        """Of weights, plain tensors and arrays, and of a preprocessing that is a module."""

        class Plain(nn.Module):
            def __init__(self, value: float, array: float = 0.0) -> None:
                super().__init__()
                self.scale, self.table = torch.tensor([value]), np.array([array], dtype=">f4")

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * self.scale

        def digest(model: nn.Module, preprocess: nn.Module | None = None) -> str | None:
            return teacher_from_module(model, name="t", preprocess=preprocess).spec.state_sha256

        found = [
            digest(Plain(1)),
            digest(Plain(2)),
            digest(Plain(1, 1)),
            digest(Plain(1), Plain(1)),
            digest(Plain(1), Plain(2)),
        ]
        assert len(set(found)) == 5
        assert digest(Plain(1)) == found[0]


def resume_elsewhere(folder: Path) -> None:
    """Resume as another process would: the user's module is read again."""
    for name in [name for name in sys.modules if name.startswith("softlabels_user_parts")]:
        del sys.modules[name]
    resume(folder / "store")


class TestMerge:
    @pytest.fixture
    def machines(self, begun: Begun, tmp_path: Path) -> tuple[Path, Path]:
        """Two folders, each with half of a store and the data and the teacher's file that it was made from."""
        first = begun("Lazy", name="a")
        second = tmp_path / "b"
        shutil.copytree(first, second)
        precompute(load_job(second / "job.toml"))
        drop(second / "store", 0, 1)
        return first, second

    def test_halves_of_one_store_are_united(self, machines: tuple[Path, Path], tmp_path: Path) -> None:
        """With the data and the teachers at hand."""
        assert main(["merge", *(str(folder / "store") for folder in machines), str(tmp_path / "all")]) == 0

    def test_other_data_under_one_name(self, begun: Begun, tmp_path: Path) -> None:
        """Two machines with other data have two plans."""
        first = begun(name="a")
        second = tmp_path / "b"
        second.mkdir()
        for name in ("parts.py", "own.npy", "job.toml"):
            shutil.copy(first / name, second / name)
        write_data(second, seed=1)
        precompute(load_job(second / "job.toml"))
        drop(second / "store", 0, 1)
        with pytest.raises(ConflictError, match=r"transfer_set\.planned_sha256"):
            merge([first / "store", second / "store"], tmp_path / "all")
        with pytest.raises(TransferSetChangedError):
            ask_about_stores([first / "store", second / "store"])
        assert not (tmp_path / "all").exists()

    def test_another_teacher_on_one_machine(
        self,
        machines: tuple[Path, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """Its plan is the same: only its answers tell."""
        first, second = machines
        shutil.rmtree(second / "store")
        write_weights(second, seed=1)
        monkeypatch.chdir(second)
        precompute(load_job(second / "job.toml"))
        drop(second / "store", 0, 1)
        monkeypatch.chdir(first)
        folders = [str(first / "store"), str(second / "store"), str(tmp_path / "all")]
        assert main(["merge", *folders]) == 1
        assert "[teacher-changed]" in capsys.readouterr().err
        assert not (tmp_path / "all").exists()

    def test_where_the_job_cannot_be_loaded(
        self, machines: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The refusal names the flag that merges without teachers."""
        for folder in machines:
            (folder / "inputs.npy").unlink()
        folders = [*(str(folder / "store") for folder in machines), str(tmp_path / "all")]
        assert main(["merge", *folders]) == 1
        assert "--without-teachers" in capsys.readouterr().err
        assert not (tmp_path / "all").exists()
        assert main(["merge", *folders, "--without-teachers"]) == 0

    def test_one_machine_that_has_them_is_enough(self, machines: tuple[Path, Path], tmp_path: Path) -> None:
        """Whichever source it is."""
        (machines[0] / "inputs.npy").unlink()
        with pytest.raises(JobError, match="cannot be asked"):
            ask_about_stores([machines[0] / "store"])
        ask_about_stores([folder / "store" for folder in machines])
