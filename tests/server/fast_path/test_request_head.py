"""Requests with more than one reading: none gets a plan, none gets rows without the token, none is read wrongly."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

import pytest

from softlabels.wire import from_bytes
from softlabels_server.fast_path.request_head import credentials_in, has_token, is_unambiguous
from tests.server.fast_path.mutated_requests import compare

HEAD = (
    b"POST /v1/stores/dense/batch?fields=targets HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\n"
    b"Content-Length: 64\r\nAuthorization: Bearer right\r\n\r\n"
)
SCOPE = {
    "raw_path": b"/v1/stores/dense/batch",
    "query_string": b"fields=targets",
    "headers": [
        (b"host", b"x"),
        (b"content-type", b"application/octet-stream"),
        (b"content-length", b"64"),
        (b"authorization", b"Bearer right"),
    ],
}


def ask(server: Any, *segments: bytes) -> bytes:
    """Send segments over one connection and return what comes back before the server closes it."""
    with socket.create_connection((server.host, server.port), timeout=20) as connection:
        for segment in segments:
            connection.sendall(segment)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = b""
        while piece := connection.recv(1 << 16):
            received += piece
    return received


class TestHeadsWithAPlan:
    def test_an_ordinary_one(self) -> None:
        """As trainers send it."""
        assert is_unambiguous(HEAD, SCOPE, body_bytes=64)
        assert HEAD[credentials_in(HEAD)].strip() == b"Bearer right"

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            (b"POST", b"\r\nPOST"),
            (b"POST", b"\n\r\n\r\nPOST"),
            (b"POST", b"GET"),
            (b"HTTP/1.1", b"HTTP/1.0"),
            (b"/v1", b"http://x/v1"),
            (b"Host: x", b"Host: x\r\nHost: x"),
            (b"Host: x", b"Host: x\nY: z"),
            (b"Host: x", b"Host : x"),
            (b"Host: x", b"Host: x\r\n y"),
            (b"Content-Length: 64", b"Content-Length: 64\r\nContent-Length: 64"),
            (b"Content-Length: 64", b"Content-Length: 064"),
            (b"Content-Length: 64", b"Content-Length: 64\r\nTransfer-Encoding: chunked"),
            (b"Content-Length: 64", b"Content-Length: 64\r\nUpgrade: websocket"),
            (b"Content-Length: 64", b"Content-Length: 64\r\nConnection: close"),
            (b"Bearer right", b"Bearer wrong"),
            (b"Bearer right", b"Bearer right\r\nAuthorization: Bearer right"),
        ],
    )
    def test_no_other_is_kept(self, old: bytes, new: bytes) -> None:
        """Neither with the scope of the ordinary head nor, where a parser would add the line, with its own."""
        head = HEAD.replace(old, new)
        lines = [line.partition(b":") for line in head.split(b"\r\n")[1:-2]]
        own = {**SCOPE, "headers": [(name.lower(), value.strip()) for name, _, value in lines]}
        assert not is_unambiguous(head, SCOPE, body_bytes=64)
        if new.startswith(old) and b"\n" not in new.replace(b"\r\n", b""):
            assert not is_unambiguous(head, own, body_bytes=64)
        assert not is_unambiguous(HEAD, SCOPE, body_bytes=72)

    def test_the_token_is_compared_whole(self) -> None:
        """With any case of the scheme and blanks around, and no other text."""
        for value in (b"Bearer s", b"bearer s", b" BEARER  s "):
            assert has_token(value, b"s")
        for value in (b"", b"s", b"Bearer", b"Bearer ", b"Bearer S", b"Basic s", b"Bearer s s", b"Bearer \xff"):
            assert not has_token(value, b"s")


class TestTheToken:
    def test_blank_lines_before_a_request_leave_no_way_around_it(self, serve: Any, stores: Any) -> None:
        """A plan was once kept for whatever stood before the first empty line, and so answered anybody."""
        server = serve(stores.root, token="right")
        body = struct.pack("<8q", *range(8))
        for _ in range(3):
            assert b"softlabels-batch" in ask(server, b"\n\r\n\r\n" + HEAD + body)
            anybody = ask(server, b"\n\r\n\r\n" + struct.pack("<8q", *range(8, 16)))
            assert b"softlabels-batch" not in anybody
            assert b"HTTP/1.1 400" in anybody

    def test_a_trailer_is_no_header(self, serve: Any, stores: Any) -> None:
        """A proxy that checks headers does not see the fields after a chunked body."""
        server = serve(stores.root, token="right")
        head = b"POST /v1/stores/dense/batch HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        body = b'c\r\n{"ids": [1]}\r\n0\r\nAuthorization: Bearer right\r\n\r\n'
        reply = ask(server, head + b"Transfer-Encoding: chunked\r\n\r\n" + body)
        assert reply.startswith(b"HTTP/1.1 401")


class TestReadings:
    def test_chunks_are_not_ids(self, ask: Any) -> None:
        """Bytes of a chunked body as long as ids were once taken for ids."""
        head = HEAD.replace(b"Content-Length: 64", b"Transfer-Encoding: chunked")
        chunked = b"8;" + b"x" * 45 + b"\r\n" + struct.pack("<q", 77) + b"\r\n0\r\n\r\n"
        assert len(chunked) == 64
        with socket.create_connection((ask.host, ask.port), timeout=20) as connection:
            for _ in range(4):
                connection.sendall(head + chunked)
                reply = connection.recv(1 << 16)
                arrays, _ = from_bytes(reply.partition(b"\r\n\r\n")[2])
                assert arrays["ids"].tolist() == [77]

    @pytest.mark.parametrize(
        "line",
        [
            b"Content-Type: application/json",
            b"Content-Length: 64",
            b"Host: y",
            b"Authorization: Bearer right",
            b"Accept: application/json\r\nAccept: */*",
            b"Content-Encoding: gzip",
            b"Transfer-Encoding: gzip, chunked",
        ],
    )
    def test_contradictory_headers_are_refused(self, ask: Any, line: bytes) -> None:
        """400, and the connection is closed: what follows may be part of the body."""
        head = HEAD.replace(b"Host: x", b"Host: x\r\n" + line)
        with socket.create_connection((ask.host, ask.port), timeout=20) as connection:
            connection.sendall(head + bytes(64))
            reply = b""
            while piece := connection.recv(1 << 16):
                reply += piece
        assert reply.startswith(b"HTTP/1.1 400")
        assert b"connection: close" in reply.lower()


class TestMutatedRequests:
    def test_the_fast_path_answers_as_the_application_does(self, stores: Any) -> None:
        """Byte for byte, and nobody without the token gets a row."""
        found = asyncio.run(compare(stores.root, seed=18, requests=3_000))
        assert found.from_plans > 150
        assert found.answered > 300
