"""Teachers that order their classes differently are brought into the store's order by name, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import softlabels
from softlabels.class_list import MAX_NAMED_BYTES, make_class_list
from softlabels.errors import ClassListMismatchError, JobError, TeacherShapeError
from softlabels.precompute import load_job, precompute
from softlabels.precompute.teachers.class_alignment import read_class_list

NAMES = ["ant", "bee", "cat", "dog", "eel"]
TURNED = ["eel", "cat", "ant", "dog", "bee"]

MODULE = """
import numpy as np
import torch
from softlabels.transfer_set import ArrayTransferSet

def rows():
    return ArrayTransferSet("rows", np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32))

def linear(classes=5):
    return torch.nn.Linear(6, classes)
"""


def write_job(folder: Path, *teachers: str, classes: str = "") -> Path:
    """A job of linear teachers over 40 rows."""
    text = '[store]\npath = "store"\n[transfer_set]\nsource = "parts.py:rows"\n'
    text += f'[targets]\ntemperature = 2\nencoding = "f32"\n{classes}\n'
    (folder / "job.toml").write_text(
        text + "".join(f'[[teachers]]\nmodel = "parts.py:linear"\n{t}\n' for t in teachers)
    )
    (folder / "parts.py").write_text(MODULE)
    return folder / "job.toml"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same network twice: its classes in the order of NAMES, and of TURNED."""
    torch.manual_seed(0)
    weight, bias = torch.randn(5, 6), torch.randn(5)
    save_file({"weight": weight, "bias": bias}, tmp_path / "a.safetensors")
    order = [NAMES.index(name) for name in TURNED]
    save_file({"weight": weight[order].clone(), "bias": bias[order].clone()}, tmp_path / "b.safetensors")
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")
    (tmp_path / "turned.json").write_text(json.dumps(TURNED))
    return tmp_path


A = 'weights = "a.safetensors"\nclasses = "names.txt"'
B = 'weights = "b.safetensors"\nclasses = "turned.json"'


class TestOrder:
    @pytest.mark.parametrize("keep", ["mean", "members"])
    def test_turned_classes_are_turned_back(self, folder: Path, keep: str) -> None:
        """The mean of a network with itself in another order is the network."""
        precompute(load_job(write_job(folder, A, B, classes=f'classes = "names.txt"\nkeep = "{keep}"')))
        alone = folder / "alone"
        alone.mkdir()
        save_file(_weights(folder / "a.safetensors"), alone / "a.safetensors")
        precompute(load_job(write_job(alone, 'weights = "a.safetensors"')))
        with softlabels.open(folder / "store") as store, softlabels.open(alone / "store") as single:
            np.testing.assert_allclose(store.batch(range(40)).p(), single.batch(range(40)).p(), atol=1e-6)
            assert store.manifest.class_list == make_class_list(NAMES)
            assert [teacher.class_list_sha256 for teacher in store.manifest.teachers] == [
                make_class_list(NAMES).sha256,
                make_class_list(TURNED).sha256,
            ]

    def test_the_first_teachers_order_is_the_stores(self, folder: Path) -> None:
        """Unless the job names another; a store without any list keeps none."""
        precompute(load_job(write_job(folder, B, A)))
        with softlabels.open(folder / "store") as store:
            assert store.manifest.class_list == make_class_list(TURNED)

    def test_hidden_states_follow_the_order(self, folder: Path) -> None:
        """A head's rows are turned as its logits are."""
        from softlabels.precompute.planning.prepared_job import load_teachers

        teachers = load_teachers(load_job(write_job(folder, A, B)), torch.device("cpu"))
        assert teachers[1].order_C is not None
        whole = torch.nn.Sequential(teachers[1].model).eval()
        turned = teachers[1].__class__(**{**vars(teachers[1]), "model": whole, "last_layer": teachers[1].model})
        rows = torch.randn(3, 6)
        torch.testing.assert_close(turned.head().logits(turned.hidden(rows)), turned.logits(rows))
        torch.testing.assert_close(turned.head().weight_CD, teachers[0].model.get_parameter("weight"))


class TestRefusals:
    @pytest.mark.parametrize(
        ("names", "words"),
        [
            (["ant", "bee", "cat", "dog", "emu"], "lacks 'eel' and has 'emu' besides"),
            (["ant", "bee", "cat", "dog"], "lacks 'eel'"),
            ([*NAMES, "fox"], "has 'fox' besides"),
            (["ant", "bee", "cat", "ant", "eel"], "'ant' more than once"),
            (["ant", "", "cat", "dog", "eel"], "no name for class 1"),
            ([], "no name for class 0"),
        ],
    )
    def test_other_classes_are_named(self, folder: Path, names: list[str], words: str) -> None:
        """Those that lack, those that are too many, and those that stand twice."""
        (folder / "turned.json").write_text(json.dumps(names))
        with pytest.raises(JobError, match=words):
            precompute(load_job(write_job(folder, A, B)))

    def test_some_have_a_list_and_some_have_none(self, folder: Path) -> None:
        """Nobody can tell whether their columns are the same."""
        with pytest.raises(JobError, match="'teacher 1' does not"):
            precompute(load_job(write_job(folder, A, 'weights = "b.safetensors"')))

    def test_a_list_of_another_length_than_the_logits(self, folder: Path) -> None:
        """It belongs to another model."""
        (folder / "names.txt").write_text("\n".join(NAMES[:4]))
        with pytest.raises(TeacherShapeError, match="5 logits a row and names 4"):
            precompute(load_job(write_job(folder, A)))

    def test_members_of_different_class_counts(self, folder: Path) -> None:
        """Without lists, both are named."""
        job = write_job(folder, 'weights = "a.safetensors"\nname = "small"', 'arguments = {classes = 7}\nname = "big"')
        with pytest.raises(TeacherShapeError, match=r"small\): \[\d+, 5\].*big\): \[\d+, 7\]"):
            precompute(load_job(job))

    @pytest.mark.parametrize("text", ["{", "5", '{"0": "ant", "2": "bee"}', "[1, 2]"])
    def test_files_that_are_no_list(self, tmp_path: Path, text: str) -> None:
        """A plain error."""
        (tmp_path / "names.json").write_text(text)
        with pytest.raises(JobError, match="cannot be read"):
            read_class_list(tmp_path / "names.json", label="teacher 0")

    def test_a_model_that_does_not_name_its_classes(self, folder: Path) -> None:
        """`classes = "model"` wants one that does."""
        with pytest.raises(JobError, match="does not name its classes"):
            precompute(load_job(write_job(folder, 'weights = "a.safetensors"\nclasses = "model"')))


class TestStudents:
    def test_another_class_list_is_an_error(self, folder: Path) -> None:
        """It says which class is the first that differs."""
        precompute(load_job(write_job(folder, A)))
        with softlabels.open(folder / "store") as store:
            store.require(class_names=NAMES)
            with pytest.raises(ClassListMismatchError, match="number 0, 'ant' there and 'eel' here"):
                store.require(class_names=TURNED)
            with pytest.raises(ClassListMismatchError, match="has 5, not 4"):
                store.require(class_names=NAMES[:4])

    def test_a_store_without_names(self, folder: Path) -> None:
        """It cannot be compared, which is an error too."""
        precompute(load_job(write_job(folder, 'weights = "a.safetensors"')))
        with (
            softlabels.open(folder / "store") as store,
            pytest.raises(ClassListMismatchError, match="has no class names"),
        ):
            store.require(class_names=NAMES)

    def test_a_long_list_is_kept_as_a_digest(self) -> None:
        """Then the first that differs cannot be named, but that one differs is known."""
        from softlabels.class_list import check_class_names

        names = [f"state {number}" for number in range(MAX_NAMED_BYTES // 8)]
        kept = make_class_list(names)
        assert kept.names is None
        check_class_names(kept, names, store="speech")
        with pytest.raises(ClassListMismatchError, match="digest alone"):
            check_class_names(kept, names[::-1], store="speech")


def _weights(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)
