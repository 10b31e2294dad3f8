"""Any reader of the format opens a store: zarr-python the group, h5py the virtual datasets, with equal arrays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from msgspec.structs import replace

from softlabels.ids import to_fixed_bytes
from softlabels.store import LocalRows
from softlabels.store.hdf5_container import shard_path


def expected(made: Any) -> dict[str, Any]:
    """The arrays as stored in files."""
    ids = to_fixed_bytes(made.ids, width_bytes=12) if made.ids.dtype.kind == "U" else made.ids
    arrays = {**made.encoded, "fingerprints": made.fingerprints, "ids": ids}
    return arrays if made.labels is None else {**arrays, "labels": made.labels.astype(np.int32)}


class TestZarr:
    @pytest.mark.parametrize("kind", ["zarr", "zarr-zstd", "zarr-blosc"], indirect=True)
    @pytest.mark.parametrize("ids", ["dense", "strings"])
    def test_zarr_python_reads_all_of_it(self, make_store: Any, kind: Any, ids: str) -> None:
        """Every array, whole and in part, with its names, fill value and attributes."""
        made = make_store(kind, ids=ids)
        made.write()
        group = zarr.open_group(made.root, mode="r")
        assert group.attrs["softlabels"]["format"] == "softlabels-store"
        assert sorted(group.array_keys()) == sorted(made.plan.arrays)
        for name, array in expected(made).items():
            assert np.asarray(group[name][:]).tobytes() == array.tobytes()
            assert np.array_equal(group[name][60:70], array[60:70], equal_nan=True)
            assert group[name].metadata.dimension_names[0] == "row"
        assert group["targets"].metadata.dimension_names == ("row", "class")
        assert np.isnan(group["targets"].fill_value)
        assert group["ids"].fill_value != 0

    @pytest.mark.parametrize("kind", ["zarr", "zarr-zstd", "zarr-blosc"], indirect=True)
    def test_a_flipped_bit_shows_there_too(self, make_store: Any, kind: Any, flip: Any) -> None:
        """zarr-python checks the checksum of each chunk."""
        made = make_store(kind)
        made.write()
        flip(made.root, shard=1, chunk=2)
        with pytest.raises(ValueError, match="checksum"):
            zarr.open_group(made.root, mode="r")["targets"][64:128]


@pytest.mark.parametrize("kind", ["hdf5", "hdf5-gzip"], indirect=True)
class TestHdf5:
    @pytest.mark.parametrize("ids", ["dense", "strings"])
    def test_h5py_reads_all_of_it(self, make_store: Any, kind: Any, ids: str) -> None:
        """Every virtual dataset, whole and in part, with its labels and fill value; from any folder."""
        made = make_store(kind, ids=ids)
        made.write()
        before = Path.cwd()
        os.chdir("/")
        try:
            with h5py.File(made.root / "store.h5") as file:
                assert sorted(file) == sorted(made.plan.arrays)
                for name, array in expected(made).items():
                    assert file[name][:].tobytes() == array.tobytes()
                    assert np.array_equal(file[name][60:70], array[60:70], equal_nan=True)
                    assert file[name].dims[0].label == "row"
                assert file["targets"].dims[1].label == "class"
                assert np.isnan(file["targets"].fillvalue)
                assert file.attrs["store"] == "small"
                assert file["targets"].is_virtual
        finally:
            os.chdir(before)

    def test_a_shard_alone(self, make_store: Any, kind: Any) -> None:
        """A shard's file is an ordinary HDF5 file: chunked, checksummed, with as many rows as the shard has."""
        made = make_store(kind)
        made.write()
        for shard, rows in ((0, 64), (3, 8)):
            with h5py.File(made.root / shard_path(shard)) as file:
                dataset = file["targets"]
                assert dataset.shape == (rows, 10)
                assert (dataset.chunks, dataset.fletcher32, dataset.compression) == ((16, 10), True, kind.compression)
                start = shard * 64
                assert dataset[:].tobytes() == made.encoded["targets"][start : start + rows].tobytes()

    def test_h5py_finds_chunks_where_receipts_say(self, make_store: Any, kind: Any, place: Any) -> None:
        """The addresses in a receipt are those that the HDF5 library itself reports, with the same sizes."""
        made = make_store(kind, ids="strings")
        made.write()
        for shard, chunks in ((0, 4), (3, 1)):
            with h5py.File(made.root / shard_path(shard)) as file:
                for name, array in made.plan.arrays.items():
                    assert file[name].id.get_num_chunks() == chunks
                    for chunk in range(chunks):
                        corner = (chunk * 16, *(0 for _ in array.row_shape))
                        found = file[name].id.get_chunk_info_by_coord(corner)
                        assert place(made.root, name, shard, chunk)[1:] == (found.byte_offset, found.size)
                        assert found.filter_mask == 0

    def test_a_flipped_bit_shows_there_too(self, make_store: Any, kind: Any, flip: Any) -> None:
        """The HDF5 library checks the checksum of each chunk."""
        made = make_store(kind)
        made.write()
        flip(made.root, shard=1, chunk=2)
        with h5py.File(made.root / shard_path(1)) as file, pytest.raises(OSError, match="read"):
            file["targets"][:]

    def test_our_reader_needs_no_h5py(self, make_store: Any, kind: Any) -> None:
        """Rows of an HDF5 store are read where h5py cannot even be imported."""
        made = make_store(kind)
        made.write()
        program = (
            "import sys; sys.modules['h5py'] = sys.modules['zarr'] = None\n"
            f"import softlabels; print(softlabels.open({str(made.root)!r}).batch([1000, 1199]).labels.tolist())"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == made.labels[[0, 199]].tolist()

    @pytest.mark.parametrize("rows_per_chunk", [1, 2, 3, 64])
    @pytest.mark.parametrize("rows_per_shard", [192, 576])
    def test_chunks_of_all_sizes_have_addresses(
        self, make_store: Any, kind: Any, rows_per_chunk: int, rows_per_shard: int
    ) -> None:
        """From chunks of four bytes to one of a whole shard, and hundreds of chunks: equal strides throughout."""
        made = make_store(kind)
        shards = replace(
            made.plan.shards,
            count=-(-200 // rows_per_shard),
            rows_per_shard=rows_per_shard,
            rows_per_chunk=rows_per_chunk,
        )
        plan = replace(made.plan, shards=shards)
        writer = type(made.write(shards=range(0), finish=False)).create(made.root.with_name("other"), plan)
        for number in range(shards.count):
            with writer.claim(number) as claim:
                rows = slice(claim.rows.start, claim.rows.stop)
                claim.commit(
                    ids=made.ids[rows],
                    encoded={"targets": made.encoded["targets"][rows]},
                    fingerprints=made.fingerprints[rows],
                    labels=made.labels[rows],
                    audit=made.shard(0)["audit"],
                )
        writer.finish()
        found = LocalRows(writer.root).fetch(made.ids, tuple(plan.arrays))
        with h5py.File(writer.root / "store.h5") as file:
            for name, array in expected(made).items():
                assert found[name].tobytes() == array.tobytes() == file[name][:].tobytes()
