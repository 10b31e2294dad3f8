"""Images in folders: which are found, how they are decoded and cut, where labels come from, what is refused."""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.errors import BadIdsError, DataUnavailableError, JobError, ShapeMismatchError, UnreadableSampleError
from softlabels.transfer_set import TransferSet
from softlabels.transfer_sets import load_transfer_set

Image: Any = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Random pixels."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def folder(base: Path, **arguments: Any) -> TransferSet:
    """The transfer set of the folder `pics`."""
    return load_transfer_set("image_folder", {"path": "pics", **arguments}, base=base)


def keep(base: Path, name: str, pixels: np.ndarray, **how: Any) -> None:
    """Save an image below `pics`."""
    path = base / "pics" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **how)


def everything(data: TransferSet) -> Any:
    """All samples."""
    return data.take(np.arange(len(data)))


class TestDecoding:
    def test_layout_and_mode(self, tmp_path: Path) -> None:
        """Channels first or last; grey has a channel axis too; pixels are those of the file."""
        keep(tmp_path, "a.png", noise(5, 7, 3))
        np.testing.assert_array_equal(everything(folder(tmp_path)).inputs[0], noise(5, 7, 3).transpose(2, 0, 1))
        np.testing.assert_array_equal(everything(folder(tmp_path, layout="hwc")).inputs[0], noise(5, 7, 3))
        grey = np.asarray(Image.fromarray(noise(5, 7, 3)).convert("L"))
        np.testing.assert_array_equal(everything(folder(tmp_path, mode="L")).inputs, grey[None, None])

    def test_resize_and_cut_are_pillows(self, tmp_path: Path) -> None:
        """The shorter side becomes `resize`, then the middle is cut out: as one would by hand."""
        keep(tmp_path, "wide.png", noise(40, 61, 3))
        keep(tmp_path, "tall.png", noise(61, 40, 3, seed=1))
        samples = everything(folder(tmp_path, size=[16, 20], resize=24))
        assert samples.inputs.shape == (2, 3, 16, 20)
        by_hand = Image.open(tmp_path / "pics/wide.png").resize((36, 24), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(samples.inputs[1].transpose(1, 2, 0), np.asarray(by_hand.crop((8, 4, 28, 20))))

    @pytest.mark.parametrize("shape", [(40, 61), (61, 40), (9, 9), (3, 50)])
    def test_a_size_alone_covers_the_cut(self, tmp_path: Path, shape: tuple[int, int]) -> None:
        """Images of any size are scaled just so that the cut is filled, small ones up."""
        keep(tmp_path, "a.png", np.full((*shape, 3), 200, dtype=np.uint8))
        inputs = everything(folder(tmp_path, size=12)).inputs
        assert inputs.shape == (1, 3, 12, 12)
        assert np.unique(inputs).tolist() == [200]  # nothing was filled up with black

    def test_palettes_and_transparency(self, tmp_path: Path) -> None:
        """Images that are no plain RGB become it, without a warning."""
        keep(tmp_path, "alpha.png", noise(6, 6, 4))
        keep(tmp_path, "grey.png", noise(6, 6))
        palette = Image.fromarray(noise(6, 6, 3)).quantize(8)
        palette.save(tmp_path / "pics" / "palette.png", transparency=b"\x00\x80")
        assert everything(folder(tmp_path)).inputs.shape == (3, 3, 6, 6)

    def test_threads_change_nothing(self, tmp_path: Path) -> None:
        """One thread or many: the same bytes in the same order."""
        for number in range(20):
            keep(tmp_path, f"{number}.jpg", noise(30, 31, 3, seed=number))
        one, many = (everything(folder(tmp_path, size=16, threads=threads)) for threads in (1, 5))
        np.testing.assert_array_equal(one.inputs, many.inputs)
        assert one.ids.tolist() == many.ids.tolist()


class TestFinding:
    def test_what_is_no_image_is_left_out(self, tmp_path: Path) -> None:
        """Other files and hidden ones; folders are listed to their end, in an order that does not change."""
        for name in ("b/2.png", "a/deep/1.JPG", "c.webp"):
            keep(tmp_path, name, noise(4, 4, 3))
        for name in (".hidden.png", "b/.git.png", "b/notes.txt", "Thumbs.db"):
            (tmp_path / "pics" / name).write_bytes(b"x")
        assert everything(folder(tmp_path)).ids.tolist() == ["c.webp", "a/deep/1.JPG", "b/2.png"]

    def test_names_beyond_ascii(self, tmp_path: Path) -> None:
        """Ids are UTF-8; their width is counted in bytes."""
        keep(tmp_path, "größe/äöü.png", noise(4, 4, 3))
        data = folder(tmp_path)
        assert everything(data).ids.tolist() == ["größe/äöü.png"]
        assert data.id_spec().width_bytes == len("größe/äöü.png".encode())  # type: ignore[attr-defined]

    def test_a_name_that_is_no_text_is_refused(self, tmp_path: Path) -> None:
        """A file name that is no UTF-8 cannot be an id."""
        keep(tmp_path, "a.png", noise(4, 4, 3))
        (tmp_path / "pics" / "a.png").rename(tmp_path / "pics" / "\udcff.png")
        with pytest.raises(BadIdsError, match="rename it"):
            folder(tmp_path)

    @pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
    def test_no_image_is_an_error(self, tmp_path: Path, make: Any) -> None:
        """No folder, or one without images."""
        make(tmp_path / "pics")
        with pytest.raises(DataUnavailableError, match="pics"):
            folder(tmp_path)


class TestLabels:
    def _images(self, base: Path) -> None:
        for name in ("b/1.png", "a/1.png", "a/2.png", "free.png"):
            keep(base, name, noise(4, 4, 3))

    def test_folders_are_classes_in_sorted_order(self, tmp_path: Path) -> None:
        """Images beside the folders are unlabelled."""
        self._images(tmp_path)
        assert everything(folder(tmp_path)).labels.tolist() == [-1, 0, 0, 1]

    def test_classes_may_come_in_the_teachers_order(self, tmp_path: Path) -> None:
        """And some of them may have no image; a folder that is none of them is refused."""
        self._images(tmp_path)
        assert everything(folder(tmp_path, classes=["x", "b", "a"])).labels.tolist() == [-1, 2, 2, 1]
        with pytest.raises(JobError, match="'b' is none of the `classes`"):
            folder(tmp_path, classes=["a"])

    def test_a_flat_folder_has_no_labels(self, tmp_path: Path) -> None:
        """Nor one whose labels are not wanted."""
        keep(tmp_path, "1.png", noise(4, 4, 3))
        assert everything(folder(tmp_path)).labels is None
        self._images(tmp_path)
        assert everything(folder(tmp_path, labels="none")).labels is None

    def test_a_table_labels_some(self, tmp_path: Path) -> None:
        """Named with or without extension; an empty cell and a missing line are unlabelled; counted from one."""
        self._images(tmp_path)
        (tmp_path / "labels.csv").write_text("\ufefffile,label,who\na/1.png,3,x\nfree,1,y\nb/1,,z\n", encoding="utf-8")
        data = folder(tmp_path, labels="labels.csv", first_label=1)
        assert dict(zip(everything(data).ids.tolist(), everything(data).labels.tolist(), strict=True)) == {
            "a/1.png": 2,
            "a/2.png": -1,
            "b/1.png": -1,
            "free.png": 0,
        }

    @pytest.mark.parametrize(
        ("lines", "arguments", "words"),
        [
            ("file,label\nnowhere.png,1\n", {}, "line 2: there is no image 'nowhere.png'"),
            ("file,label\nfree.png,cat\n", {}, "'cat' is not an integer"),
            ("file,label\nfree.png,cat\n", {"classes": ["dog"]}, "'cat' is none of the `classes`"),
            ("file,label\nfree.png,0\n", {"first_label": 1}, "is below `first_label`"),
            ("file,label\nfree.png,0\n", {"label_column": "class"}, "has no column 'class': it has file, label"),
            ("", {}, "has no column"),
        ],
    )
    def test_a_table_that_does_not_fit_is_refused(
        self, tmp_path: Path, lines: str, arguments: dict[str, Any], words: str
    ) -> None:
        """With its file, line and what it should have."""
        self._images(tmp_path)
        (tmp_path / "labels.csv").write_text(lines)
        with pytest.raises(JobError, match=words):
            folder(tmp_path, labels="labels.csv", **arguments)


class TestRefusals:
    @pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"text", lambda b: b[:20]])
    @pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp"])
    def test_a_corrupt_image_is_named(self, tmp_path: Path, name: str, damage: Any) -> None:
        """Cut in the middle, empty, or no image at all: never grey pixels, always an error with its name."""
        keep(tmp_path, "whole.png", noise(32, 32, 3))
        keep(tmp_path, name, noise(32, 32, 3))
        path = tmp_path / "pics" / name
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(UnreadableSampleError, match=name) as caught:
            everything(folder(tmp_path, size=8))
        assert caught.value.context["sample"] == name

    def test_more_than_eight_bits_are_refused(self, tmp_path: Path) -> None:
        """They would be cut to eight without a sign."""
        keep(tmp_path, "deep.png", np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
        with pytest.raises(UnreadableSampleError, match="more than 8 bits"):
            everything(folder(tmp_path))

    def test_several_sizes_need_a_size(self, tmp_path: Path) -> None:
        """The message names two files and the argument."""
        keep(tmp_path, "a.png", noise(4, 4, 3))
        keep(tmp_path, "b.png", noise(4, 5, 3))
        with pytest.raises(ShapeMismatchError, match=r"'a\.png' and 'b\.png'.*`size`"):
            everything(folder(tmp_path))

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"size": 0}, "at .size"),
            ({"size": [3]}, "at .size"),
            ({"size": "224"}, "expected .int | array | null"),
            ({"size": True}, "expected .int | array | null"),
            ({"resize": 20}, "needs a `size`"),
            ({"size": 24, "resize": 20}, "no larger"),
            ({"mode": "CMYK"}, "it must be one of"),
            ({"layout": "nhwc"}, "it must be one of"),
            ({"threads": 0}, "at .threads."),
        ],
    )
    def test_arguments_that_cannot_be(self, tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
        """Each is refused before an image is read."""
        keep(tmp_path, "a.png", noise(4, 4, 3))
        with pytest.raises(JobError, match=words):
            folder(tmp_path, **arguments)


@pytest.mark.needs_data
class TestPhotographs:
    def test_real_photographs_and_their_table(self, data_dir: Path, tmp_path: Path) -> None:
        """Fifty real JPEGs with labels that count from one: ids, labels and pixels are those of the data set."""
        if not (data_dir / "photographs" / "images.zip").is_file():
            pytest.skip("no photographs in the data folder")
        with zipfile.ZipFile(data_dir / "photographs" / "images.zip") as archive:
            names = sorted(name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg", ".png")))[:50]
            for name in names:
                (tmp_path / "pics").mkdir(exist_ok=True)
                (tmp_path / "pics" / Path(name).name).write_bytes(archive.read(name))
        with (data_dir / "photographs" / "dev_dataset.csv").open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if list((tmp_path / "pics").glob(f"{row['ImageId']}.*"))]
        with (tmp_path / "labels.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, fieldnames=list(kept[0]))
            table.writeheader()
            table.writerows(kept)
        named = {"labels": "labels.csv", "file_column": "ImageId", "label_column": "TrueLabel", "first_label": 1}
        samples = everything(folder(tmp_path, size=224, resize=256, **named))
        labels = {row["ImageId"]: int(row["TrueLabel"]) - 1 for row in kept}
        assert samples.inputs.shape == (50, 3, 224, 224)
        assert [labels[name.partition(".")[0]] for name in samples.ids.tolist()] == samples.labels.tolist()
