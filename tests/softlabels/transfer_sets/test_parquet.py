"""Parquet files: row groups read on demand, inputs of every kind of column, and columns that are none."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.errors import BadIdsError, DataUnavailableError, JobError, ShapeMismatchError, UnreadableSampleError
from softlabels.transfer_set import TransferSet
from softlabels.transfer_sets import load_transfer_set
from softlabels.transfer_sets import parquet as module

pa: Any = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pq: Any = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")


def keep(path: Path, columns: dict[str, Any], **how: Any) -> None:
    """Write a Parquet file."""
    pq.write_table(pa.table(columns), path, **how)


def load(base: Path, **arguments: Any) -> TransferSet:
    """The transfer set of all files in a folder, column `x` for input unless told otherwise."""
    return load_transfer_set("parquet", {"path": "*.parquet", "input": "x", **arguments}, base=base)


def everything(data: TransferSet) -> Any:
    """All samples."""
    return data.take(np.arange(len(data)))


class TestInputs:
    @pytest.mark.parametrize(
        "kind",
        [
            lambda rows: pa.array(rows.tolist(), type=pa.list_(pa.float32())),
            lambda rows: pa.array(rows.tolist(), type=pa.large_list(pa.float32())),
            lambda rows: pa.array(rows.tolist(), type=pa.list_(pa.float32(), 6)),
        ],
    )
    def test_lists(self, tmp_path: Path, kind: Any) -> None:
        """Of any length that is one length; `shape` gives them another."""
        rows = np.random.default_rng(0).normal(size=(11, 6)).astype(np.float32)
        keep(tmp_path / "a.parquet", {"x": kind(rows)}, row_group_size=4)
        np.testing.assert_array_equal(everything(load(tmp_path)).inputs, rows)
        shaped = load(tmp_path, shape=[2, 3]).take(np.array([9, 0, 9])).inputs
        np.testing.assert_array_equal(shaped, rows[[9, 0, 9]].reshape(3, 2, 3))

    def test_nested_lists_and_plain_numbers(self, tmp_path: Path) -> None:
        """As deep as they are; several columns of numbers make one input."""
        keep(tmp_path / "a.parquet", {"x": [[[1, 2], [3, 4]], [[5, 6], [7, 8]]], "u": [1.0, 2.0], "v": [3.0, 4.0]})
        assert everything(load(tmp_path)).inputs.tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
        assert everything(load(tmp_path, input="u")).inputs.tolist() == [1.0, 2.0]
        assert everything(load(tmp_path, input=["v", "u"])).inputs.tolist() == [[3.0, 1.0], [4.0, 2.0]]

    def test_plain_bytes(self, tmp_path: Path) -> None:
        """With the type and shape of a sample said beside."""
        rows = np.arange(24, dtype="<i2").reshape(4, 2, 3)
        keep(tmp_path / "a.parquet", {"x": [row.tobytes() for row in rows]})
        np.testing.assert_array_equal(everything(load(tmp_path, dtype="<i2", shape=[2, 3])).inputs, rows)
        with pytest.raises(UnreadableSampleError, match="12 bytes; `dtype` and `shape` make 16"):
            everything(load(tmp_path, dtype="<i2", shape=[2, 4]))

    @pytest.mark.parametrize("wrapped", [False, True])
    def test_images(self, tmp_path: Path, wrapped: bool) -> None:
        """As bytes, and as the struct that the Hugging Face library writes."""
        image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
        pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 7, 3), dtype=np.uint8)
        files = []
        for pixels_HWC in pixels:
            image.fromarray(pixels_HWC).save(out := io.BytesIO(), format="PNG")
            files.append({"bytes": out.getvalue(), "path": None} if wrapped else out.getvalue())
        keep(tmp_path / "a.parquet", {"x": files, "key": ["a", "b", "c"]})
        data = load(tmp_path, id="key", layout="hwc")
        np.testing.assert_array_equal(everything(data).inputs, pixels)
        broken = {"bytes": b"x", "path": None} if wrapped else b"x"
        keep(tmp_path / "a.parquet", {"x": [files[0], broken, files[2]], "key": ["a", "b", "c"]})
        with pytest.raises(UnreadableSampleError, match="image 'b'"):
            everything(load(tmp_path, id="key"))


class TestRowGroups:
    def test_only_what_is_asked_for_is_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A row group once, other columns never; groups are let go of beyond a bound, but for the last one."""
        for number in range(2):
            rows = [[float(100 * number + row)] * 50 for row in range(40)]
            keep(tmp_path / f"{number}.parquet", {"x": rows, "large": ["text" * 100] * 40}, row_group_size=10)
        read: list[tuple[int, list[str]]] = []
        original = pq.ParquetFile.read_row_group

        def counted(self: Any, group: int, columns: list[str]) -> Any:
            read.append((group, columns))
            return original(self, group, columns=columns)

        monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
        data = load(tmp_path)
        assert read == []
        assert data.take(np.array([0, 75, 3, 42])).inputs[:, 0].tolist() == [0.0, 135.0, 3.0, 102.0]
        assert read == [(0, ["x"]), (0, ["x"]), (3, ["x"])]
        data.take(np.array([1, 77]))
        assert len(read) == 3
        monkeypatch.setattr(module, "MAX_CACHED_BYTES", 1)
        data.take(np.array([15]))
        data.take(np.array([16]))
        data.take(np.array([0]))
        assert len(read) == 5

    def test_a_damaged_row_group(self, tmp_path: Path) -> None:
        """The file and the group are named."""
        rows = np.random.default_rng(0).normal(size=(40, 50)).tolist()
        keep(tmp_path / "a.parquet", {"x": rows}, row_group_size=10, compression="zstd", write_page_checksum=True)
        data = load(tmp_path)
        path = tmp_path / "a.parquet"
        contents = bytearray(path.read_bytes())
        contents[3000:3400] = bytes(400)
        path.write_bytes(contents)
        with pytest.raises(UnreadableSampleError, match=r"row group 0 of .*a\.parquet"):
            data.take(np.array([0]))


class TestRefusals:
    @pytest.mark.parametrize(
        ("columns", "error", "words"),
        [
            ({"x": [[1.0], [1.0, 2.0]]}, ShapeMismatchError, "differ in length"),
            ({"x": [[1.0], None]}, UnreadableSampleError, "sample 1 has no input"),
            ({"x": [[1], [None]]}, UnreadableSampleError, "a null among its numbers"),
            ({"x": ["a", "b"]}, JobError, "neither numbers nor images"),
            ({"y": [1.0, 2.0]}, JobError, "no column 'x': it has y"),
            ({"x": pa.array([], type=pa.float32())}, JobError, "holds no row"),
        ],
    )
    def test_inputs_that_cannot_be(self, tmp_path: Path, columns: Any, error: type[Exception], words: str) -> None:
        """Each with what is wrong with it."""
        keep(tmp_path / "a.parquet", columns)
        with pytest.raises(error, match=words):
            everything(load(tmp_path))

    def test_ids_and_labels_that_cannot_be(self, tmp_path: Path) -> None:
        """Repeated ids over two files, floats, labels that are text."""
        keep(tmp_path / "a.parquet", {"x": [1.0, 2.0], "key": [5, 6], "label": ["a", "b"], "half": [0.5, 1.5]})
        keep(tmp_path / "b.parquet", {"x": [1.0, 2.0], "key": [7, 5], "label": ["a", "b"], "half": [0.5, 1.5]})
        with pytest.raises(BadIdsError, match="5 occurs twice"):
            load(tmp_path, id="key")
        with pytest.raises(BadIdsError, match="float"):
            load(tmp_path, id="half")
        with pytest.raises(JobError, match="not integers"):
            everything(load(tmp_path, label="label"))

    def test_files_that_cannot_be(self, tmp_path: Path) -> None:
        """None, and one that is no Parquet."""
        with pytest.raises(DataUnavailableError, match="names no file"):
            load(tmp_path)
        (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
        with pytest.raises(JobError, match=r"a\.parquet cannot be opened"):
            load(tmp_path)
