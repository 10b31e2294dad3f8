"""An HDF5 file can refer to any other file: it is never followed, because none is opened for reading."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import softlabels
from softlabels.documents import open_sealed
from softlabels.errors import ManifestError, SoftLabelsError, TruncatedError
from softlabels.store.copies import convert_store

ROOT = Path(__file__).resolve().parents[2]
SECRET = np.full((32, 4), 42, dtype="<f2")


@pytest.fixture
def hdf5(make_store: Callable[..., Path]) -> Path:
    """A sound store in HDF5."""
    return make_store("hdf5")


def external_link(path: Path, secret: Path) -> None:
    """A shard whose dataset lies in another file."""
    with h5py.File(path, "w") as file:
        file["targets"] = h5py.ExternalLink(str(secret), "secret")


def soft_link(path: Path, secret: Path) -> None:
    """A shard whose dataset is another one of the same file."""
    with h5py.File(path, "w") as file:
        file["other"] = SECRET
        file["targets"] = h5py.SoftLink("/other")


def external_storage(path: Path, secret: Path) -> None:
    """A shard whose raw data lie in any file of the machine."""
    with h5py.File(path, "w") as file:
        file.create_dataset("targets", (32, 4), dtype="<f2", external=[(str(secret), 0, 256)])


def virtual_dataset(path: Path, secret: Path) -> None:
    """A shard that shows another file's dataset."""
    with h5py.File(path, "w") as file:
        layout = h5py.VirtualLayout((32, 4), dtype="<f2")
        layout[:] = h5py.VirtualSource(str(secret), "secret", shape=(32, 4))
        file.create_virtual_dataset("targets", layout)


def unknown_filter(path: Path, secret: Path) -> None:
    """A shard that wants a plugin to be loaded."""
    with h5py.File(path, "w") as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((8, 4))
        properties.set_filter(32_000, h5py.h5z.FLAG_OPTIONAL, (1,))
        space = h5py.h5s.create_simple((32, 4))
        h5py.h5d.create(file.id, b"targets", h5py.h5t.IEEE_F16LE, space, properties)


CRAFTED = (external_link, soft_link, external_storage, virtual_dataset, unknown_filter)


class TestCraftedShards:
    @pytest.mark.parametrize("craft", CRAFTED, ids=lambda craft: craft.__name__)
    def test_it_is_an_error_to_every_reader_of_ours(
        self, hdf5: Path, tmp_path: Path, craft: Callable[[Path, Path], None]
    ) -> None:
        """Reading and converting end in an error; the secret file is not opened."""
        secret = tmp_path / "secret.h5"
        with h5py.File(secret, "w") as file:
            file["secret"] = SECRET
        shard = hdf5 / "shards" / "00000000.h5"
        craft(shard, secret)
        with pytest.raises(SoftLabelsError):
            softlabels.open(hdf5).batch([0])
        with pytest.raises(SoftLabelsError):
            convert_store(hdf5, tmp_path / "there", container="zarr")

    def test_a_store_file_that_points_elsewhere(self, hdf5: Path, tmp_path: Path, rows: Any) -> None:
        """`store.h5` is for other tools; ours serve the rows of the shards whatever it says."""
        secret = tmp_path / "secret.h5"
        with h5py.File(secret, "w") as file:
            file["secret"] = SECRET
        external_link(hdf5 / "store.h5", secret)
        assert np.array_equal(softlabels.open(hdf5).batch([0]).encoded["targets"], rows[[0]])

    def test_chunks_that_overlap(self, hdf5: Path, rewrite: Any) -> None:
        """A receipt that lays one array over another is refused, however each fits by itself."""
        path = hdf5 / "ledger" / "00000000.json"
        parts = open_sealed(path.read_bytes(), what="receipt")["parts"]
        ids = parts["ids"]
        for offset in (ids["offset"], ids["offset"] + ids["stride"] * 3 + 1, ids["offset"] - 1):
            rewrite(path, lambda receipt: receipt["parts"]["labels"].update(offset=offset))  # noqa: B023
            with pytest.raises(ManifestError, match="contradicts"):
                softlabels.open(hdf5).batch([0])

    def test_a_file_shorter_than_its_chunks(self, hdf5: Path) -> None:
        """A file without its last chunk is an error, not fill values."""
        shard = hdf5 / "shards" / "00000003.h5"
        shard.write_bytes(shard.read_bytes()[:-10])
        with pytest.raises(TruncatedError):
            softlabels.open(hdf5).batch([96])


class TestNothingIsOpened:
    def test_no_library_parses_a_stores_files(self) -> None:
        """h5py and zarr-python only ever make something in memory: neither opens what lies in a store."""
        calls = set()
        for path in sorted((ROOT / "softlabels").rglob("*.py")):
            if path.parent.name == "transfer_sets":  # the user's own files, read by the library that wrote them
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    name = ast.unparse(node.func)
                    if name.startswith(("h5py.File", "h5py.h5f.", "zarr.")):
                        calls.add((path.name, name))
        assert calls == {
            ("hdf5_container.py", "h5py.File"),
            ("hdf5_container.py", "h5py.h5f.create"),
            ("containers.py", "zarr.create_group"),
        }

    @pytest.mark.parametrize("container", ["zarr", "hdf5"])
    def test_rows_are_read_without_either_library(self, make_store: Callable[..., Path], container: str) -> None:
        """Where neither h5py nor zarr-python can be imported, rows are served all the same."""
        root = make_store(container)
        program = (
            "import sys; sys.modules['h5py'] = sys.modules['zarr'] = None\n"
            f"import softlabels; print(softlabels.open({str(root)!r}).batch([3, 99]).labels.tolist())"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout.strip()) == (0, "[3, 3]"), done.stderr
