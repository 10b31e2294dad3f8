"""A complete and undamaged store goes from one container to another and back without one bit changed."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

import softlabels
from softlabels.audit import Audit
from softlabels.documents import open_sealed, seal
from softlabels.encodings import make_encoding
from softlabels.errors import (
    ChecksumError,
    JobError,
    ManifestError,
    RowsNotCommittedError,
    StoreExistsError,
    UnknownStoreError,
)
from softlabels.manifest import IdSpec, RowLayout, TemperatureSpec, TransferSetSpec, ViewSpec
from softlabels.store import LocalRows, SampleTable, StoreWriter, plan_store
from softlabels.store.copies import convert_store
from softlabels.transfer_set import sample_fingerprints

OTHER = {"zarr": "hdf5", "hdf5": "zarr"}


class TestThereAndBack:
    @pytest.mark.parametrize("ids", ["dense", "strings"])
    def test_ends_as_the_store_it_was(self, make_store: Any, kind: Any, tmp_path: Path, ids: str) -> None:
        """Through the other container and back: the same files, byte for byte, and the same digest."""
        made = make_store(kind, ids=ids)
        made.write()
        there, back = tmp_path / "there", tmp_path / "back"
        middle = convert_store(made.root, there, container=OTHER[kind.container])
        end = convert_store(there, back, container=kind.container, compression=kind.compression)
        assert middle.container == OTHER[kind.container]
        assert end.digest == softlabels.open(made.root).digest != middle.digest
        assert _files(back) == _files(made.root)

    def test_everything_but_the_container_stays(self, made: Any, kind: Any, tmp_path: Path) -> None:
        """Arrays, error figures, fingerprint, teachers and versions are those of the source, shard by shard."""
        convert_store(made.root, tmp_path / "there", container=OTHER[kind.container])
        before, after = softlabels.open(made.root), softlabels.open(tmp_path / "there")
        for field in ("transfer_set", "audit", "arrays", "software", "teachers", "temperature", "encoding", "layout"):
            assert getattr(before.manifest, field) == getattr(after.manifest, field)
        fields = tuple(made.plan.arrays)
        old, new = (LocalRows(Path(store.where)).fetch(made.ids, fields) for store in (before, after))
        assert all(np.array_equal(old[field], new[field]) for field in fields)
        receipts = [StoreWriter.resume(Path(store.where)).ledger.read for store in (before, after)]
        for shard in range(4):
            old_receipt, new_receipt = (receipt(shard) for receipt in receipts)
            assert old_receipt.fingerprint == new_receipt.fingerprint
            assert old_receipt.audit == new_receipt.audit


class TestLayouts:
    def test_what_an_encoding_learnt_comes_along(self, make_store: Any, kind: Any, tmp_path: Path) -> None:
        """The arrays beside the rows, without which these cannot be decoded, are copied and verified."""
        made = make_store(kind, encoding="basis")
        made.write()
        there = tmp_path / "there"
        convert_store(made.root, there, container=OTHER[kind.container])
        assert np.array_equal(softlabels.open(there).batch(made.ids).logits(), made.encoding.decode(made.encoded))
        learnt = next((made.root / "encoding").iterdir())
        learnt.write_bytes(learnt.read_bytes()[:-1] + b"?")
        with pytest.raises(ChecksumError):
            convert_store(made.root, tmp_path / "damaged", container=OTHER[kind.container])

    @pytest.mark.parametrize("kind", ["zarr", "hdf5", "zarr-zstd", "hdf5-gzip"], indirect=True)
    @pytest.mark.parametrize("layout", ["views of members", "sequences"])
    def test_every_layout(self, kind: Any, tmp_path: Path, layout: str) -> None:
        """Members, views with their parameters, and rows of variable count: there and back, byte for byte."""
        _write_layout(tmp_path / "s", kind, layout)
        middle, back = tmp_path / "there", tmp_path / "back"
        convert_store(tmp_path / "s", middle, container=OTHER[kind.container])
        convert_store(middle, back, container=kind.container, compression=kind.compression)
        assert _files(back) == _files(tmp_path / "s")
        keys: dict[str, Any] = {"views": 3} if layout == "views of members" else {}
        ids = ["b", "a"] if layout == "views of members" else [7, 5]
        batches = [softlabels.open(root).batch(ids, fingerprints=True, **keys) for root in (tmp_path / "s", middle)]
        assert np.array_equal(batches[0].logits(), batches[1].logits())
        assert np.array_equal(batches[0].fingerprints, batches[1].fingerprints)


class TestInterrupted:
    def test_it_goes_on_where_it_stopped(self, made: Any, kind: Any, tmp_path: Path) -> None:
        """Stopped after two shards, run again: two more are copied, and the result is the same as without a stop."""
        whole = convert_store(made.root, tmp_path / "whole", container=OTHER[kind.container])
        told: list[int] = []

        def stop_after_two(rows: int) -> None:
            told.append(rows)
            if len(told) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert_store(made.root, tmp_path / "there", container=OTHER[kind.container], advance=stop_after_two)
        assert StoreWriter.resume(tmp_path / "there").missing_shards() == [2, 3]
        told.clear()
        resumed = convert_store(
            made.root, tmp_path / "there", container=OTHER[kind.container], advance=lambda rows: told.append(rows)
        )
        assert told == [64, 64, 64, 8], "shards that are there already are compared"
        assert resumed == whole
        assert _files(tmp_path / "there") == _files(tmp_path / "whole")

    def test_again_when_done(self, made: Any, kind: Any, tmp_path: Path) -> None:
        """A finished conversion that is asked for again says the same and writes nothing."""
        first = convert_store(made.root, tmp_path / "there", container=OTHER[kind.container])
        assert convert_store(made.root, tmp_path / "there", container=OTHER[kind.container]) == first


class TestRefused:
    def test_an_unfinished_source(self, make_store: Any, kind: Any, tmp_path: Path) -> None:
        """An unfinished store is not converted: the rest would never follow."""
        made = make_store(kind)
        made.write(shards=range(3), finish=False)
        with pytest.raises(RowsNotCommittedError, match="resume"):
            convert_store(made.root, tmp_path / "there", container="hdf5")
        assert not (tmp_path / "there").exists()

    def test_a_damaged_source(self, made: Any, kind: Any, tmp_path: Path, flip: Any) -> None:
        """A flipped bit is found on the way and named; its shard is not committed."""
        flip(made.root, field="fingerprints", shard=1, chunk=3)
        with pytest.raises(ChecksumError, match="shard 1, chunk 3"):
            convert_store(made.root, tmp_path / "there", container=OTHER[kind.container])
        assert StoreWriter.resume(tmp_path / "there").missing_shards() == [1, 2, 3]

    @pytest.mark.parametrize(("version", "message"), [(1, "other samples"), (2, "was published with")])
    def test_a_receipt_of_other_samples(
        self, make_store: Any, kind: Any, tmp_path: Path, version: int, message: str
    ) -> None:
        """Intact chunks of other samples than the receipt's are refused; since version 2 by the receipt's digest."""
        made = make_store(kind)
        made = dataclasses.replace(made, plan=made.plan.as_version(version))
        made.write()
        path = made.root / "ledger" / "00000001.json"
        receipt = open_sealed(path.read_bytes(), what="receipt")
        path.write_bytes(seal({**receipt, "fingerprint": "0" * 32 + "-64"}))
        with pytest.raises(ManifestError, match=message):
            convert_store(made.root, tmp_path / "there", container=OTHER[kind.container])

    def test_a_place_that_is_taken(self, made: Any, kind: Any, tmp_path: Path) -> None:
        """Neither onto itself in another container, nor onto another store."""
        with pytest.raises(StoreExistsError):
            convert_store(made.root, made.root, container=OTHER[kind.container])

    def test_a_compression_that_readers_lack(self, made: Any, tmp_path: Path) -> None:
        """HDF5 itself ships neither Zstandard nor Blosc, Zarr stores keep to two codecs."""
        for container, compression in (("hdf5", "zstd"), ("hdf5", "blosc"), ("zarr", "gzip")):
            with pytest.raises(JobError, match="cannot be compressed"):
                convert_store(made.root, tmp_path / "there", container=container, compression=compression)
        assert not (tmp_path / "there").exists()


class TestCommand:
    @pytest.mark.parametrize("kind", ["zarr", "hdf5"], indirect=True)
    def test_it_converts(self, made: Any, kind: Any, tmp_path: Path) -> None:
        """`softlabels convert` makes the store and prints its digest; an error ends in one line and exit code 1."""
        there = tmp_path / "there"
        done = _softlabels("convert", str(made.root), str(there), "--container", OTHER[kind.container])
        assert done.returncode == 0, done.stderr
        assert softlabels.open(there).digest in done.stdout
        assert "200 rows" in done.stderr
        failed = _softlabels("convert", str(tmp_path / "nothing"), str(there))
        assert (failed.returncode, failed.stdout) == (1, "")
        assert UnknownStoreError.code in failed.stderr


def _write_layout(root: Path, kind: Any, layout: str) -> None:
    """A store of 96 rows: four views of each of 24 samples by 3 members, or three samples of 50, 0 and 46 rows."""
    encoding = make_encoding("f16", classes=6)
    rows = np.random.default_rng(1).normal(size=(96, 3, 6)).astype(np.float16)
    rows -= rows.max(axis=2, keepdims=True)
    views = layout == "views of members"
    sample_ids = np.array([5, 9, 7])
    table = SampleTable(
        ids=sample_ids,
        lengths=np.array([50, 0, 46]),
        fingerprints=sample_fingerprints(sample_ids[:, None]),
        dense=False,
    )
    plan = plan_store(
        name="layout",
        samples=24 if views else 3,
        ids=IdSpec(kind="str", width_bytes=1) if views else IdSpec(kind="int"),
        encoding=encoding,
        temperature=TemperatureSpec(default=4.0, captured=1.0, locked=False),
        mean="geometric" if views else "none",
        teachers=(),
        transfer_set=TransferSetSpec(name="x", source="x:y", arguments={}, labelled=True),
        container=kind.container,
        rows_per_shard=32,
        rows_per_chunk=8,
        layout=RowLayout(kind="views", samples=24, rows=96, views=4) if views else None,
        members=3 if views else None,
        views=ViewSpec(transform="x:crop", parameters=("left",)) if views else None,
        table=None if views else table,
    )
    plan = replace(plan, shards=replace(plan.shards, compression=kind.compression))
    writer = StoreWriter.create(root, plan, table=None if views else table)
    for shard in writer.missing_shards():
        with writer.claim(shard) as claim:
            numbers = np.arange(claim.rows.start, claim.rows.stop)
            keys = {
                "ids": np.array(list("abcdefghijklmnopqrstuvwx"))[numbers // 4],
                "fingerprints": sample_fingerprints(numbers[:, None]),
                "view_parameters": numbers[:, None] / 7,
            }
            claim.commit(
                encoded={"targets": rows[numbers] if views else rows[numbers, 0]},
                labels=numbers % 6,
                audit=Audit().to_json(),
                **(keys if views else {}),
            )
    writer.finish()


def _softlabels(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = "import sys; from softlabels.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def _files(root: Path) -> dict[str, bytes]:
    # Locks say who held them last; they are not part of a store.
    found = [path for path in sorted(root.rglob("*")) if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(root)): path.read_bytes() for path in found}
