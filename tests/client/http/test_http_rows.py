"""Rows of a served store: a right row in its place or an error, whatever the server says."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softlabels.errors import (
    ChecksumError,
    FormatVersionError,
    ManifestError,
    RequestError,
    SoftLabelsError,
    StoreChangedError,
    TruncatedError,
    UnknownFieldError,
    WireError,
)
from softlabels_client import HttpRows, RetryPolicy

IDS = np.array([5, 3, 199, 3, 0])
FIELDS = ("targets", "labels")


def opened(peer: Any, impostor: Any, retry: RetryPolicy, *acts: Any) -> HttpRows:
    """Rows of the tiny store as the impostor serves them, whose batches are these acts."""
    peer.acts = [impostor.describe(), *acts]
    return HttpRows(f"{peer.url}/tiny", retry=retry)


class TestFetch:
    def test_rows_are_those_on_disk(self, peer: Any, impostor: Any, quick: RetryPolicy) -> None:
        """In the order asked, repeated where asked, as read-only views of one reply."""
        rows = opened(peer, impostor, quick, impostor.batch())
        found, expected = rows.fetch(IDS, FIELDS), impostor.rows.fetch(IDS, FIELDS)
        assert list(found) == list(FIELDS)
        for name in FIELDS:
            np.testing.assert_array_equal(found[name], expected[name])
            assert found[name].dtype == expected[name].dtype
            assert not found[name].flags.writeable
            assert not found[name].flags.owndata

    def test_a_batch_is_one_request_that_names_the_version(self, peer: Any, impostor: Any, quick: RetryPolicy) -> None:
        """Integer ids travel as bytes; the ids always come back."""
        opened(peer, impostor, quick, impostor.batch()).fetch(IDS, FIELDS)
        assert len(peer.asked) == 2
        asked = peer.asked[1]
        assert (asked.method, asked.headers["content-type"]) == ("POST", "application/octet-stream")
        assert asked.target == f"/v1/stores/tiny/batch?fields=targets,labels,ids&digest={impostor.rows.digest}"
        assert asked.body == IDS.astype("<i8").tobytes()

    def test_a_field_that_the_store_lacks_is_not_asked_for(self, peer: Any, impostor: Any, quick: RetryPolicy) -> None:
        """The manifest says what there is."""
        rows = opened(peer, impostor, quick, impostor.batch())
        with pytest.raises(UnknownFieldError, match="has no 'audio'"):
            rows.fetch(IDS, ("audio",))
        assert len(peer.asked) == 1

    def test_views_and_spans_are_refused(self, peer: Any, impostor: Any, quick: RetryPolicy) -> None:
        """A store of one row a sample has none, as on disk."""
        rows = opened(peer, impostor, quick, impostor.batch())
        for source in (rows, impostor.rows):
            with pytest.raises(RequestError, match="keeps one row a sample"):
                source.fetch(IDS, FIELDS, views=np.zeros(5, np.int64))

    def test_it_pickles_without_asking_again(self, peer: Any, impostor: Any, quick: RetryPolicy) -> None:
        """A worker begins with its first batch."""
        rows = opened(peer, impostor, quick, impostor.batch())
        copy = pickle.loads(pickle.dumps(rows))
        np.testing.assert_array_equal(copy.fetch(IDS, ("ids",))["ids"], IDS)
        assert copy.digest == rows.digest
        assert len(peer.asked) == 2


def _swapped_rows(arrays: dict[str, Any], metadata: dict[str, str]) -> None:
    for name in arrays:
        arrays[name] = arrays[name][[1, 0, 2, 3, 4]]


def _one_row_less(arrays: dict[str, Any], metadata: dict[str, str]) -> None:
    for name in arrays:
        arrays[name] = arrays[name][:-1]


def _another_id(arrays: dict[str, Any], metadata: dict[str, str]) -> None:
    arrays["ids"] = arrays["ids"] + np.array([0, 0, 0, 0, 1])


def _other_type(arrays: dict[str, Any], metadata: dict[str, str]) -> None:
    arrays["targets"] = arrays["targets"].astype("<f4")


def _same_bytes_other_shape(arrays: dict[str, Any], metadata: dict[str, str]) -> None:
    arrays["targets"] = arrays["targets"].reshape(10, 5)


def _no_ids(arrays: dict[str, Any], metadata: dict[str, str]) -> None:
    del arrays["ids"]


def _no_targets(arrays: dict[str, Any], metadata: dict[str, str]) -> None:
    del arrays["targets"]


class TestLies:
    @pytest.mark.parametrize(
        "lie",
        [_swapped_rows, _one_row_less, _another_id, _other_type, _same_bytes_other_shape, _no_ids, _no_targets],
        ids=lambda lie: lie.__name__.strip("_"),
    )
    def test_a_reply_that_is_not_what_was_asked_for_is_refused(
        self, peer: Any, impostor: Any, quick: RetryPolicy, lie: Any
    ) -> None:
        """A wrong row cannot pass: ids, order, count, types and shapes are compared with the question and manifest."""
        rows = opened(peer, impostor, quick, impostor.batch(lie))
        with pytest.raises(WireError):
            rows.fetch(IDS, FIELDS)

    @pytest.mark.parametrize("digest", ["0" * 64, None])
    def test_rows_of_another_version_are_refused(
        self, peer: Any, impostor: Any, quick: RetryPolicy, digest: str | None
    ) -> None:
        """A store replaced under the same name is an error, even where every row fits."""

        def change(arrays: dict[str, Any], metadata: dict[str, str]) -> None:
            metadata.pop("digest")
            if digest is not None:
                metadata["digest"] = digest

        rows = opened(peer, impostor, quick, impostor.batch(change))
        with pytest.raises(StoreChangedError, match="open the store again"):
            rows.fetch(IDS, FIELDS)

    @settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(share=st.floats(0, 1, exclude_max=True))
    def test_a_file_cut_anywhere_is_an_error(self, peer: Any, impostor: Any, quick: RetryPolicy, share: float) -> None:
        """Also where the length of the reply agrees with what is left of it."""
        blob = impostor.blob(IDS)
        peer.asked.clear()
        rows = opened(peer, impostor, quick, peer.whole(200, blob[: int(share * len(blob))]))
        with pytest.raises(ChecksumError):
            rows.fetch(IDS, FIELDS)

    @settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
    def test_a_flipped_bit_anywhere_is_an_error(
        self, peer: Any, impostor: Any, quick: RetryPolicy, share: float, bit: int
    ) -> None:
        """In the header, an array or the checksum: the batch is asked for again once, with the rows verified."""
        damaged = bytearray(impostor.blob(IDS))
        damaged[int(share * len(damaged))] ^= 1 << bit
        peer.asked.clear()
        rows = opened(peer, impostor, quick, peer.whole(200, bytes(damaged)))
        with pytest.raises(ChecksumError, match="on the way"):
            rows.fetch(IDS, FIELDS)
        assert [asked.headers.get("softlabels-verify") for asked in peer.asked] == [None, None, "1"]
        assert peer.asked[1].connection != peer.asked[2].connection

    def test_a_reply_cut_by_the_link_is_an_error(self, peer: Any, impostor: Any, quick: RetryPolicy) -> None:
        """Each time, after every retry."""
        blob = impostor.blob(IDS)
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(blob)
        rows = opened(peer, impostor, quick, peer.raw(head + blob[:-1]))
        with pytest.raises(TruncatedError):
            rows.fetch(IDS, FIELDS)
        assert len(peer.asked) == 1 + quick.attempts

    def test_a_reply_far_too_large_is_not_read(self, peer: Any, impostor: Any, quick: RetryPolicy) -> None:
        """The manifest tells how large a batch can be."""
        rows = opened(peer, impostor, quick, peer.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n"))
        with pytest.raises(WireError, match="99999999"):
            rows.fetch(IDS, FIELDS)


class TestDescription:
    @pytest.mark.parametrize(
        "body", [b"", b"<html>", b"[]", b"{}", b'{"digest": "a"}', b'{"manifest": [], "digest": "a"}', b"[" * 100_000]
    )
    def test_what_is_no_description_is_refused(self, peer: Any, quick: RetryPolicy, body: bytes) -> None:
        """Another service on that port is told from a store."""
        peer.acts = [peer.whole(200, body)]
        with pytest.raises(WireError, match="description"):
            HttpRows(f"{peer.url}/tiny", retry=quick)

    def test_a_manifest_that_is_not_the_announced_version_is_refused(
        self, peer: Any, impostor: Any, quick: RetryPolicy
    ) -> None:
        """A byte changed on the way, or a cache that mixes versions."""
        manifest = impostor.rows.manifest.to_json()
        manifest["temperature"] = {**manifest["temperature"], "default": 9.0}
        peer.acts = [impostor.describe(manifest=manifest)]
        with pytest.raises(ManifestError, match="announced"):
            HttpRows(f"{peer.url}/tiny", retry=quick)

    def test_a_newer_format_asks_for_an_upgrade(self, peer: Any, impostor: Any, quick: RetryPolicy) -> None:
        """As it does on disk."""
        manifest = {**impostor.rows.manifest.to_json(), "format_version": 999}
        peer.acts = [impostor.describe(manifest=manifest)]
        with pytest.raises(FormatVersionError, match="upgrade"):
            HttpRows(f"{peer.url}/tiny", retry=quick)

    @settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner)
        )
    )
    def test_hostile_manifests_end_in_our_errors(self, peer: Any, impostor: Any, quick: RetryPolicy, junk: Any) -> None:
        """Nothing else comes out, whatever stands in one of its tables."""
        peer.asked.clear()
        for key in ("layout", "encoding", "arrays", "ids"):
            peer.acts = [impostor.describe(manifest={**impostor.rows.manifest.to_json(), key: junk})]
            with pytest.raises(SoftLabelsError):
                HttpRows(f"{peer.url}/tiny", retry=quick)


def test_a_served_store_is_read_with_the_same_rows_as_its_files(served_store: str, tiny_store: Path) -> None:
    """Every byte of every array, from a real server in a process of its own."""
    from softlabels.store import LocalRows

    far, near = HttpRows(served_store), LocalRows(tiny_store)
    ids = np.random.default_rng(0).permutation(200)
    fields = ("targets", "labels", "fingerprints", "ids")
    expected = near.fetch(ids, fields)
    for name, array in far.fetch(ids, fields).items():
        np.testing.assert_array_equal(array, expected[name])
    assert far.digest == near.digest
    assert far.manifest == near.manifest
    far.close()
