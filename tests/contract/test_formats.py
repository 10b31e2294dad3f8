"""Stores written by older versions stay readable: the committed ones of every format, unchanged and in full."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr

import softlabels
from softlabels.store import LocalRows
from softlabels.store.copies import convert_store

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
FORMAT1 = FIXTURES / "format1"
RECORDED: dict[str, dict[str, str]] = json.loads((FORMAT1 / "digests.json").read_text())


@pytest.fixture(scope="module")
def contents() -> dict[str, Any]:
    """What every store of format 1 holds."""
    spec = importlib.util.spec_from_file_location("make_format1", FIXTURES / "make_format1.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, Any] = module.contents()
    return found


class TestFormat1:
    def test_the_files_are_as_they_were_made(self) -> None:
        """Nobody has changed them, and git has not converted their line ends."""
        found = {
            str(path.relative_to(FORMAT1)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in FORMAT1.rglob("*")
            if path.is_file() and path.name != "digests.json"
        }
        assert found == RECORDED["files"]

    @pytest.mark.parametrize("name", sorted(RECORDED["stores"]))
    def test_it_is_read_as_it_was_written(self, name: str, contents: dict[str, Any]) -> None:
        """The same digest, and every row bit by bit, in random order; reading changes nothing in the folder."""
        before = sorted(FORMAT1.rglob("*"))
        with softlabels.open(FORMAT1 / name) as store:
            assert store.digest == RECORDED["stores"][name]
            order = np.random.default_rng(0).permutation(12)
            batch = store.batch(contents["ids"][order], fingerprints=True)
            assert batch.encoded["targets"].tobytes() == contents["targets"][order].tobytes()
            assert np.array_equal(batch.labels, contents["labels"][order])
            assert np.array_equal(batch.fingerprints, contents["fingerprints"][order])
            assert (batch.temperature, batch.locked, store.manifest.teachers[0].arguments) == (4.0, False, {"width": 8})
        kept = LocalRows(FORMAT1 / name).fetch_rows(np.arange(12), ("ids",))["ids"]
        assert np.array_equal(kept, contents["ids"])
        assert sorted(FORMAT1.rglob("*")) == before

    @pytest.mark.parametrize("name", sorted(RECORDED["stores"]))
    def test_other_readers_still_open_it(self, name: str, contents: dict[str, Any]) -> None:
        """zarr-python and h5py of today read the files of that day."""
        if name.startswith("zarr"):
            found = zarr.open_group(FORMAT1 / name, mode="r")["targets"][:]
        else:
            with h5py.File(FORMAT1 / name / "store.h5") as file:
                found = file["targets"][:]
        assert np.asarray(found).tobytes() == contents["targets"].tobytes()

    @pytest.mark.parametrize("name", sorted(RECORDED["stores"]))
    def test_it_can_be_converted(self, name: str, contents: dict[str, Any], tmp_path: Path) -> None:
        """An old store can be converted to the current format."""
        convert_store(FORMAT1 / name, tmp_path / "new", container="hdf5" if name.startswith("zarr") else "zarr")
        batch = softlabels.open(tmp_path / "new").batch(contents["ids"])
        assert batch.encoded["targets"].tobytes() == contents["targets"].tobytes()
