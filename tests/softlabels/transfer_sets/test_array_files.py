"""Arrays in npy, Zarr and HDF5 files: read by rows and never whole, ids of every kind, and arrays that do not fit."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr

from softlabels.errors import BadIdsError, DataUnavailableError, JobError, ShapeMismatchError, UnreadableSampleError
from softlabels.transfer_set import TransferSet
from softlabels.transfer_sets import load_transfer_set

ROWS = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)


def keep(base: Path, kind: str, **arrays: np.ndarray) -> dict[str, Any]:
    """Write arrays as a kind of file; returns the arguments that name them."""
    if kind == "npy":
        for name, array in arrays.items():
            np.save(base / f"{name}.npy", array)
        return {name: f"{name}.npy" for name in arrays}
    if kind == "hdf5":
        with h5py.File(base / "all.h5", "w") as file:
            for name, array in arrays.items():
                file[name] = array.astype("O") if array.dtype.kind == "U" else array
        return {"path": "all.h5", **{name: name for name in arrays}}
    group = zarr.create_group(base / "all.zarr", zarr_format=2 if kind == "zarr2" else 3, overwrite=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # strings are no settled part of format 3
        for name, array in arrays.items():
            group.create_array(name, data=array, chunks=(7, *array.shape[1:]))
    return {"path": "all.zarr", **{name: name for name in arrays}}


def load(base: Path, kind: str, **arguments: Any) -> TransferSet:
    """The transfer set of what `keep` has kept."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_transfer_set(kind.rstrip("2"), arguments, base=base)


def everything(data: TransferSet) -> Any:
    """All samples."""
    return data.take(np.arange(len(data)))


KINDS = pytest.mark.parametrize("kind", ["npy", "hdf5", "zarr", "zarr2"])


@KINDS
class TestArrays:
    @pytest.mark.parametrize(
        "ids",
        [
            np.random.default_rng(1).permutation(50) * 3 - 20,
            np.arange(50) + 7,
            np.array([f"n{number}" for number in range(50)]),
            np.array([f"n{number}".encode() for number in range(50)]),
            np.arange(50, dtype=np.uint8),
        ],
    )
    def test_ids_of_every_kind(self, tmp_path: Path, kind: str, ids: np.ndarray) -> None:
        """Integers of any width, strings of fixed and of variable length, bytes; dense ones are known as such."""
        data = load(tmp_path, kind, **keep(tmp_path, kind, inputs=ROWS, ids=ids))
        expected = np.char.decode(ids) if ids.dtype.kind == "S" else ids
        assert everything(data).ids.tolist() == expected.tolist()
        spec = data.id_spec()  # type: ignore[attr-defined]
        dense = ids.dtype.kind in "iu" and bool((np.diff(ids.astype(int)) == 1).all())
        assert spec.dense_start == (int(ids[0]) if dense else None)

    def test_scattered_rows(self, tmp_path: Path, kind: str) -> None:
        """Runs, gaps, repeats and the reverse: each row where it was asked for."""
        data = load(tmp_path, kind, **keep(tmp_path, kind, inputs=ROWS))
        for positions in ([3, 4, 5, 20, 21, 49, 0], [9, 9, 9], list(range(50))[::-1], [17]):
            np.testing.assert_array_equal(data.take(np.array(positions)).inputs, ROWS[positions])
        assert everything(data).labels is None

    def test_an_id_that_stands_twice_is_named(self, tmp_path: Path, kind: str) -> None:
        """Before anything is computed."""
        ids = np.arange(50)
        ids[33] = 8
        with pytest.raises(BadIdsError, match="8 occurs twice"):
            load(tmp_path, kind, **keep(tmp_path, kind, inputs=ROWS, ids=ids))

    def test_arrays_of_several_lengths(self, tmp_path: Path, kind: str) -> None:
        """The lengths are told."""
        with pytest.raises(ShapeMismatchError, match="'inputs': 50, 'labels': 49"):
            load(tmp_path, kind, **keep(tmp_path, kind, inputs=ROWS, labels=np.arange(49)))

    def test_labels_that_are_no_numbers(self, tmp_path: Path, kind: str) -> None:
        """Floats and rows of labels are refused."""
        for labels in (np.arange(50) / 2, np.zeros((50, 2), dtype=np.int64)):
            arguments = keep(tmp_path, kind, inputs=ROWS, labels=labels)
            with pytest.raises(JobError, match="not one integer"):
                load(tmp_path, kind, **arguments).take(np.array([0]))

    def test_another_process_opens_its_own(self, tmp_path: Path, kind: str) -> None:
        """Workers of a student's loader read the same rows."""
        data = load(tmp_path, kind, **keep(tmp_path, kind, inputs=ROWS))
        everything(data)
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            found = pool.apply(_rows_of, (pickle.dumps(data), [4, 40]))
        np.testing.assert_array_equal(found, ROWS[[4, 40]])


class TestFiles:
    @pytest.mark.parametrize(
        ("kind", "arguments", "words"),
        [
            ("hdf5", {"path": "all.h5", "inputs": "nowhere"}, "has no data set 'nowhere': it has inputs, labels"),
            ("zarr", {"path": "all.zarr", "inputs": "nowhere"}, "has no array 'nowhere': it has inputs, labels"),
            ("hdf5", {"path": "x.bin"}, r"x\.bin cannot be opened as an HDF5 file"),
            ("zarr", {"path": "empty"}, "empty cannot be opened as a Zarr group"),
            ("npy", {"inputs": "x.bin"}, r"x\.bin cannot be mapped"),
            ("npy", {"inputs": "all.npz"}, "several arrays"),
            ("npy", {"inputs": "torn.npy"}, r"torn\.npy cannot be mapped"),
            ("npy", {"inputs": "x.bin", "dtype": "<f4"}, "both `dtype` and `shape`"),
            ("npy", {"inputs": "x.bin", "dtype": "<f4", "shape": [3]}, "whole number of samples"),
            ("npy", {"inputs": "x.bin", "dtype": "O", "shape": [3]}, "whole number of samples|object"),
            ("npy", {"inputs": "x.bin", "dtype": "what", "shape": [3]}, "what"),
            ("npy", {"inputs": "number.npy"}, "single number"),
            ("npy", {"inputs": "objects.npy"}, "numbers or strings"),
        ],
    )
    def test_what_is_no_array_of_samples(self, tmp_path: Path, kind: str, arguments: Any, words: str) -> None:
        """The file is named, and what it has."""
        for each in ("hdf5", "zarr"):
            keep(tmp_path, each, inputs=ROWS, labels=np.arange(50))
        (tmp_path / "x.bin").write_bytes(b"0123456789")
        (tmp_path / "empty").mkdir()
        np.savez(tmp_path / "all.npz", inputs=ROWS)
        np.save(tmp_path / "number.npy", np.float32(3))
        np.save(tmp_path / "torn.npy", np.zeros((4, 3)))
        (tmp_path / "torn.npy").write_bytes((tmp_path / "torn.npy").read_bytes().replace(b"}", b"{", 1))
        np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
        with pytest.raises(JobError, match=words):
            load(tmp_path, kind, **arguments)

    @pytest.mark.parametrize("kind", ["npy", "hdf5", "zarr"])
    def test_nothing_there(self, tmp_path: Path, kind: str) -> None:
        """With the whole path."""
        with pytest.raises(DataUnavailableError, match="nowhere"):
            load(tmp_path, kind, **{"inputs" if kind == "npy" else "path": "nowhere"})

    def test_numbers_without_a_header(self, tmp_path: Path) -> None:
        """A file of nothing but samples, as speech toolkits write them."""
        (tmp_path / "frames.bin").write_bytes(ROWS.astype("<f2").tobytes())
        data = load(tmp_path, "npy", inputs="frames.bin", dtype="<f2", shape=[3])
        np.testing.assert_array_equal(everything(data).inputs, ROWS.astype("<f2"))
        assert data.name == "frames"

    def test_a_damaged_chunk(self, tmp_path: Path) -> None:
        """A compressed chunk that no longer decodes is an error that names the file."""
        with h5py.File(tmp_path / "all.h5", "w") as file:
            file.create_dataset("inputs", data=ROWS, chunks=(10, 3), compression="gzip", fletcher32=True)
            place = file["inputs"].id.get_chunk_info(2).byte_offset
        contents = bytearray((tmp_path / "all.h5").read_bytes())
        contents[place + 5] ^= 255
        (tmp_path / "all.h5").write_bytes(contents)
        data = load(tmp_path, "hdf5", path="all.h5")
        data.take(np.arange(10))
        with pytest.raises(UnreadableSampleError, match=r"samples 20 to 25 of 'all'.*all\.h5"):
            data.take(np.arange(20, 26))

    def test_mapped_arrays_are_not_read_whole(self, tmp_path: Path) -> None:
        """A file of a terabyte, nearly all of it a hole, is a transfer set at once."""
        with (tmp_path / "huge.bin").open("wb") as file:
            file.truncate(1 << 40)
        data = load(tmp_path, "npy", inputs="huge.bin", dtype="uint8", shape=[1024])
        assert len(data) == 1 << 30
        assert not data.take(np.array([1 << 29])).inputs.any()


def _rows_of(pickled: bytes, positions: list[int]) -> np.ndarray:
    found: np.ndarray = pickle.loads(pickled).take(np.array(positions)).inputs
    return found

    def test_a_mapped_file_that_is_cut_is_an_error_and_ends_no_process(self, tmp_path: Path) -> None:
        """Also for rows of pages that are still there: whoever cut the file may have written to it too."""
        np.save(tmp_path / "x.npy", np.ones((50_000, 4), dtype=np.float32))
        data = load_transfer_set("npy", {"inputs": "x.npy"}, base=tmp_path)
        assert (data.take(np.array([49_999])).inputs == 1).all()
        os.truncate(tmp_path / "x.npy", 8192)
        with pytest.raises(UnreadableSampleError, match="became shorter"):
            data.take(np.array([49_999]))
        with pytest.raises(UnreadableSampleError, match="became shorter"):
            data.take(np.array([0]))
