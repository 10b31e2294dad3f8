"""Limits of connections: raw sockets that send slowly, too much or nothing."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest

HEAD = b"POST /v1/stores/dense/batch HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def connect(ask: Any) -> socket.socket:
    """A raw connection to the server."""
    return socket.create_connection((ask.host, ask.port), timeout=20)


def read_to_end(connection: socket.socket) -> bytes:
    """All that the server sends until it closes."""
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received


def trickle(connection: socket.socket, data: bytes, *, pause_s: float) -> None:
    """Send data byte by byte."""
    for byte in data:
        connection.sendall(bytes([byte]))
        time.sleep(pause_s)


class TestHeaders:
    @pytest.mark.parametrize(
        "sent", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\nX-Sl"], ids=["nothing", "half a header"]
    )
    def test_a_header_that_does_not_come_ends_the_connection(self, serve: Any, stores: Any, sent: bytes) -> None:
        """After `header_timeout_s` and not, as in uvicorn, never."""
        ask = serve(stores.root, header_timeout_s=0.3)
        with connect(ask) as connection:
            began = time.monotonic()
            connection.sendall(sent)
            assert read_to_end(connection) == b""
            assert 0.2 < time.monotonic() - began < 10

    def test_a_header_sent_byte_by_byte_gets_no_more_time(self, serve: Any, stores: Any) -> None:
        """Or each byte would extend the timeout."""
        ask = serve(stores.root, header_timeout_s=0.5)
        with connect(ask) as connection:
            began = time.monotonic()
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                trickle(connection, (HEAD * 40)[:-4], pause_s=0.02)
            assert time.monotonic() - began < 10

    def test_the_second_request_of_a_connection_is_timed_too(self, serve: Any, stores: Any) -> None:
        """Keep-alive gives time between requests, not within one."""
        ask = serve(stores.root, header_timeout_s=0.3)
        with connect(ask) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            time.sleep(0.6)
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            connection.sendall(b"GET /health HT")
            assert read_to_end(connection) == b""

    def test_a_header_that_is_too_large_is_refused(self, serve: Any, stores: Any) -> None:
        """The limit is 64 KiB."""
        ask = serve(stores.root)
        filler = (b"X-Filler: " + b"x" * 10_000 + b"\r\n") * 1000
        with connect(ask) as connection, pytest.raises((BrokenPipeError, ConnectionResetError)):
            connection.sendall(HEAD + filler)

    def test_bytes_that_are_not_http_are_refused(self, ask: Any) -> None:
        """400 by the HTTP server itself: there is no request yet for problem details."""
        with connect(ask) as connection:
            connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
            assert read_to_end(connection).startswith(b"HTTP/1.1 400")


class TestBodies:
    def test_a_body_that_does_not_come(self, serve: Any, stores: Any) -> None:
        """408 after `body_timeout_s`, and the connection is closed."""
        ask = serve(stores.root, body_timeout_s=0.3)
        with connect(ask) as connection:
            connection.sendall(HEAD + b'Content-Length: 100\r\n\r\n{"ids')
            reply = read_to_end(connection)
        assert reply.startswith(b"HTTP/1.1 408")
        assert b"application/problem+json" in reply

    def test_a_body_announced_too_large(self, serve: Any, stores: Any) -> None:
        """413 before a byte of it is read."""
        ask = serve(stores.root, max_body_bytes=1000)
        with connect(ask) as connection:
            connection.sendall(HEAD + b"Content-Length: 1001\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 413")

    def test_a_body_that_turns_out_too_large(self, serve: Any, stores: Any) -> None:
        """413 for a chunked body, whose size is not announced."""
        ask = serve(stores.root, max_body_bytes=1000)
        with connect(ask) as connection:
            connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
            connection.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n0\r\n\r\n")
            reply = connection.recv(65536)
        assert reply.startswith(b"HTTP/1.1 413")
        assert b"batch-too-large" in reply

    def test_a_body_in_pieces(self, ask: Any) -> None:
        """However it is cut, it is the same body."""
        body = b'{"ids": [1, 2, 3]}'
        with connect(ask) as connection:
            connection.sendall(HEAD + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body))
            trickle(connection, body, pause_s=0.002)
            assert read_to_end(connection).startswith(b"HTTP/1.1 200")

    def test_a_client_that_goes_away(self, ask: Any) -> None:
        """Half a request and no more: the server answers others as before."""
        for _ in range(20):
            with connect(ask) as connection:
                connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        assert ask("GET", "/health").status == 200

    def test_a_client_that_does_not_read(self, serve: Any, write: Any, rows_of: Any, stores: Any) -> None:
        """A client that does not read its reply delays no other."""
        ask = serve(stores.root)
        body = b'{"ids": [' + b",".join([b"1"] * 60_000) + b"]}"
        with connect(ask) as connection:
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            for _ in range(20):
                assert ask.batch("dense", {"ids": [1]}).status == 200


class TestKeepAlive:
    def test_an_idle_connection_is_closed(self, serve: Any, stores: Any) -> None:
        """After `keep_alive_timeout_s`."""
        ask = serve(stores.root, keep_alive_timeout_s=1)
        with connect(ask) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            began = time.monotonic()
            assert read_to_end(connection).startswith(b"HTTP/1.1 200")
            assert 0.5 < time.monotonic() - began < 10
