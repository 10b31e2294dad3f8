"""Replies that are whole and no answer: changed on the way, of another question, doubled, or of a damaged store."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.errors import ChecksumError, ManifestError, SoftLabelsError
from softlabels.row_sums import crc32c
from softlabels_client import HttpRows, RetryPolicy

Change = Callable[[str, bytes], bytes]
"""What a relay makes of the body of a reply; the first argument is the request's path."""

QUICK = RetryPolicy(first_pause_s=0.01, longest_pause_s=0.02)


class Relay:
    """Passes requests on to a server and its replies back, changed as a test likes.

    Attributes:
        change: what is done to each body.
        ask: what is done to each request's body.
        twice: send each reply to a batch twice.
        verified: how many requests asked for verified rows.
    """

    def __init__(self, target: str) -> None:
        self.change: Change = lambda path, body: body
        self.ask: Callable[[bytes], bytes] = lambda body: body
        self.twice = False
        self.verified = 0
        relay, host = self, target.removeprefix("http://")

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = relay.ask(self.rfile.read(int(self.headers.get("Content-Length", "0"))))
                relay.verified += "Softlabels-Verify" in self.headers
                upstream = http.client.HTTPConnection(host)
                upstream.request(self.command, self.path, body=body or None, headers=dict(self.headers))
                reply = upstream.getresponse()
                announced = reply.getheader("Content-Length")
                try:
                    answer = reply.read()
                except http.client.IncompleteRead as cut:
                    answer = cut.partial
                upstream.close()
                answer = relay.change(self.path, answer)
                head = f"HTTP/1.1 {reply.status} Relayed\r\nContent-Length: {announced}\r\n"
                head += f"Content-Type: {reply.getheader('Content-Type')}\r\n\r\n"
                times = 2 if relay.twice and "batch" in self.path else 1
                self.wfile.write((head.encode() + answer) * times)
                self.close_connection = len(answer) != int(announced or 0)

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                """Quietly."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


Relayed = Callable[[str], Relay]


@pytest.fixture
def relayed() -> Iterator[Relayed]:
    """Start a relay before a server."""
    relays: list[Relay] = []

    def start(target: str) -> Relay:
        relays.append(Relay(target))
        return relays[-1]

    yield start
    for relay in relays:
        relay.close()


def exchanged(body: bytes, size: int) -> bytes:
    """The body with two different blocks of this size exchanged, the header left as it is."""
    begin = 8 + int.from_bytes(body[:8], "little")
    other = next(
        at for at in range(begin + size, len(body), size) if body[begin : begin + size] != body[at : at + size]
    )
    parts = body[:begin], body[begin : begin + size], body[begin + size : other], body[other : other + size]
    return parts[0] + parts[3] + parts[2] + parts[1] + body[other + size :]


class TestOnTheWay:
    @pytest.mark.parametrize("size", [1, 2, 4, 8, 64])
    def test_exchanged_bytes_words_and_blocks_are_noticed(self, url: str, relayed: Relayed, size: int) -> None:
        """A sum of words is the same in any order."""
        relay = relayed(url)
        rows = HttpRows(f"{relay.url}/views", retry=QUICK)
        relay.change = lambda path, body: exchanged(body, size)
        with pytest.raises(ChecksumError, match="on the way"):
            rows.fetch(np.arange(16), ("targets",), views=np.zeros(16, np.int64))
        assert relay.verified == 1

    def test_a_batch_changed_once_is_asked_for_again_once(self, url: str, folder: Path, relayed: Relayed) -> None:
        """On a new connection, and the server compares its rows with what was written."""
        relay = relayed(url)
        rows = HttpRows(f"{relay.url}/members", retry=QUICK)
        changes = iter([lambda body: exchanged(body, 8)])
        relay.change = lambda path, body: next(changes, lambda body: body)(body)
        assert rows.fetch(np.arange(16), ("ids",))["ids"].tolist() == list(range(16))
        assert relay.verified == 1

    def test_frames_and_the_last_frame_too(self, url: str, relayed: Relayed) -> None:
        """A stream is asked for again at the cursor of the frame that failed, and goes on."""
        from softlabels.order import EpochConfig

        relay = relayed(url)
        rows = HttpRows(f"{relay.url}/members", retry=QUICK)
        config = EpochConfig(seed=1, epoch=0, batch_size=8)
        whole = [step.ids.tolist() for step in rows.epoch(config, ("targets",))]
        for share in (0.1, 0.5, 0.999):
            flipped = iter([share])

            def flip(path: str, body: bytes) -> bytes:
                share = next(flipped, None)  # noqa: B023  used up before the next round
                if share is None:
                    return body
                at = int(share * len(body))
                return body[:at] + bytes([body[at] ^ 4]) + body[at + 1 :]

            relay.change = flip
            assert [step.ids.tolist() for step in rows.epoch(config, ("targets",))] == whole
        relay.change = lambda path, body: exchanged(body, 8)
        with pytest.raises(ChecksumError, match="on the way"):
            list(rows.epoch(config, ("targets",)))

    def test_a_flipped_bit_of_learnt_arrays_is_noticed(self, url: str, relayed: Relayed) -> None:
        """The manifest has the SHA-256 of each; rows decoded with others are wrong."""
        relay = relayed(url)
        rng = np.random.default_rng(0)
        for _ in range(20):
            relay.change = lambda path, body: body
            rows = HttpRows(f"{relay.url}/learnt", retry=QUICK)

            def flip(path: str, body: bytes) -> bytes:
                at = int(rng.integers(8 + int.from_bytes(body[:8], "little"), len(body)))
                return body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]

            relay.change = flip
            with pytest.raises(ChecksumError):
                _ = rows.encoding

    @pytest.mark.parametrize("store", ["dense", "begun"])
    def test_a_description_is_compared_with_its_digest(
        self, serve: Any, stores: Any, relayed: Relayed, store: str
    ) -> None:
        """That of an unfinished store as well."""
        relay = relayed(serve(stores.root).base)
        assert HttpRows(f"{relay.url}/{store}", retry=QUICK).manifest.temperature.default == 4.0
        relay.change = lambda path, body: body.replace(b'"default":4.0', b'"default":5.0')
        with pytest.raises(ManifestError, match="announced"):
            HttpRows(f"{relay.url}/{store}", retry=QUICK)

    def test_a_doubled_reply_does_not_put_the_connection_out_of_step(self, url: str, relayed: Relayed) -> None:
        """Every honest reply after it is taken."""
        relay = relayed(url)
        rows = HttpRows(f"{relay.url}/members", retry=QUICK)
        for round_number in range(3):
            relay.twice = True
            with contextlib.suppress(SoftLabelsError):
                rows.fetch(np.arange(4), ("ids",))
            relay.twice = False
            for first in range(20):
                wanted = np.arange(first, first + 4 + round_number)
                assert rows.fetch(wanted, ("ids",))["ids"].tolist() == wanted.tolist()


class TestOtherQuestions:
    def test_an_earlier_reply_is_not_taken_for_another_view(self, url: str, folder: Path, relayed: Relayed) -> None:
        """Ids, shapes and version are the same, and the rows are not."""
        relay = relayed(url)
        rows = HttpRows(f"{relay.url}/views", retry=QUICK)
        kept: list[bytes] = []
        relay.change = lambda path, body: kept.append(body) or kept[0]  # type: ignore[func-returns-value]
        ids = np.arange(8)
        rows.fetch(ids, ("targets",), views=np.zeros(8, np.int64))
        with pytest.raises(ChecksumError):
            rows.fetch(ids, ("targets",), views=np.ones(8, np.int64))

    def test_views_flipped_in_the_request_are_noticed(self, url: str, relayed: Relayed) -> None:
        """The server answers another question than was asked."""
        relay = relayed(url)
        rows = HttpRows(f"{relay.url}/views", retry=QUICK)
        relay.ask = lambda body: body[:-8] + (1).to_bytes(8, "little")
        with pytest.raises(ChecksumError):
            rows.fetch(np.arange(8), ("targets",), views=np.zeros(8, np.int64))

    def test_another_span_of_equal_length_is_noticed(self, url: str, relayed: Relayed) -> None:
        """Row offsets count from 0, wherever the span begins."""
        relay = relayed(url)
        rows = HttpRows(f"{relay.url}/sequences", retry=QUICK)
        kept: list[bytes] = []
        relay.change = lambda path, body: kept.append(body) or kept[0]  # type: ignore[func-returns-value]
        rows.fetch(np.array([4]), ("targets",), spans=np.array([[0, 2]]))
        with pytest.raises(ChecksumError):
            rows.fetch(np.array([4]), ("targets",), spans=np.array([[1, 3]]))

    @pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 2}, {"view": 2}, {"shuffle": False}])
    def test_a_stream_of_another_epoch_is_noticed(self, url: str, relayed: Relayed, other: dict[str, Any]) -> None:
        """In the order of the other one, and so with other rows at each step."""
        from softlabels.order import EpochConfig

        relay = relayed(url)
        rows = HttpRows(f"{relay.url}/texts" if other != {"view": 2} else f"{relay.url}/views", retry=QUICK)
        kept: list[bytes] = []
        relay.change = lambda path, body: kept.append(body) or kept[0]  # type: ignore[func-returns-value]
        options = {"seed": 1, "epoch": 0, "batch_size": 8}
        list(rows.epoch(EpochConfig(**options), ("targets",)))
        with pytest.raises(ChecksumError):
            list(rows.epoch(EpochConfig(**{**options, **other}), ("targets",)))


def test_other_formats_carry_the_checksum_of_question_and_body_in_a_header(ask: Any) -> None:
    """Each changed bit of the body, and each other question, has another; `Asker` compares it with its own."""
    for accept in ("application/json", "application/x-npy", "application/vnd.apache.arrow.stream"):
        for ids in ([1, 2], [2, 1]):
            answer = ask.batch("dense", {"ids": ids, "fields": ["targets"], "decode": "p"}, accept=accept)
            assert answer.status == 200
            assert answer.question is not None
            question = answer.question(answer.headers["softlabels-digest"])
            assert int(answer.headers["softlabels-crc32c"], 16) == crc32c(answer.body, question)
            assert int(answer.headers["softlabels-crc32c"], 16) != crc32c(answer.body)


def flip_stored(root: Path, row: int) -> None:
    """Change a byte of a row of `targets` behind the server's back: nothing reports it, and size and time are kept."""
    from softlabels.store.ledger import Ledger
    from softlabels.store.store_documents import load_manifest

    manifest = load_manifest(root)
    shard, within = divmod(row, manifest.shards.rows_per_shard)
    part = Ledger(root, manifest).read(shard).parts["targets"]
    chunk, within = divmod(within, manifest.shards.rows_per_chunk)
    at = part.offset + chunk * part.stride + within * manifest.arrays["targets"].row_bytes
    with (root / part.path).open("r+b", buffering=0) as file:
        file.seek(at)
        old = file.read(1)
        file.seek(at)
        file.write(bytes([old[0] ^ 1]))


class TestDamage:
    @pytest.fixture
    def damaged(self, serve: Any, write: Any, rows_of: Any, tmp_path: Path) -> tuple[Any, Path]:
        """A server over a store of which row 70 is damaged."""
        root = tmp_path / "stores" / "dense"
        write(root, rows_of(0))
        flip_stored(root, 70)
        return serve(root.parent), root

    def test_a_stream_ends_with_the_very_problem(
        self, damaged: tuple[Any, Path], caplog: pytest.LogCaptureFixture
    ) -> None:
        """At the frame of the damaged row, at once, and without an error of the application in the log."""
        from softlabels.order import EpochConfig

        asker, _ = damaged
        rows = HttpRows(f"{asker.base}/dense", retry=RetryPolicy(first_pause_s=30))
        steps = rows.epoch(EpochConfig(seed=0, epoch=0, batch_size=8, shuffle=False), ("targets",))
        assert [i for _ in range(8) for i in next(steps).ids.tolist()] == list(range(64))
        with pytest.raises(ChecksumError, match="softlabels verify") as caught:
            next(steps)
        assert caught.value.context["field"] == "targets"
        messages = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert [message for message in messages if "RuntimeError" in message or "Exception in" in message] == []
        assert sum("GET /v1/stores/dense/epochs/0" in message for message in messages) == 1

    def test_a_frame_that_was_begun_is_asked_for_again_and_then_told(
        self, serve: Any, write: Any, rows_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With chunks smaller than a frame, the damage is met when a part of it is sent."""
        from softlabels.order import EpochConfig
        from softlabels_server.fast_path import socket_writer

        monkeypatch.setattr(socket_writer, "SMALL_CHUNK_BYTES", 256)
        root = tmp_path / "stores" / "dense"
        write(root, rows_of(0))
        flip_stored(root, 70)
        rows = HttpRows(f"{serve(root.parent).base}/dense", retry=QUICK)
        with pytest.raises(ChecksumError, match="softlabels verify"):
            list(rows.epoch(EpochConfig(seed=0, epoch=0, batch_size=100, shuffle=False), ("targets",)))

    def test_an_error_longer_than_the_last_frame_is_shortened(self, serve: Any, stores: Any) -> None:
        """It must fit into what was announced."""
        from softlabels.wire import parse_header, problem_in
        from softlabels_server.api.epochs import plan_stream
        from softlabels_server.catalog import StoreFolder
        from softlabels_server.settings import Settings

        store = StoreFolder(stores.root).get("dense")
        stream = plan_stream(store, "0", "seed=1&batch_size=8", Settings())
        for error in (ChecksumError("x" * 9000), ChecksumError("short", rows=list(range(9000)))):
            frame = stream._error_frame(error, 0)
            assert len(frame) == len(stream.end_frame)
            found = problem_in(parse_header(frame))
            assert type(found) is ChecksumError
            assert found.message in (error.message, error.message[:500])

    def test_a_server_that_verifies_names_the_row(self, damaged: tuple[Any, Path]) -> None:
        """Also where the chunk was sound when it was first read: its rows are compared with the sums that were kept."""
        asker, root = damaged
        flip_stored(root, 70)  # sound again
        rows = HttpRows(f"{asker.base}/dense", retry=QUICK)
        rows.fetch(np.arange(100), ("targets",))
        memory = json.dumps({"ids": [70]})
        assert asker.batch("dense", memory).status == 200
        flip_stored(root, 70)
        for _ in range(2):
            with pytest.raises(ChecksumError):
                rows.fetch(np.array([69, 70]), ("targets",))
