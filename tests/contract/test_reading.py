"""Every container gives back what went in: every id kind, encoding and order, across shards, threads and processes."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

import softlabels
from softlabels.encodings import ENCODING_NAMES
from softlabels.errors import (
    BadIdsError,
    ChecksumError,
    EmptyBatchError,
    ManifestError,
    RowsNotCommittedError,
    TruncatedError,
    UnknownFieldError,
    UnknownIdError,
    UnknownStoreError,
)
from softlabels.store import LocalRows

SAMPLES = 200


class TestContents:
    @pytest.mark.parametrize("ids", ["dense", "sparse", "strings"])
    @pytest.mark.parametrize("labelled", [True, False], ids=["labelled", "unlabelled"])
    def test_everything_comes_back(self, make_store: Any, kind: Any, ids: str, labelled: bool) -> None:
        """Targets, ids, labels and fingerprints of all rows, in one batch, bit by bit."""
        made = make_store(kind, ids=ids, labelled=labelled)
        made.write()
        with softlabels.open(made.root) as store:
            assert len(store) == SAMPLES
            batch = store.batch(made.ids, fingerprints=True)
            assert batch.encoded["targets"].tobytes() == made.encoded["targets"].tobytes()
            assert np.array_equal(batch.ids, made.ids)
            assert np.array_equal(batch.fingerprints, made.fingerprints)
            assert (batch.labels is None) is not labelled
            if labelled:
                assert np.array_equal(batch.labels, made.labels)
        kept = LocalRows(made.root).fetch(made.ids, ("ids",))["ids"]
        assert kept.dtype.kind == made.ids.dtype.kind
        assert np.array_equal(kept, made.ids)

    @pytest.mark.parametrize("encoding", ENCODING_NAMES)
    def test_every_encoding(self, make_store: Any, kind: Any, encoding: str) -> None:
        """Each array of each encoding comes back bit by bit, and decodes to what it decoded to before."""
        made = make_store(kind, encoding=encoding)
        made.write()
        batch = softlabels.open(made.root).batch(made.ids)
        for name, array in made.encoded.items():
            assert batch.encoded[name].dtype == array.dtype
            assert batch.encoded[name].tobytes() == array.tobytes()
        expected = made.encoding.decode(made.encoded)
        assert np.array_equal(batch.logits(), expected)

    def test_orders_and_repeats_across_shards(self, made: Any) -> None:
        """Ids may come in any order and repeat, whichever shards and chunks they lie in."""
        rng = np.random.default_rng(0)
        store = softlabels.open(made.root)
        for size in (1, 2, 17, 400):
            rows = rng.integers(0, SAMPLES, size=size)
            batch = store.batch(made.ids[rows])
            assert batch.encoded["targets"].tobytes() == made.encoded["targets"][rows].tobytes()
            assert np.array_equal(batch.labels, made.labels[rows])

    def test_the_last_rows(self, made: Any) -> None:
        """The last row of a partial chunk of a partial shard is there; the one after it is not."""
        store = softlabels.open(made.root)
        last = store.batch(made.ids[-1:])
        assert last.encoded["targets"].tobytes() == made.encoded["targets"][-1:].tobytes()
        with pytest.raises(UnknownIdError):
            store.batch([int(made.ids[-1]) + 1])

    def test_a_store_of_one_row(self, make_store: Any, kind: Any) -> None:
        """The smallest store: one shard, one chunk, one row, fewer rows than a chunk has."""
        made = make_store(kind)
        small = _cut(made, samples=1)
        small.write()
        assert np.array_equal(softlabels.open(small.root).batch(small.ids).labels, made.labels[:1])

    @pytest.mark.parametrize("ids", ["dense", "sparse", "strings"])
    def test_what_cannot_be_asked(self, make_store: Any, kind: Any, ids: str) -> None:
        """Unknown ids, ids of the other kind, empty batches and unknown fields are refused, each by its own error."""
        made = make_store(kind, ids=ids)
        made.write()
        store = softlabels.open(made.root)
        other: list[Any] = [5] if ids == "strings" else ["5"]
        unknown: list[Any] = ["nobody", "none"] if ids == "strings" else [-777, 10**15]
        with pytest.raises(UnknownIdError) as caught:
            store.batch([*made.ids[:3].tolist(), *unknown])
        assert caught.value.context["ids"] == unknown
        with pytest.raises(BadIdsError):
            store.batch(other)
        with pytest.raises(EmptyBatchError):
            store.batch([])
        with pytest.raises(UnknownFieldError, match="view_parameters"):
            LocalRows(made.root).fetch(made.ids[:1], ("view_parameters",))


class TestDigest:
    def test_it_names_the_contents(self, make_store: Any, kind: Any) -> None:
        """Two stores written from the same contents have one digest, whatever the order of their shards; others not."""
        made, again = make_store(kind, name="a"), make_store(kind, name="b")
        made.write()
        again.write(shards=range(3, 0, -1), finish=False)
        again.write()
        other = make_store(kind, name="c", seed=1)
        other.write()
        digests = [softlabels.open(each.root).digest for each in (made, again, other)]
        assert digests[0] == digests[1] != digests[2]
        assert digests[0] == softlabels.open(made.root).batch(made.ids[:1]).store_digest

    def test_files_are_the_same_each_time(self, make_store: Any, kind: Any) -> None:
        """No time, no random number, no path: two stores of the same contents are the same files."""
        made, again = make_store(kind, name="a"), make_store(kind, name="b")
        made.write()
        again.write()
        assert _files(made.root) == _files(again.root)


class TestDamage:
    @pytest.mark.parametrize("field", ["targets", "labels", "fingerprints"])
    def test_a_flipped_bit_shows_at_first_touch(
        self, made: Any, flip: Callable[..., Path], place: Any, field: str
    ) -> None:
        """In the first byte, the last, and in the checksum itself: the error names shard, chunk and rows."""
        size = place(made.root, field, 1, 2)[2]
        for byte in (0, size - 5, size - 4, size - 1):
            flip(made.root, field=field, shard=1, chunk=2, byte=byte)
            store = softlabels.open(made.root)
            # A row of another chunk of the same shard is not touched by it.
            store.batch([1000 + 64], fingerprints=True)
            with pytest.raises(ChecksumError) as caught:
                store.batch([1000 + 64 + 2 * 16 + 5], fingerprints=True)
            assert caught.value.context == {"field": field, "shard": 1, "chunk": 2, "rows": [96, 111]}
            flip(made.root, field=field, shard=1, chunk=2, byte=byte)
        softlabels.open(made.root).batch(made.ids, fingerprints=True)

    def test_chunks_that_changed_places(self, made: Any, place: Any) -> None:
        """Two chunks of one size, each intact by itself, that were swapped are noticed."""
        (path, first, size), (_, second, other) = (place(made.root, "fingerprints", 1, chunk) for chunk in (0, 1))
        if size != other:
            pytest.skip("these chunks compress to different sizes, so that swapping them is plain damage")
        raw = bytearray(path.read_bytes())
        raw[first : first + size], raw[second : second + size] = (
            raw[second : second + size],
            raw[first : first + size],
        )
        path.write_bytes(raw)
        with pytest.raises(ChecksumError):
            softlabels.open(made.root).batch([1000 + 64], fingerprints=True)

    def test_a_hole(self, made: Any, place: Any) -> None:
        """A chunk of zeros, as a file has where nothing was written, is not data: Fletcher-32 of zeros is zero."""
        path, offset, size = place(made.root, "targets", 1, 2)
        raw = bytearray(path.read_bytes())
        raw[offset : offset + size] = bytes(size)
        path.write_bytes(raw)
        with pytest.raises(ChecksumError) as caught:
            softlabels.open(made.root).batch(made.ids)
        assert caught.value.context["chunk"] == 2

    def test_the_rows_of_a_partial_chunk_are_named_rightly(self, made: Any, flip: Callable[..., Path]) -> None:
        """The last chunk of the store ends where the store ends."""
        flip(made.root, shard=3, chunk=0)
        with pytest.raises(ChecksumError) as caught:
            softlabels.open(made.root).batch(made.ids[-1:])
        assert caught.value.context["rows"] == [192, 199]

    @pytest.mark.parametrize("left", [0, 10, -1], ids=["emptied", "cut short", "one byte short"])
    def test_a_truncated_file(self, made: Any, place: Any, left: int) -> None:
        """A file that lost its end is an error, never a crash of the process."""
        path, offset, size = place(made.root, "targets", 2, 3)
        path.write_bytes(path.read_bytes()[: left if left >= 0 else offset + size - 1])
        with pytest.raises(TruncatedError, match="bytes where"):
            softlabels.open(made.root).batch(made.ids)

    def test_a_missing_file(self, made: Any, place: Any) -> None:
        """A missing file of a shard is an error, never fill values."""
        place(made.root, "targets", 2, 0)[0].unlink()
        store = softlabels.open(made.root)
        store.batch(made.ids[:64])
        with pytest.raises(TruncatedError, match="is missing"):
            store.batch(made.ids)

    def test_a_missing_receipt(self, made: Any) -> None:
        """A shard without a receipt is not read, though its files exist."""
        (made.root / "ledger" / "00000002.json").unlink()
        with pytest.raises(TruncatedError, match="receipt of shard 2 is missing"):
            softlabels.open(made.root).batch(made.ids)

    def test_a_damaged_receipt(self, made: Any) -> None:
        """A changed byte of a receipt shows."""
        path = made.root / "ledger" / "00000002.json"
        path.write_bytes(path.read_bytes().replace(b'"stride": ', b'"stride": 1'))
        with pytest.raises(ManifestError):
            softlabels.open(made.root).batch(made.ids)

    def test_another_shards_receipt(self, made: Any) -> None:
        """A receipt under another shard's name is refused."""
        ledger = made.root / "ledger"
        (ledger / "00000002.json").write_bytes((ledger / "00000001.json").read_bytes())
        with pytest.raises(ManifestError, match="belongs to another shard"):
            softlabels.open(made.root).batch(made.ids)

    def test_no_store(self, tmp_path: Path) -> None:
        """An empty folder, a file and nothing at all are no store."""
        (tmp_path / "file").write_bytes(b"x")
        for where in (tmp_path, tmp_path / "file", tmp_path / "nothing"):
            with pytest.raises(UnknownStoreError):
                softlabels.open(where)


class TestUnfinished:
    def test_committed_rows_are_served_and_no_others(self, make_store: Any, kind: Any) -> None:
        """Dense ids of committed shards can be read while the rest is still to come."""
        made = make_store(kind)
        made.write(shards=range(1, 3), finish=False)
        store = softlabels.open(made.root)
        assert np.array_equal(store.batch(made.ids[64:192]).labels, made.labels[64:192])
        with pytest.raises(RowsNotCommittedError):
            store.batch(made.ids[60:70])

    def test_a_reader_sees_shards_as_they_come(self, make_store: Any, kind: Any) -> None:
        """A store opened before a shard was committed reads it afterwards."""
        made = make_store(kind)
        made.write(shards=range(1), finish=False)
        store = softlabels.open(made.root)
        with pytest.raises(RowsNotCommittedError):
            store.batch(made.ids[64:66])
        made.write(shards=range(1, 2), finish=False)
        assert np.array_equal(store.batch(made.ids[64:66]).labels, made.labels[64:66])


class TestProcesses:
    def test_threads(self, made: Any) -> None:
        """Eight threads read one store, fresh each time, and each gets its own rows."""
        rng = np.random.default_rng(0)
        for _ in range(5):
            store = softlabels.open(made.root)
            wanted = [rng.integers(0, SAMPLES, size=50) for _ in range(32)]
            with ThreadPoolExecutor(8) as pool:
                batches = list(pool.map(store.batch, [made.ids[rows] for rows in wanted]))
            for rows, batch in zip(wanted, batches, strict=True):
                assert batch.encoded["targets"].tobytes() == made.encoded["targets"][rows].tobytes()

    def test_after_fork(self, made: Any) -> None:
        """A child reads through a store that its parent opened and read from."""
        store = softlabels.open(made.root)
        store.batch(made.ids[:10])
        assert _in_child(lambda: np.array_equal(store.batch(made.ids).labels, made.labels)) == 0

    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_forked_while_threads_read(self, made: Any) -> None:
        """No lock that a thread holds at the moment of the fork stays locked in the child."""
        stop = threading.Event()
        shared = [softlabels.open(made.root)]

        def read() -> None:
            while not stop.is_set():
                shared[0] = softlabels.open(made.root)
                shared[0].batch(made.ids)

        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(10):
                store = shared[0]
                assert _in_child(lambda: np.array_equal(store.batch(made.ids).labels, made.labels)) == 0  # noqa: B023
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def test_pickled(self, made: Any) -> None:
        """A pickled store opens anew where it is unpickled."""
        store = pickle.loads(pickle.dumps(softlabels.open(made.root)))
        assert np.array_equal(store.batch(made.ids).labels, made.labels)

    def test_arrays_outlive_the_store(self, made: Any) -> None:
        """What a batch holds is the caller's own."""
        store = softlabels.open(made.root)
        batch = store.batch(made.ids)
        store.close()
        del store
        assert batch.encoded["targets"].tobytes() == made.encoded["targets"].tobytes()


def _cut(made: Any, *, samples: int) -> Any:
    """The same store with its first samples only."""
    plan = made.plan
    layout = structs.replace(plan.layout, samples=samples, rows=samples)
    plan = structs.replace(plan, layout=layout, shards=structs.replace(plan.shards, count=1))
    arrays = {name: array[:samples] for name, array in made.encoded.items()}
    return replace(
        made,
        plan=plan,
        ids=made.ids[:samples],
        labels=made.labels[:samples],
        fingerprints=made.fingerprints[:samples],
        encoded=arrays,
    )


def _files(root: Path) -> dict[str, bytes]:
    # Locks name the process that held them last; they are not part of the store.
    files = (path for path in sorted(root.rglob("*")) if path.is_file() and path.parent.name != "locks")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def _in_child(check: Callable[[], bool]) -> int | None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=lambda: _exit(check()))
    process.start()
    process.join(timeout=60)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def _exit(passed: bool) -> None:
    raise SystemExit(0 if passed else 7)
