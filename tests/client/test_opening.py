"""`softlabels.open` near and far: the same object, the same arrays, the same errors."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softlabels
from softlabels.errors import (
    BadIdsError,
    EmptyBatchError,
    FingerprintMismatchError,
    RequestError,
    ServerUnreachableError,
    ShapeMismatchError,
    StoreChangedError,
    TemperatureError,
    TemperatureLockedError,
    UnauthorizedError,
    UnknownIdError,
    UnknownStoreError,
)
from softlabels.manifest import TemperatureSpec
from softlabels.transfer_set import ArrayTransferSet

IDS = [7, 0, 199, 7, 30]


@pytest.fixture(params=["path", "url"])
def where(request: pytest.FixtureRequest, tiny_store: Path) -> str | Path:
    """The tiny store, on this disk and behind a server in a process of its own."""
    return tiny_store if request.param == "path" else str(request.getfixturevalue("served_store"))


@pytest.fixture
def store(where: str | Path) -> Iterator[softlabels.TargetStore]:
    """The tiny store, opened."""
    with softlabels.open(where) as opened:
        yield opened


class TestSameObject:
    def test_near_and_far_are_one_class_with_one_content(self, served_store: str, tiny_store: Path) -> None:
        """A trainer does not change when its targets move."""
        with softlabels.open(tiny_store) as near, softlabels.open(served_store) as far:
            assert type(near) is type(far) is softlabels.TargetStore
            assert near.manifest == far.manifest
            assert (near.digest, len(near)) == (far.digest, len(far))
            here, there = (opened.batch(IDS, fingerprints=True) for opened in (near, far))
        assert type(here) is type(there)
        for name in ("ids", "labels", "fingerprints"):
            np.testing.assert_array_equal(getattr(here, name), getattr(there, name))
        np.testing.assert_array_equal(here.encoded["targets"], there.encoded["targets"])
        np.testing.assert_array_equal(here.p(2.5), there.p(2.5))
        assert (here.temperature, here.store_digest) == (there.temperature, there.store_digest) == (4.0, far.digest)

    def test_rows_come_in_the_order_asked(self, store: softlabels.TargetStore) -> None:
        """Repeated ids are repeated rows."""
        batch, single = store.batch(IDS), {i: store.batch([i]).logits()[0] for i in set(IDS)}
        assert batch.ids.tolist() == IDS
        for row, sample_id in zip(batch.logits(), IDS, strict=True):
            np.testing.assert_array_equal(row, single[sample_id])

    def test_labels_only_where_wanted(self, store: softlabels.TargetStore) -> None:
        """−1 marks the unlabelled; without labels there are none."""
        labels = store.batch(IDS).labels
        assert labels is not None
        assert [bool(label == -1) for label in labels] == [False, True, False, False, True]
        assert store.batch(IDS, labels=False).labels is None

    def test_a_copy_from_a_pickle_reads_the_same_rows(self, store: softlabels.TargetStore) -> None:
        """What a spawned worker gets."""
        with pickle.loads(pickle.dumps(store)) as copy:
            np.testing.assert_array_equal(copy.batch(IDS).logits(), store.batch(IDS).logits())

    def test_threads_share_it(self, store: softlabels.TargetStore) -> None:
        """Every thread gets its own rows."""
        expected = store.batch(range(200)).logits()

        def is_right(seed: int) -> bool:
            ids = np.random.default_rng(seed).integers(0, 200, 32)
            return np.array_equal(store.batch(ids).logits(), expected[ids])

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(is_right, range(40)))

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_child_processes_share_it(self, store: softlabels.TargetStore, method: str) -> None:
        """Forked after use or spawned, a child reads the right rows and leaves the parent's connections alone."""
        expected = store.batch(IDS).logits()
        with multiprocessing.get_context(method).Pool(2) as pool:
            for found in pool.starmap(_logits, [(store, IDS)] * 4):
                np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(store.batch(IDS).logits(), expected)


def _logits(store: softlabels.TargetStore, ids: list[int]) -> Any:
    return store.batch(ids).logits()


class TestStringIds:
    def test_names_pair_as_numbers_do(self, tmp_path: Path, make_store: Any, serve: Any) -> None:
        """File names, Unicode and all, in any order, near and far."""
        names = np.array(["b.png", "a.png", "dir/ünï.png", "z" * 16])
        data = ArrayTransferSet("named", np.arange(8, dtype=np.float32).reshape(4, 2), ids=names)
        root = make_store(tmp_path / "stores" / "named", data, np.eye(4, 3, dtype=np.float32))
        asked = ["dir/ünï.png", "a.png", "z" * 16, "a.png"]
        for place in (root, f"{serve(root.parent)}/named"):
            with softlabels.open(place) as store:
                batch = store.batch(asked)
                assert batch.ids.tolist() == asked
                assert batch.logits().tolist() == [[-1, -1, 0], [-1, 0, -1], [0, 0, 0], [-1, 0, -1]]
                for ids, error in ((["c.png"], UnknownIdError), ([1], BadIdsError), (["ü" * 20], UnknownIdError)):
                    with pytest.raises(error):
                        store.batch(ids)


class TestToken:
    def test_a_server_with_a_token_asks_for_it(self, tiny_store: Path, tmp_path: Path, serve: Any) -> None:
        """With it rows come, without it an error that names the argument."""
        secret = tmp_path / "token"
        secret.write_text("s3cret\n")
        url = serve(tiny_store, "--port", "0", "--token-file", str(secret)) + "/tiny"
        with softlabels.open(url, token="s3cret") as store:
            assert len(store.batch(IDS)) == 5
        for token in (None, "guess"):
            with pytest.raises(UnauthorizedError, match="token"):
                softlabels.open(url, token=token)


class TestRestart:
    def test_a_killed_server_that_comes_back_is_waited_for(self, tiny_store: Path, serve: Any) -> None:
        """Batches go on with every row right; nothing is asked of the trainer."""
        url = serve(tiny_store)
        port = url.rpartition(":")[2]
        with softlabels.open(f"{url}/tiny") as store:
            expected = store.batch(IDS).logits()
            serve.processes[0].kill()
            serve.processes[0].wait()
            back = threading.Timer(0.5, serve, (tiny_store, "--port", port))
            back.start()
            np.testing.assert_array_equal(store.batch(IDS).logits(), expected)
            back.join()


class TestSameErrors:
    @pytest.mark.parametrize(
        ("call", "error", "words"),
        [
            (lambda s: s.batch([]), EmptyBatchError, "at least one id"),
            (lambda s: s.batch([0, 200]), UnknownIdError, "200"),
            (lambda s: s.batch([-1]), UnknownIdError, "-1"),
            (lambda s: s.batch(["a"]), BadIdsError, "integers, not strings"),
            (lambda s: s.batch([1.5]), BadIdsError, "integers or all strings"),
            (lambda s: s.batch([[1]]), BadIdsError, "one-dimensional"),
            (lambda s: s.batch([0], temperature=0), TemperatureError, "above 0"),
            (lambda s: s.batch([0], temperature=float("nan")), TemperatureError, "nan"),
            (lambda s: s.batch([0], temperature="4"), TemperatureError, "'4'"),
            (lambda s: s.require(transfer_set="00-1"), FingerprintMismatchError, "row i there is not your row i"),
            (lambda s: s.require(classes=1000), ShapeMismatchError, "1000 classes"),
        ],
    )
    def test_a_bad_call_is_the_same_error(
        self, store: softlabels.TargetStore, call: Any, error: type[Exception], words: str
    ) -> None:
        """Of the same class, with the same words, wherever the store lies."""
        with pytest.raises(error, match=words) as caught:
            call(store)
        assert type(caught.value) is error

    def test_an_unknown_id_is_named_to_programs_too(self, store: softlabels.TargetStore) -> None:
        """The error's context travels over HTTP."""
        with pytest.raises(UnknownIdError) as caught:
            store.batch([3, 500, 501])
        assert caught.value.context["ids"] == [500, 501]

    def test_an_unknown_store(self, where: str | Path) -> None:
        """A wrong name is told from a wrong server."""
        with pytest.raises(UnknownStoreError, match="tiny-one"):
            softlabels.open(str(where) + "-one")

    def test_a_damaged_store(self, tiny_store: Path, tmp_path: Path, serve: Any) -> None:
        """A flipped bit is an error on either side, never a row."""
        copy = tmp_path / "stores" / "tiny"
        shutil.copytree(tiny_store, copy)
        for shard in sorted((copy / "targets").rglob("*")):
            if shard.is_file() and shard.stat().st_size > 200:
                damaged = bytearray(shard.read_bytes())
                damaged[100] ^= 1
                shard.write_bytes(damaged)
        url = serve(copy.parent)
        seen = []
        for place in (copy, f"{url}/tiny"):
            with softlabels.open(place) as store, pytest.raises(OSError, match="targets") as caught:
                store.batch(range(200))
            seen.append((type(caught.value), str(caught.value)))
        assert seen[0] == seen[1]

    def test_a_locked_temperature(self, tmp_path: Path, make_store: Any, serve: Any) -> None:
        """An arithmetic mean's targets are had at one temperature, on either side."""
        locked = TemperatureSpec(default=3.0, captured=3.0, locked=True)
        data = ArrayTransferSet("data", np.zeros((4, 2), np.float32))
        root = make_store(tmp_path / "stores" / "mean", data, np.eye(4, 3, dtype=np.float32), temperature=locked)
        for place in (root, f"{serve(root.parent)}/mean"):
            with softlabels.open(place) as store:
                assert store.batch([1]).temperature == 3.0
                with pytest.raises(TemperatureLockedError, match="captured at temperature 3"):
                    store.batch([1], temperature=4.0)

    def test_a_string_that_is_no_place(self) -> None:
        """Other schemes are refused with the ones there are."""
        with pytest.raises(UnknownStoreError, match="folders and http"):
            softlabels.open("s3://bucket/tiny")

    def test_a_store_replaced_behind_an_open_one(self, tmp_path: Path, make_store: Any, serve: Any) -> None:
        """Rows of two versions are never mixed; opening again gives the new one."""
        data = ArrayTransferSet("data", np.zeros((4, 2), np.float32))
        root = make_store(tmp_path / "stores" / "moving", data, np.zeros((4, 3), np.float32))
        url = f"{serve(root.parent)}/moving"
        with softlabels.open(url) as store:
            store.batch([0])
            shutil.rmtree(root)
            make_store(root, data, np.eye(4, 3, dtype=np.float32))
            with pytest.raises(StoreChangedError, match="open the store again"):
                store.batch([0])
        with softlabels.open(url) as store:
            assert store.batch([0]).logits()[0].tolist() == [0, -1, -1]

    def test_no_server(self) -> None:
        """The URL and what to check."""
        with pytest.raises(ServerUnreachableError, match=r"127\.0\.0\.1:1.*check that"):
            softlabels.open("http://127.0.0.1:1/tiny", timeout_s=5)

    def test_a_timeout_that_cannot_be(self) -> None:
        """Refused before anything is sent."""
        with pytest.raises(RequestError, match="timeout_s"):
            softlabels.open("http://127.0.0.1:1/tiny", timeout_s=0)
