"""GET /v1/stores/{name}/epochs/{epoch}: what a stream is made of, and what it is refused for."""

from __future__ import annotations

import json
import socket
import time
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import pytest
from safetensors.numpy import load

from softlabels import wire
from softlabels.errors import WireError
from softlabels.order import EpochConfig, EpochOrder
from softlabels.wire import parse_header, raw_header


def frames(body: bytes) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """Arrays and metadata of each frame; the safetensors library reads each."""
    found = []
    while body:
        layout = parse_header(memoryview(body))
        size = layout.data_begin + layout.data_bytes
        arrays = load(body[:size])
        del arrays[wire.CHECKSUM]
        found.append((arrays, dict(layout.metadata)))
        body = body[size:]
    return found


def check_sums(body: bytes, query: str, epoch: int) -> None:
    """Compare the checksum of each frame with that of the question, which goes on at the cursor before the frame."""
    keys = dict(parse_qsl(query))
    fields = keys.pop("fields").split(",") if "fields" in keys else None
    config = EpochConfig.from_query({**keys, "epoch": str(epoch)})
    digest = parse_header(memoryview(body)).metadata["digest"]
    question, cursor = wire.epoch_question(digest, config, fields=fields), config.cursor
    while body:
        layout = parse_header(memoryview(body))
        size = layout.data_begin + layout.data_bytes
        cursor = config.cursor if layout.metadata["format"] == wire.END_FORMAT else cursor
        assert wire.is_intact(memoryview(body)[:size], wire.frame_question(question, cursor))
        cursor, body = int(layout.metadata.get("cursor", -1)), body[size:]


def stream(ask: Any, name: str, query: str, epoch: int = 0) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """A whole stream's frames, the last one apart from arrays."""
    answer = ask("GET", f"/v1/stores/{name}/epochs/{epoch}?{query}")
    assert answer.status == 200, answer.body[:300]
    assert int(answer.headers["content-length"]) == len(answer.body)
    check_sums(answer.body, query, epoch)
    return frames(answer.body)


class TestStream:
    @pytest.mark.parametrize("name", ["dense", "halves", "sparse", "named"])
    def test_every_sample_comes_once_with_its_own_row(self, ask: Any, stores: Any, name: str) -> None:
        """In the order that the floor computes, whatever the ids are."""
        rows, manifest = stores.rows[name], stores.manifests[name]
        *batches, (nothing, end) = stream(ask, name, "seed=7&batch_size=32&fields=targets,labels", epoch=3)
        order = EpochOrder(manifest.digest, 100, seed=7, epoch=3).positions_at(np.arange(100))
        assert nothing == {}
        assert (end["format"], end["batches"], end["samples"], end["left_out"]) == ("softlabels-end/2", "4", "100", "0")
        np.testing.assert_array_equal(np.concatenate([b["labels"] for b, _ in batches]), rows.labels[order])
        decoded = np.concatenate([manifest.make_encoding().decode(arrays) for arrays, _ in batches])
        np.testing.assert_allclose(decoded, rows.logits_BC[order], rtol=2**-8)
        assert [metadata["cursor"] for _, metadata in batches] == ["32", "64", "96", "100"]

    def test_headers_have_one_length(self, ask: Any) -> None:
        """So the stream's length is known before its first row is read."""
        body = ask("GET", "/v1/stores/dense/epochs/0?seed=1&batch_size=48").body
        sizes = []
        while len(body) > 200 and b"softlabels-end" not in body[:200]:
            layout = parse_header(memoryview(body))
            sizes.append(len(raw_header(memoryview(body))))
            body = body[layout.data_begin + layout.data_bytes :]
        assert len(set(sizes)) == 1
        assert sizes[0] % 64 == 0

    def test_a_cursor_goes_on_where_it_stands(self, ask: Any) -> None:
        """What is left from a cursor is the tail of the whole, under another batch size too."""
        whole = [i for b, _ in stream(ask, "dense", "seed=1&batch_size=10")[:-1] for i in b["ids"].tolist()]
        rest = [i for b, _ in stream(ask, "dense", "seed=1&batch_size=16&cursor=40")[:-1] for i in b["ids"].tolist()]
        assert rest == whole[40:]

    def test_ranks_share_an_epoch(self, ask: Any) -> None:
        """As many batches each; together every sample once."""
        ranks = [stream(ask, "dense", f"seed=1&batch_size=9&world_size=3&rank={rank}")[:-1] for rank in range(3)]
        assert len({len(batches) for batches in ranks}) == 1
        assert sorted(i for batches in ranks for b, _ in batches for i in b["ids"].tolist()) == list(range(100))

    def test_padding_is_counted(self, ask: Any) -> None:
        """The last frame of a padded epoch says how many samples stand twice."""
        *_, (_, last), (_, end) = stream(ask, "dense", "seed=1&batch_size=30&remainder=pad")
        assert (last["repeated"], last["cursor"], end["samples"]) == ("20", "100", "120")

    def test_in_order(self, ask: Any) -> None:
        """Without a shuffle the samples come as the store has them."""
        batches = stream(ask, "dense", "seed=0&batch_size=60&shuffle=false")[:-1]
        assert [i for b, _ in batches for i in b["ids"].tolist()] == list(range(100))

    def test_an_epoch_that_is_over(self, ask: Any) -> None:
        """From its end on there is nothing but the end frame."""
        assert len(stream(ask, "dense", "seed=0&batch_size=60&cursor=100")) == 1

    def test_head(self, ask: Any) -> None:
        """The length alone."""
        answer = ask("HEAD", "/v1/stores/dense/epochs/0?seed=1&batch_size=48")
        assert (answer.status, answer.body) == (200, b"")
        assert int(answer.headers["content-length"]) > 2800


class TestRefusals:
    @pytest.mark.parametrize(
        ("query", "expected"),
        [
            ("batch_size=8", (422, "bad-request")),
            ("seed=1", (422, "bad-request")),
            ("seed=-1&batch_size=8", (422, "bad-request")),
            ("seed=1&batch_size=0", (422, "bad-request")),
            ("seed=1&batch_size=8&rank=1", (422, "bad-request")),
            ("seed=1&batch_size=8&cursor=101", (422, "bad-request")),
            ("seed=1&batch_size=8&shuffle=maybe", (422, "bad-request")),
            ("seed=1&batch_size=8&remainder=keep", (422, "bad-request")),
            ("seed=1&batch_size=8&view=0", (422, "bad-request")),
            ("seed=1&batch_size=8&lot=3", (422, "bad-request")),
            ("seed=1&batch_size=8&fields=x", (422, "unknown-field")),
            ("seed=1&batch_size=8&digest=0", (412, "store-changed")),
            ("seed=1&batch_size=8&transfer_set=0", (409, "fingerprint-mismatch")),
            ("seed=1&batch_size=99999999", (413, "batch-too-large")),
        ],
    )
    def test_before_the_first_byte(self, ask: Any, query: str, expected: tuple[int, str]) -> None:
        """A request that makes no sense gets problem details and no stream."""
        assert ask("GET", f"/v1/stores/dense/epochs/0?{query}").problem() == expected

    def test_an_unfinished_store_has_no_epoch(self, ask: Any) -> None:
        """It would be a short one."""
        answer = ask("GET", "/v1/stores/begun/epochs/0?seed=1&batch_size=8")
        assert answer.problem() == (409, "rows-not-committed")

    def test_other_forms(self, ask: Any) -> None:
        """A stream is safetensors or nothing."""
        answer = ask("GET", "/v1/stores/dense/epochs/0?seed=1&batch_size=8", accept="application/json")
        assert answer.problem() == (406, "bad-request")


class TestSlowReaders:
    def test_a_reader_that_stops_is_let_go(self, serve: Any, stores: Any) -> None:
        """After `stall_timeout_s`; others are answered meanwhile."""
        ask = serve(stores.root, stall_timeout_s=0.5)
        with socket.create_connection((ask.host, ask.port)) as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            query = "seed=0&batch_size=1&world_size=1&" + "fields=targets,fingerprints,labels"
            reader.sendall(f"GET /v1/stores/dense/epochs/0?{query} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            began = time.monotonic()
            assert json.loads(ask("GET", "/health").body)["status"] == "ok"
            assert time.monotonic() - began < 5


def test_a_cut_frame_is_an_error() -> None:
    """A header that announces more than there is."""
    with pytest.raises(WireError):
        raw_header(memoryview((99).to_bytes(8, "little") + b"{}"))
