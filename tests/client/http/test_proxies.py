"""Proxies of the environment: which requests go through one, and that whole replies and streams come back."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

import softlabels
from softlabels.errors import ServerUnreachableError, TruncatedError
from softlabels_client import HttpTransport, RetryPolicy, parse_address
from softlabels_client.http.address import proxy_for

HOST = "store.invalid"
"""No name server knows it: only the proxy leads there."""


@dataclass
class Proxy:
    """A forwarding proxy: every host is the machine it runs on."""

    url: str
    asked: list[str] = field(default_factory=list)

    def handle(self, client: socket.socket) -> None:
        """Forward one request, and the bytes that come back."""
        with client:
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(65536)
            method, target, rest = head.split(b" ", 2)
            self.asked.append(f"{method.decode()} {target.decode()}")
            parts = urlsplit(target.decode())
            path = f"{parts.path}?{parts.query}" if parts.query else parts.path
            with socket.create_connection(("127.0.0.1", parts.port or 80)) as server:
                server.sendall(b"%s %s %s" % (method, path.encode(), rest))
                threading.Thread(target=_copy, args=(client, server), daemon=True).start()
                _copy(server, client)


def _copy(source: socket.socket, sink: socket.socket) -> None:
    try:
        while piece := source.recv(65536):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A running proxy that the environment names."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = Proxy(url=f"http://127.0.0.1:{listener.getsockname()[1]}")

        def accept() -> None:
            while True:
                try:
                    client = listener.accept()[0]
                except OSError:
                    return
                threading.Thread(target=running.handle, args=(client,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        monkeypatch.setenv("HTTP_PROXY", running.url)
        yield running
        listener.shutdown(socket.SHUT_RDWR)


class TestRequests:
    def test_batches_and_streams_come_through_it(self, proxy: Proxy, served_store: str) -> None:
        """The same rows as from the server itself."""
        port = urlsplit(served_store).port
        behind = served_store.replace(f"127.0.0.1:{port}", f"{HOST}:{port}")
        with softlabels.open(served_store) as direct, softlabels.open(behind) as store:
            ids = [3, 1, 150]
            np.testing.assert_array_equal(store.batch(ids).logits(), direct.batch(ids).logits())
            epochs = [
                [batch.ids.tolist() for batch in s.epoch(seed=1, epoch=0, batch_size=32)] for s in (store, direct)
            ]
            assert epochs[0] == epochs[1]
        assert proxy.asked
        assert all(f"http://{HOST}:{port}/" in line for line in proxy.asked)

    @pytest.mark.parametrize(
        ("fault", "error", "match"),
        [
            ("drip", ServerUnreachableError, r"within 0\.5 s"),
            ("stall", ServerUnreachableError, r"within 0\.5 s"),
            ("cut", TruncatedError, "cut"),
        ],
    )
    def test_slow_and_cut_replies(
        self, proxy: Proxy, peer: Any, quick: RetryPolicy, fault: str, error: type[Exception], match: str
    ) -> None:
        """The deadline holds for the whole reply, and a short one is never returned."""
        cut = peer.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        peer.acts = [cut if fault == "cut" else getattr(peer, fault)]
        behind = parse_address(peer.url.replace("127.0.0.1", HOST) + "/tiny")
        began = time.monotonic()
        with pytest.raises(error, match=match):
            HttpTransport(behind, retry=quick, timeout_s=0.5).request("GET", "/x", max_bytes=1 << 20)
        assert time.monotonic() - began < 3.0

    def test_a_proxy_that_is_gone_is_named(self, quick: RetryPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
        """With the proxy's address, and without the password in it."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        monkeypatch.setenv("HTTP_PROXY", f"http://me:s3cret@127.0.0.1:{port}")
        link = HttpTransport(parse_address(f"http://{HOST}/tiny"), retry=quick, timeout_s=5)
        with pytest.raises(ServerUnreachableError, match=f"proxy http://127.0.0.1:{port}") as caught:
            link.request("GET", "/x", max_bytes=100)
        assert "s3cret" not in str(caught.value)


class TestChoice:
    @pytest.mark.parametrize(
        ("environment", "url", "expected"),
        [
            ({}, "http://far/a", None),
            ({"HTTP_PROXY": "http://p:1"}, "http://far/a", "http://p:1"),
            ({"http_proxy": "p:1"}, "http://far/a", "http://p:1"),
            ({"HTTP_PROXY": "http://p:1"}, "https://far/a", None),
            ({"HTTPS_PROXY": "http://p:1"}, "https://far/a", "http://p:1"),
            ({"ALL_PROXY": "http://p:1"}, "https://far/a", "http://p:1"),
            ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "far"}, "http://far/a", None),
            ({"HTTP_PROXY": "http://p:1", "NO_PROXY": ".example.org"}, "http://a.example.org/a", None),
            ({"HTTP_PROXY": "http://p:1", "NO_PROXY": "*"}, "http://far/a", None),
            ({"HTTP_PROXY": "http://p:1"}, "http://127.0.0.1:8000/a", None),
            ({"HTTP_PROXY": "http://p:1"}, "http://localhost/a", None),
        ],
    )
    def test_the_environment_decides(
        self, environment: dict[str, str], url: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As for curl; this machine's own addresses are never behind a proxy."""
        for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert proxy_for(parse_address(url)) == expected
