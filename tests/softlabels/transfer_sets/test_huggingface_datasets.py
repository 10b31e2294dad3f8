"""Data sets of the Hugging Face library: from disk, from files, from the cache; columns of images and of numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.errors import BadIdsError, DataUnavailableError, JobError, ShapeMismatchError, UnreadableSampleError
from softlabels.transfer_set import TransferSet
from softlabels.transfer_sets import load_transfer_set

hf: Any = pytest.importorskip("datasets", reason="the datasets library is not installed")
Image: Any = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf.disable_progress_bars()
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    # As HF_DATASETS_OFFLINE=1 does where it is set before the libraries are imported.
    monkeypatch.setattr(hf.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def load(base: Path, **arguments: Any) -> TransferSet:
    """The transfer set of the data set that was saved as `saved`."""
    return load_transfer_set("huggingface", {"path": "saved", **arguments}, base=base)


def everything(data: TransferSet) -> Any:
    """All samples."""
    return data.take(np.arange(len(data)))


def images(*sizes: tuple[int, int]) -> list[Any]:
    """Random images of these heights and widths."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


class TestColumns:
    def test_numbers_keep_their_type(self, tmp_path: Path) -> None:
        """Nested lists and fixed arrays become arrays of the type that the table has, not another one."""
        features = hf.Features(
            {
                "x": hf.Array2D(shape=(2, 3), dtype="uint8"),
                "y": hf.Sequence(hf.Sequence(hf.Value("float16"))),
                "z": hf.Value("int32"),
            }
        )
        rows = {"x": np.arange(30, dtype=np.uint8).reshape(5, 2, 3), "y": [[[1.5, 2.0]]] * 5, "z": list(range(5))}
        hf.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
        found = {name: everything(load(tmp_path, input=name)).inputs for name in "xyz"}
        assert [array.dtype for array in found.values()] == [np.uint8, np.float16, np.int32]
        np.testing.assert_array_equal(found["x"], rows["x"])
        assert (found["y"].shape, found["z"].tolist()) == ((5, 1, 2), list(range(5)))

    def test_images_of_several_sizes(self, tmp_path: Path) -> None:
        """Brought to one, as those in folders are; named by id where they are not."""
        hf.Dataset.from_dict({"who": ["a", "b"], "photo": images((9, 8), (8, 9))}).save_to_disk(str(tmp_path / "saved"))
        assert everything(load(tmp_path, id="who", size=6)).inputs.shape == (2, 3, 6, 6)
        with pytest.raises(ShapeMismatchError, match="'a' and 'b'"):
            everything(load(tmp_path, id="who"))

    def test_labels_by_name_or_not_at_all(self, tmp_path: Path) -> None:
        """`label` and `labels` are taken, another by name; class labels are numbers already."""
        features = hf.Features(
            {"x": hf.Value("float32"), "labels": hf.ClassLabel(names=["no", "yes"]), "t": hf.Value("string")}
        )
        rows = {"x": [1.0, 2.0, 3.0], "labels": ["yes", "no", "yes"], "t": ["a", "b", "c"]}
        hf.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
        assert everything(load(tmp_path, input="x")).labels.tolist() == [1, 0, 1]
        assert everything(load(tmp_path, input="x", label="none")).labels is None
        with pytest.raises(JobError, match="not integers"):
            everything(load(tmp_path, input="x", label="t"))

    def test_columns_that_are_not_there(self, tmp_path: Path) -> None:
        """With those that are."""
        hf.Dataset.from_dict({"x": [1.0], "text": ["a"]}).save_to_disk(str(tmp_path / "saved"))
        with pytest.raises(JobError, match="no column of images: name the `input` among x, text"):
            load(tmp_path)
        with pytest.raises(JobError, match="no column 'pixels': it has x, text"):
            load(tmp_path, input="pixels")
        with pytest.raises(JobError, match="neither numbers nor images"):
            everything(load(tmp_path, input="text"))


class TestSources:
    def test_splits(self, tmp_path: Path) -> None:
        """Several have to be chosen from."""
        parts = {name: hf.Dataset.from_dict({"x": [float(n)]}) for n, name in enumerate(("train", "test"))}
        hf.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
        assert everything(load(tmp_path, split="test", input="x")).inputs.tolist() == [1.0]
        with pytest.raises(JobError, match="splits train, test"):
            load(tmp_path, input="x")
        with pytest.raises(JobError, match="no split 'valid'"):
            load(tmp_path, input="x", split="valid")

    def test_files_through_the_librarys_own_readers(self, tmp_path: Path) -> None:
        """Parquet and Arrow files named by `data_files`, relative to the job."""
        made = hf.Dataset.from_dict({"x": [[1.0, 2.0], [3.0, 4.0]], "label": [1, None]})
        made.to_parquet(str(tmp_path / "rows.parquet"))
        data = load(tmp_path, path="parquet", data_files="rows.parquet", split="train", input="x")
        assert everything(data).inputs.tolist() == [[1.0, 2.0], [3.0, 4.0]]
        assert everything(data).labels.tolist() == [1, -1]
        assert data.name == "parquet-train"

    def test_a_name_that_is_not_in_the_cache(self, tmp_path: Path) -> None:
        """Without a network that is the end of it."""
        with pytest.raises(DataUnavailableError, match="'nobody/nothing' cannot be loaded"):
            load(tmp_path, path="nobody/nothing", split="train")

    def test_the_identity_is_the_same_in_another_process(self, tmp_path: Path) -> None:
        """A job that goes on elsewhere compares equal."""
        hf.Dataset.from_dict({"x": [1.0, 2.0]}).save_to_disk(str(tmp_path / "saved"))
        code = (
            "from pathlib import Path; from softlabels.transfer_sets import load_transfer_set as load;"
            f"print(list(load('huggingface', dict(path='saved', input='x'), base=Path({str(tmp_path)!r})).identity()))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
        assert done.stdout.strip() == str(list(load(tmp_path, input="x").identity()))  # type: ignore[attr-defined]


class TestRefusals:
    def test_an_id_that_stands_twice(self, tmp_path: Path) -> None:
        """It is named before anything is computed."""
        hf.Dataset.from_dict({"x": [1.0] * 4, "key": ["a", "b", "c", "b"]}).save_to_disk(str(tmp_path / "saved"))
        with pytest.raises(BadIdsError, match="'b' occurs twice"):
            load(tmp_path, input="x", id="key")

    def test_a_corrupt_image_is_named_by_its_id(self, tmp_path: Path) -> None:
        """And so is a row without one."""
        rows: list[Any] = [{"bytes": b"\xff\xd8 nonsense", "path": None}, None]
        features = hf.Features({"key": hf.Value("string"), "image": hf.Image(decode=False)})
        made = hf.Dataset.from_dict({"key": ["good-2", "bad-1"], "image": rows}, features=features)
        made.save_to_disk(str(tmp_path / "saved"))
        data = load(tmp_path, id="key", input="image")
        with pytest.raises(UnreadableSampleError, match="good-2"):
            data.take(np.array([0]))
        with pytest.raises(UnreadableSampleError, match="'bad-1' has no input"):
            data.take(np.array([1]))

    def test_an_empty_one(self, tmp_path: Path) -> None:
        """There is nothing to compute."""
        hf.Dataset.from_dict({"x": []}).save_to_disk(str(tmp_path / "saved"))
        with pytest.raises(DataUnavailableError, match="'saved' cannot be loaded"):
            load(tmp_path, input="x")
