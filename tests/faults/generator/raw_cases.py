"""Raw requests to a server with a token: rows go only to who has the token, and are those that were asked for.

What a request asks for is read by h11, a strict parser of HTTP/1.1 that the server does not use. A reply with rows is
right if h11 reads one request with the token, one content type and one body of ids, and the rows are those ids'.
"""

from __future__ import annotations

import contextlib
import re
import socket
from pathlib import Path

import h11
import numpy as np

from softlabels.wire import from_bytes
from tests.faults.generator.damage import changed
from tests.faults.generator.disk_cases import Shelf
from tests.faults.generator.judging import Verdict
from tests.faults.generator.layers import BYTE_OPERATIONS
from tests.faults.generator.readers import Server
from tests.faults.generator.stores import Model, Stores, write_tree

Rng = np.random.Generator

TOKEN = "s3cret-of-the-trainers"
KIND = "zarr"
TIMEOUT_S = 0.4


class TokenServer:
    """A server that asks for a token, over one store."""

    def __init__(self, folder: Path, shelf: Shelf) -> None:
        self.stores: Stores = shelf.stores(KIND)
        write_tree(folder / KIND, self.stores.trees["current"])
        token = folder.parent / "token"
        token.write_text(TOKEN)
        self.server = Server(folder, "--token-file", str(token), "--body-timeout", "1", "--header-timeout", "1")

    def send(self, *pieces: bytes) -> bytes:
        """Send bytes on a connection of their own; return all that is answered until the server is silent."""
        host, _, port = self.server.address().rpartition("://")[2].rpartition(":")
        found = b""
        connection = socket.create_connection((host, int(port)), timeout=TIMEOUT_S)
        with connection, contextlib.suppress(OSError):
            for piece in pieces:
                connection.sendall(piece)
            while piece := connection.recv(1 << 16):
                found += piece
                if _is_whole(found):
                    break
        return found


def _is_whole(reply: bytes) -> bool:
    head, separator, body = reply.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return bool(separator) and length is not None and len(body) >= int(length[1])


def request(digest: str, ids: np.ndarray, *, token: str | None = TOKEN) -> tuple[bytes, bytes]:
    """Return head and body of a request as our client sends it."""
    lines = [
        f"POST /v1/stores/{KIND}/batch?fields=targets,labels,ids&digest={digest} HTTP/1.1",
        "Host: 127.0.0.1",
        "Accept-Encoding: identity",
        "Content-Type: application/octet-stream",
        "Accept: application/vnd.safetensors",
        *([] if token is None else [f"Authorization: Bearer {token}"]),
        f"Content-Length: {8 * len(ids)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode(), ids.astype("<i8").tobytes()


def _crafted(rng: Rng, head: bytes, body: bytes) -> tuple[bytes, str]:
    """Return what somebody who knows how servers disagree would send."""
    chunked = head.replace(b"Content-Length: %d" % len(body), b"Transfer-Encoding: chunked")
    in_chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    prefix = (b"\r\n", b"\n\r\n\r\n", b"\r\n\r\n", b"GET /health HTTP/1.1\r\n\r\n", b"\0")[int(rng.integers(5))]
    choices = {
        "bytes before the request line": prefix + head + body,
        "a chunked body": chunked + in_chunks,
        "chunked and a length": head.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n") + in_chunks,
        "two content types": head.replace(b"\r\n\r\n", b"\r\nContent-Type: application/json\r\n\r\n") + body,
        "two lengths": head.replace(b"\r\n\r\n", b"\r\nContent-Length: 8\r\n\r\n") + body,
        "two hosts": head.replace(b"\r\n\r\n", b"\r\nHost: other\r\n\r\n") + body,
        "another method": head.replace(b"POST", b"PUT") + body,
        "a longer body": head + body + body,
        "a folded header": head.replace(b"\r\nAccept:", b"\r\n Accept:") + body,
        "a bare line feed": head.replace(b"\r\n", b"\n") + body,
    }
    name = str(rng.choice(list(choices)))
    return choices[name], name


def run_raw_case(server: TokenServer, rng: Rng, operation: str, verdict: Verdict) -> str:
    """Run one case: a holder of the token sends something odd, then somebody without it the same and worse."""
    model = server.stores.models[server.stores.digests["current"]]
    digest = server.stores.digests["current"]
    ids = rng.integers(len(model.ids), size=int(rng.choice([1, 3, 8])))
    head, body = request(digest, ids)
    if rng.random() < 0.5:  # the fast path knows this head now
        for _ in range(2):
            judge_reply(server.send(head, body), head + body, model, verdict)
    told, sent = operation, head + body
    if operation in BYTE_OPERATIONS and rng.random() < 0.5:
        sent = (
            changed(rng, operation, head, 16) + body if rng.random() < 0.8 else head + changed(rng, operation, body, 8)
        )
    else:
        sent, told = _crafted(rng, head, body)
    without = sent.replace(f"Authorization: Bearer {TOKEN}\r\n".encode(), b"")
    wrong_token = sent.replace(TOKEN.encode(), b"x" * len(TOKEN))
    for raw in (sent, without, wrong_token, sent):
        judge_reply(server.send(raw), raw, model, verdict)
    bare = sent.partition(b"POST")[0]
    if bare:  # what a plan kept by the bytes before the first blank line would be found by
        judge_reply(server.send(bare + body), bare + body, model, verdict)
    server.server.refuse_death(verdict)
    return told


def judge_reply(reply: bytes, raw: bytes, model: Model, verdict: Verdict) -> None:
    """Note what the server sent as wrong unless it is a refusal, or the rows that one well-formed request asks for."""
    status = re.match(rb"HTTP/1\.1 (\d{3})", reply)
    if status is None or status[1] != b"200":
        verdict.codes.append("answered" if status else "closed")
        return
    asked = strictly_parsed(raw)
    blob = reply.partition(b"\r\n\r\n")[2]
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", reply)
    with verdict.part("raw reply"):
        arrays, _ = from_bytes(blob[: int(length[1])] if length else blob)
        if asked is None:
            verdict.wrong.append("rows for a request that a strict parser refuses, or that has no token")
            return
        if arrays["ids"].tolist() != asked:
            verdict.wrong.append(f"rows of {arrays['ids'].tolist()[:4]} for a request for {asked[:4]}")
            return
        for name in ("targets", "labels"):
            expected = np.array(model.expected(name, asked, None))
            if name in arrays and not np.array_equal(arrays[name], expected):
                verdict.wrong.append(f"{name} are not the rows asked for")
        verdict.rows += len(asked)


def strictly_parsed(raw: bytes) -> list[int] | None:
    """Return the ids that one well-formed, authorised request for a batch asks for; None for anything else."""
    parser = h11.Connection(h11.SERVER)
    body = b""
    try:
        parser.receive_data(raw)
        asked = parser.next_event()
        if not isinstance(asked, h11.Request) or asked.method != b"POST":
            return None
        while isinstance(piece := parser.next_event(), h11.Data):
            body += piece.data
        if not isinstance(piece, h11.EndOfMessage):
            return None
    except h11.RemoteProtocolError:
        return None
    headers = [(name.lower(), value) for name, value in asked.headers]
    types = [value for name, value in headers if name == b"content-type"]
    tokens = [value for name, value in headers if name == b"authorization"]
    hosts = [value for name, value in headers if name == b"host"]
    fits = len(types) == 1 and len(hosts) == 1 and len(body) % 8 == 0 and f"/{KIND}/batch".encode() in asked.target
    if not fits or len(tokens) != 1 or not re.fullmatch(rb"(?i)bearer\s+" + TOKEN.encode(), tokens[0]):
        return None
    return None if b"json" in types[0] else np.frombuffer(body, "<i8").tolist()
