"""Webdataset tars: random access by an index of headers, ids where keys repeat, labels, and tars that are no use."""

from __future__ import annotations

import gc
import gzip
import io
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.errors import BadIdsError, DataUnavailableError, JobError, ShapeMismatchError, UnreadableSampleError
from softlabels.transfer_set import TransferSet
from softlabels.transfer_sets import load_transfer_set

wds: Any = pytest.importorskip("webdataset", reason="webdataset is not installed")
pytest.importorskip("PIL.Image", reason="Pillow is not installed")


def vector(number: int) -> np.ndarray:
    """A sample's numbers."""
    return np.arange(4, dtype=np.float32) + 10 * number


def tar(path: Path, samples: list[dict[str, Any]]) -> None:
    """A tar as the library writes it."""
    with wds.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)


def members(path: Path, files: list[tuple[str, bytes]]) -> None:
    """A tar of just these members."""
    with tarfile.open(path, "w") as archive:
        for name, contents in files:
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            archive.addfile(info, io.BytesIO(contents))


def npy(array: np.ndarray) -> bytes:
    """The contents of a .npy file."""
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def load(base: Path, **arguments: Any) -> TransferSet:
    """The transfer set of all tars in a folder."""
    return load_transfer_set("webdataset", {"shards": "*.tar", **arguments}, base=base)


def everything(data: TransferSet) -> Any:
    """All samples."""
    return data.take(np.arange(len(data)))


class TestReading:
    def test_it_agrees_with_the_library(self, tmp_path: Path) -> None:
        """The same keys, arrays and labels in the same order as the library reads them one after the other."""
        for shard in range(3):
            names = [f"{shard}-{number}" for number in range(7)]
            tar(tmp_path / f"{shard}.tar", [{"__key__": n, "npy": vector(i), "cls": i} for i, n in enumerate(names)])
        files = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # the library leaves the last tar to the collector
            theirs = list(wds.WebDataset(files, shardshuffle=False, empty_check=False).decode())
            gc.collect()
        samples = everything(load(tmp_path))
        assert samples.ids.tolist() == [sample["__key__"] for sample in theirs]
        np.testing.assert_array_equal(samples.inputs, np.stack([sample["npy"] for sample in theirs]))
        assert samples.labels.tolist() == [sample["cls"] for sample in theirs]

    def test_only_headers_are_read_for_the_index(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A tar of 200 MB, nearly all of it holes, is indexed by reading less than a megabyte of it."""
        block = np.zeros(1 << 20, dtype=np.uint8)
        path = tmp_path / "0.tar"
        with path.open("wb") as file:
            for number in range(200):
                info = tarfile.TarInfo(f"s{number:03d}.npy")
                head = npy(block)
                info.size = len(head)
                file.write(info.tobuf())
                file.write(head[:128])
                file.seek(-(-info.size // 512) * 512 - 128, io.SEEK_CUR)
            file.write(bytes(1024))
        read: list[int] = []
        original = io.BufferedReader.read

        class Counting(io.BufferedReader):
            def read(self, size: int | None = -1, /) -> bytes:
                found = original(self, size)
                read.append(len(found))
                return found

        monkeypatch.setattr("tarfile.bltn_open", lambda name, mode: Counting(io.FileIO(name, "r")))
        data = load(tmp_path)
        assert len(data) == 200
        assert sum(read) < 1 << 20
        np.testing.assert_array_equal(data.take(np.array([150])).inputs[0], block)

    def test_long_names_folders_and_dots(self, tmp_path: Path) -> None:
        """A key ends at the first dot of the last part; long names lie in headers of their own."""
        deep = "/".join(["folder.with.dots"] * 10)
        files = [(f"{deep}/a.left.npy", npy(vector(1))), (f"{deep}/b.left.npy", npy(vector(2)))]
        members(tmp_path / "0.tar", [*files, (".hidden", b"x"), ("README", b"x")])
        samples = everything(load(tmp_path, input="left.npy"))
        assert samples.ids.tolist() == [f"{deep}/a", f"{deep}/b"]
        np.testing.assert_array_equal(samples.inputs, [vector(1), vector(2)])


class TestIds:
    def test_keys_that_repeat_across_tars_get_the_tars_name(self, tmp_path: Path) -> None:
        """Every sample of the set, so that one looks like the other; `ids` chooses beforehand."""
        for shard in ("left", "right"):
            tar(tmp_path / f"{shard}.tar", [{"__key__": f"{n}", "npy": vector(n)} for n in range(2)])
        assert everything(load(tmp_path)).ids.tolist() == ["left/0", "left/1", "right/0", "right/1"]
        with pytest.raises(JobError, match=r"key '[01]' of .* occurs twice"):
            load(tmp_path, ids="key")
        (tmp_path / "right.tar").unlink()
        assert everything(load(tmp_path)).ids.tolist() == ["0", "1"]
        assert everything(load(tmp_path, ids="shard/key")).ids.tolist() == ["left/0", "left/1"]

    def test_tars_of_one_name_in_two_folders(self, tmp_path: Path) -> None:
        """Their folders tell them apart."""
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            tar(tmp_path / folder / "0.tar", [{"__key__": "x", "npy": vector(1)}])
        assert everything(load(tmp_path, shards="*/0.tar")).ids.tolist() == ["a/0/x", "b/0/x"]

    def test_a_key_that_stands_twice_in_a_tar_is_named(self, tmp_path: Path) -> None:
        """Two samples cannot share an id."""
        files = [(f"{name}.npy", npy(vector(1))) for name in ("a", "b", "a")]
        members(tmp_path / "0.tar", files)
        with pytest.raises((JobError, BadIdsError), match="'0/a' occurs twice"):
            load(tmp_path)


class TestLabels:
    def test_json_labels_and_samples_without(self, tmp_path: Path) -> None:
        """A key of a JSON object; null, no such key and no such member are unlabelled."""
        labels: list[dict[str, Any]] = [{"json": {"y": 3}}, {"json": {"y": None}}, {"json": {}}, {}]
        tar(tmp_path / "0.tar", [{"__key__": f"{n}", "npy": vector(n), **label} for n, label in enumerate(labels)])
        assert everything(load(tmp_path, label="json:y")).labels.tolist() == [3, -1, -1, -1]
        assert everything(load(tmp_path)).labels is None

    def test_labels_that_are_not_wanted(self, tmp_path: Path) -> None:
        """Nor are they read."""
        tar(tmp_path / "0.tar", [{"__key__": "a", "npy": vector(0), "cls": "no number"}])
        assert everything(load(tmp_path, label="none")).labels is None
        with pytest.raises(UnreadableSampleError, match="no number"):
            everything(load(tmp_path))

    @pytest.mark.parametrize("label", ["json", "cls:x", "text", "json:"])
    def test_other_words_are_refused(self, tmp_path: Path, label: str) -> None:
        """With those that there are."""
        tar(tmp_path / "0.tar", [{"__key__": "a", "npy": vector(0)}])
        with pytest.raises(JobError, match="'json:KEY'"):
            load(tmp_path, label=label)

    def test_a_label_that_no_sample_has(self, tmp_path: Path) -> None:
        """Asked for by name, it must be there."""
        tar(tmp_path / "0.tar", [{"__key__": "a", "npy": vector(0)}])
        with pytest.raises(JobError, match=r"no sample has a member \.cls"):
            load(tmp_path, label="cls")


class TestRefusals:
    def test_no_tar(self, tmp_path: Path) -> None:
        """A pattern that names nothing, a list with a gap."""
        with pytest.raises(DataUnavailableError, match="names no file"):
            load(tmp_path)
        tar(tmp_path / "0.tar", [{"__key__": "a", "npy": vector(0)}])
        with pytest.raises(DataUnavailableError, match=r"1\.tar"):
            load(tmp_path, shards="{0..1}.tar")
        with pytest.raises(JobError, match="named twice"):
            load(tmp_path, shards=["0.tar", "*.tar"])

    def test_a_compressed_tar(self, tmp_path: Path) -> None:
        """Whatever its name says."""
        tar(tmp_path / "0.tar", [{"__key__": "a", "npy": vector(0)}])
        (tmp_path / "1.tar").write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
        with pytest.raises(JobError, match=r"1\.tar cannot be read as an uncompressed tar"):
            load(tmp_path)

    @pytest.mark.parametrize("left", [0, 100, 700, 1024, 1100, 1536, 1600, 2048])
    def test_a_cut_tar(self, tmp_path: Path, left: int) -> None:
        """Within a member or a header, after one, and between two: the index is not made."""
        members(tmp_path / "0.tar", [(f"{n}.npy", npy(np.zeros(300, np.uint8))) for n in range(2)])
        path = tmp_path / "0.tar"
        path.write_bytes(path.read_bytes()[:left])
        with pytest.raises(JobError, match=r"0\.tar"):
            load(tmp_path)

    def test_a_damaged_header(self, tmp_path: Path) -> None:
        """It would be taken for the end, and all samples behind it be lost."""
        members(tmp_path / "0.tar", [(f"{n}.npy", npy(np.zeros(300, np.uint8))) for n in range(3)])
        path = tmp_path / "0.tar"
        contents = bytearray(path.read_bytes())
        contents[1024 + 150] ^= 1
        path.write_bytes(contents)
        with pytest.raises(JobError, match="neither a header nor the end at byte 1024"):
            load(tmp_path)

    def test_joined_tars(self, tmp_path: Path) -> None:
        """What follows the first one's end would not be seen."""
        members(tmp_path / "0.tar", [("a.npy", npy(vector(0)))])
        path = tmp_path / "0.tar"
        path.write_bytes(path.read_bytes() * 2)
        with pytest.raises(JobError, match="something follows its end"):
            load(tmp_path)

    def test_a_tar_that_is_cut_later(self, tmp_path: Path) -> None:
        """A sample that is no longer whole is an error, not zeros."""
        members(tmp_path / "0.tar", [(f"{n}.npy", npy(np.zeros(300, np.uint8))) for n in range(2)])
        data = load(tmp_path)
        path = tmp_path / "0.tar"
        path.write_bytes(path.read_bytes()[:1600])
        with pytest.raises(UnreadableSampleError, match="is truncated"):
            everything(data)

    def test_samples_without_an_input(self, tmp_path: Path) -> None:
        """The sample is named, with what it has."""
        members(tmp_path / "0.tar", [("a.npy", npy(vector(0))), ("b.txt", b"x")])
        with pytest.raises(JobError, match=r"sample 'b' of .* has no input: its members are txt"):
            load(tmp_path)

    def test_pickles_are_never_read(self, tmp_path: Path) -> None:
        """Neither as members nor inside arrays."""
        members(tmp_path / "0.tar", [("a.pyd", b"x")])
        for name in ("pyd", "pth"):
            with pytest.raises(JobError, match="pickles"):
                load(tmp_path, input=name)
        out = io.BytesIO()
        np.save(out, np.array([{}]), allow_pickle=True)
        members(tmp_path / "0.tar", [("a.npy", out.getvalue())])
        with pytest.raises(UnreadableSampleError, match="'a' is not an array"):
            everything(load(tmp_path))

    def test_arrays_of_several_shapes(self, tmp_path: Path) -> None:
        """Both samples are named."""
        members(tmp_path / "0.tar", [("a.npy", npy(vector(0))), ("b.npy", npy(vector(0)[:2]))])
        with pytest.raises(ShapeMismatchError, match=r"'a' is .* 'b' is"):
            everything(load(tmp_path))
