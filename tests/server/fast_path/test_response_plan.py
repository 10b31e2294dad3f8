"""Repeated batch requests: the fast path answers them exactly as the application does."""

from __future__ import annotations

import shutil
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np

from softlabels.wire import from_bytes
from softlabels_server.fast_path import response_plan


def many(ask: Any, name: str, count: int, rng: np.random.Generator, query: str = "") -> list[Any]:
    """The same request with other ids, over one connection and more."""
    return [(ids, ask.binary(name, ids, query)) for ids in (rng.integers(0, 100, size=8) for _ in range(count))]


class TestAnswers:
    def test_they_equal_those_of_the_application(self, ask: Any, stores: Any, monkeypatch: Any) -> None:
        """Same status, headers and bytes, and most of them from a response plan."""
        answered = []
        real = response_plan.ResponsePlan.answer
        monkeypatch.setattr(
            response_plan.ResponsePlan,
            "answer",
            lambda self, body: answered.append(1) or real(self, body),  # type: ignore[func-returns-value]
        )
        time.sleep(1.1)  # a store just opened is taken for slow, and slow stores are not read in the event loop
        rng = np.random.default_rng(1)
        give_up = time.monotonic() + 60
        asked = many(ask, "dense", 60, rng, "?fields=targets,labels,fingerprints")
        while len(answered) < 10 and time.monotonic() < give_up:
            # On a busy machine a gather may take long; then the application answers for a second.
            asked += many(ask, "dense", 20, rng, "?fields=targets,labels,fingerprints")
        for ids, answer in asked:
            spoken = {"ids": ids.tolist(), "fields": ["targets", "labels", "fingerprints"]}
            by_app = ask.batch("dense", spoken)
            assert answer.body == by_app.body
            named = ("content-type", "content-length", "softlabels-digest", "vary")
            assert [answer.headers[name] for name in named] == [by_app.headers[name] for name in named]
            assert "date" in answer.headers
        assert len(answered) >= 10

    def test_an_error_on_the_way(self, ask: Any) -> None:
        """An unknown id is refused as by the application, and the next request is answered."""
        rng = np.random.default_rng(2)
        many(ask, "dense", 5, rng)
        assert ask.binary("dense", np.full(8, 777)).problem() == (404, "unknown-id")
        assert all(answer.status == 200 for _, answer in many(ask, "dense", 5, rng))

    def test_a_store_replaced_in_between(self, serve: Any, write: Any, rows_of: Any, tmp_path: Path) -> None:
        """The next reply has the new version's rows, or is refused where the old one is pinned."""
        old, new = rows_of(1), rows_of(2)
        digest = write(tmp_path / "served" / "s", old).digest
        write(tmp_path / "aside" / "s", new)
        ask = serve(tmp_path / "served")
        rng = np.random.default_rng(3)
        time.sleep(1.1)
        many(ask, "s", 5, rng)
        many(ask, "s", 5, rng, f"?digest={digest}")
        shutil.rmtree(tmp_path / "served" / "s")
        shutil.move(tmp_path / "aside" / "s", tmp_path / "served" / "s")
        for ids, answer in many(ask, "s", 5, rng):
            np.testing.assert_array_equal(from_bytes(answer.body)[0]["targets"], new.logits_BC[ids])
        assert many(ask, "s", 1, rng, f"?digest={digest}")[0][1].problem() == (412, "store-changed")

    def test_a_token_is_part_of_the_head(self, serve: Any, stores: Any) -> None:
        """Requests with the right token are answered, others refused, however often they are repeated."""
        ask = serve(stores.root, token="right")
        ids = np.arange(8)
        for _ in range(5):
            assert ask.binary("dense", ids, authorization="Bearer right").status == 200
            assert ask.binary("dense", ids, authorization="Bearer wrong").status == 401
            assert ask.binary("dense", ids).status == 401


class TestConnections:
    def test_requests_sent_without_waiting(self, ask: Any, stores: Any) -> None:
        """Pipelined requests are answered in order, each with its own rows, by either path."""
        head = (
            b"POST /v1/stores/dense/batch HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\n"
            b"Content-Length: 16\r\n\r\n"
        )
        batches = [np.array([n, 99 - n]) for n in range(50)]
        with socket.create_connection((ask.host, ask.port), timeout=20) as connection:
            connection.sendall(b"".join(head + ids.astype("<i8").tobytes() for ids in batches))
            reader = connection.makefile("rb")
            for ids in batches:
                length = 0
                while (line := reader.readline().strip()) != b"":
                    if line.startswith(b"content-length"):
                        length = int(line.split()[1])
                arrays, _ = from_bytes(reader.read(length))
                assert arrays["ids"].tolist() == ids.tolist()
            reader.close()

    def test_idle_connections_are_closed(self, serve: Any, stores: Any) -> None:
        """Counted from the last reply, of whichever kind it was."""
        ask = serve(stores.root, keep_alive_timeout_s=1)
        time.sleep(1.1)
        head = (
            b"POST /v1/stores/dense/batch HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\n"
            b"Content-Length: 8\r\n\r\n"
        )
        with socket.create_connection((ask.host, ask.port), timeout=20) as connection:
            for _ in range(8):
                connection.sendall(head + bytes(8))
                assert connection.recv(65536).startswith(b"HTTP/1.1 200")
                time.sleep(0.3)
            began = time.monotonic()
            assert connection.recv(1) == b""
            assert 0.2 < time.monotonic() - began < 10
