"""Stores that keep the samples themselves: written, read, verified, converted and merged like every other array."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

import softlabels
from softlabels.cli import main
from softlabels.documents import open_sealed, seal
from softlabels.errors import ChecksumError, JobError, ManifestError, ShapeMismatchError, UnknownFieldError
from softlabels.manifest import ArraySpec, IdSpec, Manifest, RowLayout, TemperatureSpec, TransferSetSpec
from softlabels.store import LocalRows, StoreWriter, plan_store
from softlabels.store.copies import convert_store, merge
from softlabels.store.repair import repair
from softlabels.store.store_plan import kept_inputs
from softlabels.store.verify import verify
from softlabels.transfer_set import sample_fingerprints

SAMPLES = 200
OTHER = {"zarr": "hdf5", "hdf5": "zarr"}


def pixels() -> np.ndarray:
    """Small pictures, [200, 3, 5, 4]."""
    return np.random.default_rng(9).integers(0, 256, (SAMPLES, 3, 5, 4), dtype=np.uint8)


def with_inputs(made: Any, inputs: np.ndarray) -> Any:
    """A planned store that keeps these inputs too."""
    spec = kept_inputs(inputs)
    plan = structs.replace(made.plan, arrays={**made.plan.arrays, "inputs": spec})
    return replace(made, plan=plan, fingerprints=sample_fingerprints(inputs))


def write(made: Any, inputs: np.ndarray, shards: list[int] | None = None) -> StoreWriter:
    """Write these shards, all unless told otherwise, and finish where none is missing."""
    writer = StoreWriter.create(made.root, made.plan, encoding=made.encoding)
    for number in range(4) if shards is None else shards:
        rows = slice(number * 64, min((number + 1) * 64, SAMPLES))
        with writer.claim(number) as claim:
            claim.commit(**made.shard(number), inputs=inputs[rows])
    if not writer.missing_shards():
        writer.finish()
    return writer


@pytest.fixture
def kept(make_store: Any, kind: Any) -> Any:
    """A finished store of each kind that keeps pictures; ids are strings."""
    made = with_inputs(make_store(kind, ids="strings"), pixels())
    write(made, pixels())
    return made


class TestReading:
    def test_inputs_come_back_by_id(self, kept: Any) -> None:
        """In any order, bit by bit, and only when they are asked for."""
        order = np.random.default_rng(1).integers(0, SAMPLES, 77)
        with softlabels.open(kept.root) as store:
            batch = store.batch(kept.ids[order], inputs=True, fingerprints=True)
            assert batch.inputs is not None
            np.testing.assert_array_equal(batch.inputs, pixels()[order])
            np.testing.assert_array_equal(sample_fingerprints(batch.inputs), batch.fingerprints)
            assert store.batch(kept.ids[order]).inputs is None

    def test_epochs_bring_them(self, kept: Any) -> None:
        """Every sample once, each with its own input."""
        with softlabels.open(kept.root) as store:
            seen = []
            for batch in store.epoch(seed=1, epoch=0, batch_size=32, inputs=True):
                assert batch.inputs is not None
                positions = [kept.ids.tolist().index(name) for name in batch.ids.tolist()]
                np.testing.assert_array_equal(batch.inputs, pixels()[positions])
                seen += positions
            assert sorted(seen) == list(range(SAMPLES))

    def test_a_store_knows_all_its_ids(self, kept: Any) -> None:
        """In its own order, which is that of the transfer set."""
        with softlabels.open(kept.root) as store:
            assert store.ids().tolist() == kept.ids.tolist()

    def test_a_store_without_inputs_says_so(self, made: Any) -> None:
        """The message says how to make a store that has them."""
        with softlabels.open(made.root) as store:
            with pytest.raises(UnknownFieldError, match="inputs = true"):
                store.batch(made.ids[:2], inputs=True)
            with pytest.raises(UnknownFieldError, match="keeps no inputs"):
                store.epoch(seed=0, epoch=0, batch_size=2, inputs=True)

    def test_bytes_of_targets_do_not_count_them(self, kept: Any) -> None:
        """What a row of targets takes is what the encoding writes; `inspect` shows the inputs beside it."""
        assert softlabels.open(kept.root).manifest.target_row_bytes == 20

    def test_inspect_shows_them(self, kept: Any, capsys: pytest.CaptureFixture[str]) -> None:
        """Type, shape and bytes of a sample."""
        assert main(["inspect", str(kept.root)]) == 0
        assert "uint8[3, 5, 4], 60 bytes a sample" in capsys.readouterr().out


class TestKeeping:
    def test_convert_goes_there_and_back(self, kept: Any, kind: Any, tmp_path: Path) -> None:
        """The other container holds the same inputs, and back it is the store it was."""
        convert_store(kept.root, tmp_path / "there", container=OTHER[kind.container])
        back = convert_store(
            tmp_path / "there", tmp_path / "back", container=kind.container, compression=kind.compression
        )
        with softlabels.open(tmp_path / "there") as store:
            np.testing.assert_array_equal(store.batch(kept.ids, inputs=True).inputs, pixels())
        assert back.digest == softlabels.open(kept.root).digest

    def test_verify_passes(self, kept: Any) -> None:
        """Every checksum, and every input against its fingerprint."""
        assert verify(kept.root).sound

    @pytest.mark.parametrize("kind", ["zarr", "hdf5"], indirect=True)
    def test_a_flipped_bit_is_found_and_mended(self, kept: Any, flip: Any) -> None:
        """Reading refuses it, `verify` locates it, `repair` drops the shard, and a rerun brings it back."""
        flip(kept.root, field="inputs", shard=1, chunk=2)
        with softlabels.open(kept.root) as store, pytest.raises(ChecksumError):
            store.batch(kept.ids[64:128], inputs=True)
        assert {fault.array for fault in verify(kept.root, every_fault=True).faults} >= {"inputs"}
        repair(kept.root)
        write(kept, pixels(), shards=[1])
        assert verify(kept.root).sound

    @pytest.mark.parametrize("kind", ["zarr", "hdf5"], indirect=True)
    def test_inputs_of_other_samples_are_found(self, make_store: Any, kind: Any) -> None:
        """A writer that keeps inputs in another order than their fingerprints is reported by `verify`."""
        made = with_inputs(make_store(kind), pixels())
        write(made, pixels()[::-1].copy())
        report = verify(made.root)
        assert [(fault.kind, fault.array) for fault in report.faults] == [("contents", "inputs")]
        assert "fingerprints" in report.faults[0].message

    @pytest.mark.parametrize("kind", ["zarr", "hdf5"], indirect=True)
    def test_merge_unites_them(self, make_store: Any, kind: Any, tmp_path: Path) -> None:
        """Shards from two machines, each with its inputs."""
        parts = [with_inputs(make_store(kind, name=name), pixels()) for name in ("a", "b")]
        write(parts[0], pixels(), shards=[0, 3])
        write(parts[1], pixels(), shards=[1, 2])
        assert merge([part.root for part in parts], tmp_path / "whole").missing == []
        with softlabels.open(tmp_path / "whole") as store:
            np.testing.assert_array_equal(store.batch(parts[0].ids, inputs=True).inputs, pixels())

    def test_any_reader_of_the_format_sees_them(self, kept: Any, kind: Any) -> None:
        """zarr-python and h5py read the inputs as what they are."""
        if kind.container == "zarr":
            import zarr

            found = zarr.open_group(kept.root, mode="r")["inputs"][:]
        else:
            import h5py

            with h5py.File(kept.root / "store.h5", "r") as file:
                found = file["inputs"][:]
        np.testing.assert_array_equal(found, pixels())

    @pytest.mark.parametrize("kind", ["zarr"], indirect=True)
    def test_a_shard_without_them_is_refused(self, make_store: Any, kind: Any) -> None:
        """A store that was planned with inputs takes no shard without, nor with some of another shape."""
        made = with_inputs(make_store(kind), pixels())
        writer = StoreWriter.create(made.root, made.plan, encoding=made.encoding)
        with writer.claim(0) as claim:
            with pytest.raises(ShapeMismatchError, match="inputs"):
                claim.commit(**made.shard(0))
            with pytest.raises(ShapeMismatchError, match="inputs"):
                claim.commit(**made.shard(0), inputs=pixels()[:64, :2])


class TestPlanning:
    def _plan(self, inputs: ArraySpec | None, **changes: Any) -> Manifest:
        from softlabels.encodings import make_encoding

        return plan_store(
            name="big",
            samples=changes.pop("samples", 1 << 20),
            ids=IdSpec(kind="int", dense_start=0),
            encoding=make_encoding("f16", classes=1000),
            temperature=TemperatureSpec(default=1.0, captured=1.0, locked=False),
            mean="none",
            teachers=(),
            transfer_set=TransferSetSpec(name="x", source="x:y", arguments={}),
            inputs=inputs,
            **changes,
        )

    def test_large_inputs_make_smaller_chunks_and_shards(self) -> None:
        """A chunk of inputs stays near a mebibyte, a shard near 64, so that neither fills the memory."""
        picture = ArraySpec(dtype="|u1", row_shape=(3, 224, 224))
        plain, plan = self._plan(None), self._plan(picture)
        assert plan.shards.rows_per_chunk * picture.row_bytes <= 1 << 20
        assert plan.shards.rows_per_shard * picture.row_bytes <= 65 << 20
        assert plan.shards.rows_per_shard < plain.shards.rows_per_shard
        assert self._plan(ArraySpec(dtype="|u1", row_shape=(8,))).shards.rows_per_chunk == plain.shards.rows_per_chunk

    @pytest.mark.parametrize(
        ("inputs", "words"),
        [
            (np.zeros((2, 3), dtype=">f4"), "little-endian"),
            (np.zeros((2, 3), dtype=np.bool_), "'|u1'"),
            (np.zeros((2, 3), dtype=np.complex64), "whole numbers or floats"),
            (np.zeros((2, 3, 0)), "none of them empty"),
            (np.array(["a", "b"]), "whole numbers or floats"),
        ],
    )
    def test_what_no_store_holds_is_refused(self, inputs: np.ndarray, words: str) -> None:
        """The message says which types and shapes there may be."""
        with pytest.raises(JobError, match=words):
            kept_inputs(inputs)

    @pytest.mark.parametrize("views", [2])
    def test_views_keep_no_inputs(self, views: int) -> None:
        """These have many rows per sample, and the inputs would be repeated for each."""
        layout = RowLayout(kind="views", samples=4, rows=4 * views, views=views)
        with pytest.raises(JobError, match="not in a store of views"):
            self._plan(ArraySpec(dtype="|u1", row_shape=(8,)), samples=4, layout=layout)

    @pytest.mark.parametrize("kind", ["zarr"], indirect=True)
    def test_a_manifest_that_says_otherwise_is_not_believed(self, kept: Any) -> None:
        """A manifest with inputs in a layout of views is invalid."""
        path = kept.root / "plan.json"
        body = open_sealed(path.read_bytes(), what="plan")
        body["layout"] = {"kind": "views", "samples": 100, "rows": 200, "views": 2}
        path.write_bytes(seal(json.loads(json.dumps(body))))
        shutil.rmtree(kept.root / "ledger")
        (kept.root / "manifest.json").unlink()
        with pytest.raises(ManifestError, match=r"arrays\.inputs needs the layout"):
            LocalRows(kept.root)
