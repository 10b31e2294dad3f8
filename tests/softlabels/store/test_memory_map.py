"""Mapped arrays: sums of rows as they were verified, and files that change under a mapping."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from softlabels.audit import Audit
from softlabels.encodings import make_encoding
from softlabels.errors import ChecksumError, TruncatedError
from softlabels.manifest import IdSpec, RowLayout, TemperatureSpec, TransferSetSpec
from softlabels.mapping_guard import changes
from softlabels.store import LocalRows, StoreWriter, plan_store


def made(root: Path, *, classes: int, samples: int = 200, views: int = 1) -> LocalRows:
    """A store of random f16 rows, in several shards of which the last is short."""
    encoding = make_encoding("f16", classes=classes)
    layout = RowLayout(kind="views", samples=samples, rows=samples * views, views=views) if views > 1 else None
    plan = plan_store(
        name="sums",
        samples=samples,
        ids=IdSpec(kind="int", dense_start=0),
        encoding=encoding,
        temperature=TemperatureSpec(default=1.0, captured=1.0, locked=False),
        mean="none",
        teachers=(),
        transfer_set=TransferSetSpec(name="noise", source="tests:noise", arguments={}),
        rows_per_shard=96,
        rows_per_chunk=32,
        layout=layout,
    )
    writer = StoreWriter.create(root, plan)
    for shard in writer.missing_shards():
        with writer.claim(shard) as claim:
            logits = np.random.default_rng(shard).normal(size=(len(claim.rows), classes)).astype(np.float32)
            claim.commit(
                ids=np.arange(claim.rows.start, claim.rows.stop) // views,
                encoded=encoding.encode(logits - logits.max(axis=1, keepdims=True)),
                fingerprints=np.zeros((len(claim.rows), 16), dtype=np.uint8),
                audit=Audit().to_json(),
            )
    writer.finish()
    return LocalRows(root)


def shard_files(root: Path, field: str = "targets") -> list[Path]:
    """The files of an array's shards, in order."""
    return sorted((root / field / "c").glob("*/0"), key=lambda path: int(path.parent.name))


def flip(path: Path, at: int) -> None:
    """Flip a bit of a file in place; its size and times stay what they were."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_threads_that_meet_at_unread_files_do_not_disturb_each_other(tmp_path: Path) -> None:
    """A file is mapped once, and no read has to be repeated because another thread mapped a file."""
    made(tmp_path / "store", classes=8, samples=1_920).close()
    expected = LocalRows(tmp_path / "store").at_positions(np.arange(1_920), ("targets",))["targets"]
    rows, before, barrier = LocalRows(tmp_path / "store"), changes.count, threading.Barrier(16)

    def read(seed: int) -> bool:
        barrier.wait()
        positions = np.random.default_rng(seed).permutation(1_920)
        found = rows.at_positions(positions, ("targets", "ids"))
        assert rows.row_sums(positions) is not None
        return np.array_equal(found["targets"], expected[positions])

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(read, range(16)))
    assert changes.count == before


class TestFilesThatChange:
    """Under an open reader, after every chunk was verified."""

    def test_a_bit_that_flips_in_a_verified_chunk_is_refused(self, tmp_path: Path) -> None:
        """The file is watched: its chunks are verified again; other shards are served."""
        rows = made(tmp_path / "store", classes=128)
        whole = rows.at_positions(np.arange(200), ("targets",))["targets"]
        flip(shard_files(tmp_path / "store")[0], 100)
        with pytest.raises(ChecksumError, match="shard 0, chunk 0"):
            rows.at_positions(np.arange(200), ("targets",))
        left = rows.at_positions(np.arange(32, 200), ("targets",))["targets"]
        assert np.array_equal(left.view(np.uint16), whole[32:].view(np.uint16))

    def test_a_write_of_the_same_bytes_is_no_change(self, tmp_path: Path) -> None:
        """What is read is what was written."""
        rows = made(tmp_path / "store", classes=128)
        whole = rows.at_positions(np.arange(200), ("targets",))["targets"]
        for path in shard_files(tmp_path / "store"):
            flip(path, 100)
            flip(path, 100)
        again = rows.at_positions(np.arange(200), ("targets",))["targets"]
        assert np.array_equal(again.view(np.uint16), whole.view(np.uint16))

    def test_a_truncated_file_is_an_error_and_not_a_signal(self, tmp_path: Path) -> None:
        """TruncatedError, again and again; whole again, the file is read again."""
        rows = made(tmp_path / "store", classes=4096)
        whole = rows.at_positions(np.arange(200), ("targets",))["targets"]
        path = shard_files(tmp_path / "store")[1]
        contents = path.read_bytes()
        os.truncate(path, 5000)
        for _ in range(3):
            with pytest.raises(TruncatedError, match="has 5000 bytes"):
                rows.at_positions(np.arange(200), ("targets",))
        path.write_bytes(contents)
        again = rows.at_positions(np.arange(200), ("targets",))["targets"]
        assert np.array_equal(again.view(np.uint16), whole.view(np.uint16))

    def test_a_fork_has_its_own_watch(self, tmp_path: Path) -> None:
        """Parent and child each notice the same write."""
        rows = made(tmp_path / "store", classes=128)
        rows.at_positions(np.arange(200), ("targets",))
        ready, done = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            rows.at_positions(np.arange(200), ("targets",))
            os.write(ready[1], b"x")
            os.read(done[0], 1)
            try:
                rows.at_positions(np.arange(200), ("targets",))
            except ChecksumError:
                os._exit(7)
            os._exit(1)
        os.read(ready[0], 1)
        flip(shard_files(tmp_path / "store")[0], 100)
        with pytest.raises(ChecksumError):
            rows.at_positions(np.arange(200), ("targets",))
        os.write(done[1], b"x")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
