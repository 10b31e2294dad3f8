"""Stores written by older versions stay readable: the committed ones of every format, unchanged and in full."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
import pytest
import zarr

import softlabels
from softlabels.manifest import FORMAT_VERSION, Container
from softlabels.store import LocalRows
from softlabels.store.copies import convert_store, merge
from softlabels.store.repair import repair
from softlabels.store.verify import verify

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
FORMATS = [FIXTURES / f"format{version}" for version in (1, 2)]
RECORDED: dict[Path, dict[str, dict[str, str]]] = {
    folder: json.loads((folder / "digests.json").read_text()) for folder in FORMATS
}
STORES = [folder / name for folder, recorded in RECORDED.items() for name in sorted(recorded["stores"])]


def named(path: Path) -> str:
    """The name of a store in reports, for example format1-zarr."""
    return f"{path.parent.name}-{path.name}"


@pytest.fixture(scope="module")
def contents() -> dict[str, Any]:
    """What every store holds."""
    spec = importlib.util.spec_from_file_location("make_formats", FIXTURES / "make_formats.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, Any] = module.contents()
    return found


class TestFormats:
    @pytest.mark.parametrize("folder", FORMATS, ids=lambda path: path.name)
    def test_the_files_are_as_they_were_made(self, folder: Path) -> None:
        """Nobody has changed them, and git has not converted their line ends."""
        found = {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*")
            if path.is_file() and path.name != "digests.json"
        }
        assert found == RECORDED[folder]["files"]

    @pytest.mark.parametrize("root", STORES, ids=named)
    def test_it_is_read_as_it_was_written(self, root: Path, contents: dict[str, Any]) -> None:
        """The same digest, and every row bit by bit, in random order; reading changes nothing in the folder."""
        before = sorted(root.rglob("*"))
        with softlabels.open(root) as store:
            assert store.digest == RECORDED[root.parent]["stores"][root.name]
            order = np.random.default_rng(0).permutation(12)
            batch = store.batch(contents["ids"][order], fingerprints=True)
            assert batch.encoded["targets"].tobytes() == contents["targets"][order].tobytes()
            assert np.array_equal(batch.labels, contents["labels"][order])
            assert np.array_equal(batch.fingerprints, contents["fingerprints"][order])
            assert (batch.temperature, batch.locked, store.manifest.teachers[0].arguments) == (4.0, False, {"width": 8})
        kept = LocalRows(root).fetch_rows(np.arange(12), ("ids",))["ids"]
        assert np.array_equal(kept, contents["ids"])
        assert verify(root).sound
        assert sorted(root.rglob("*")) == before

    @pytest.mark.parametrize("root", STORES, ids=named)
    def test_other_readers_still_open_it(self, root: Path, contents: dict[str, Any]) -> None:
        """zarr-python and h5py of today read the files of that day."""
        if root.name.startswith("zarr"):
            found = zarr.open_group(root, mode="r")["targets"][:]
        else:
            with h5py.File(root / "store.h5") as file:
                found = file["targets"][:]
        assert np.asarray(found).tobytes() == contents["targets"].tobytes()

    @pytest.mark.parametrize("root", STORES, ids=named)
    def test_it_can_be_converted(self, root: Path, contents: dict[str, Any], tmp_path: Path) -> None:
        """An old store can be converted to the current format, into the other container or the same one."""
        for container in get_args(Container):
            manifest = convert_store(root, tmp_path / container, container=container)
            assert manifest.format_version == FORMAT_VERSION
            assert verify(tmp_path / container).sound
            batch = softlabels.open(tmp_path / container).batch(contents["ids"])
            assert batch.encoded["targets"].tobytes() == contents["targets"].tobytes()

    @pytest.mark.parametrize("root", STORES, ids=named)
    def test_it_is_copied_and_repaired(self, root: Path, tmp_path: Path) -> None:
        """`merge` of an old store is the same store; a damaged shard is dropped, and comes back from the old one."""
        done = merge([root], tmp_path / "copy")
        assert done.digest == RECORDED[root.parent]["stores"][root.name]
        path = next((tmp_path / "copy").glob("targets/c/0/0" if root.name.startswith("zarr") else "shards/*0.h5"))
        contents = bytearray(path.read_bytes())
        contents[-200 if root.name.startswith("hdf5") else 5] ^= 1
        path.write_bytes(contents)
        assert repair(tmp_path / "copy").dropped == [0]
        assert merge([root], tmp_path / "copy").digest == done.digest
