"""How one file is fetched: checked, whole or not at all. A real HTTP server on loopback gives the answers."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from softlabels.data.downloads import fetch
from softlabels.errors import ChecksumError, DataUnavailableError

CONTENT = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PATHS = {
    "/plain": CONTENT,
    "/packed.gz": gzip.compress(CONTENT),
    "/cut.gz": gzip.compress(CONTENT)[:-100],
    "/login.gz": b"<html>Please log in to the hotel's network</html>",
    "/bomb.gz": gzip.compress(bytes(50_000_000)),
}


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `PATHS`; 404 for the rest."""

    def do_GET(self) -> None:
        """Answer one request."""
        body = PATHS.get(self.path)
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output quiet."""


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    """A server that gives the answers of `PATHS`."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def get(url: str, target: Path, *, sha256: str = SHA256) -> list[int]:
    """Fetch `url` as the content; the sizes that the progress was told."""
    told: list[int] = []
    packed = url.endswith(".gz")
    fetch(url, target, sha256=sha256, size_bytes=len(CONTENT), gzipped=packed, advance=told.append)
    return told


class TestFetch:
    @pytest.mark.parametrize("path", ["/plain", "/packed.gz"])
    def test_the_content_arrives_whole(self, base_url: str, tmp_path: Path, path: str) -> None:
        """Plain or unpacked on the way, into a folder that is made, with each byte told."""
        target = tmp_path / "new" / "file"
        told = get(base_url + path, target)
        assert target.read_bytes() == CONTENT
        assert sum(told) == len(CONTENT)
        assert [entry.name for entry in target.parent.iterdir()] == ["file"]

    @pytest.mark.parametrize(
        ("path", "error", "words"),
        [
            ("/none", DataUnavailableError, "HTTP status 404"),
            ("/cut.gz", ChecksumError, "cut short"),
            ("/login.gz", DataUnavailableError, "not a gzip file"),
            ("/bomb.gz", ChecksumError, "more than the 256,000 bytes"),
        ],
    )
    def test_a_wrong_answer_leaves_nothing_behind(
        self, base_url: str, tmp_path: Path, path: str, error: type[Exception], words: str
    ) -> None:
        """Neither the file nor a part of it, and an error that says what came instead."""
        with pytest.raises(error, match=words):
            get(base_url + path, tmp_path / "file")
        assert list(tmp_path.iterdir()) == []

    def test_a_wrong_checksum_keeps_the_file_of_before(self, base_url: str, tmp_path: Path) -> None:
        """A file that lies there already is not replaced by one that is wrong."""
        target = tmp_path / "file"
        target.write_bytes(b"before")
        with pytest.raises(ChecksumError, match=SHA256):
            get(base_url + "/plain", target, sha256="0" * 64)
        assert target.read_bytes() == b"before"

    def test_no_answer_is_told_in_few_words(self, tmp_path: Path) -> None:
        """A closed port fails at once, without urllib3's own repetition."""
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
        with pytest.raises(DataUnavailableError, match=r"cannot be reached: .*refused\)?$"):
            get(f"http://127.0.0.1:{port}/plain", tmp_path / "file")

    def test_a_proxy_of_the_environment_is_used(
        self, base_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The request goes to the proxy, which here refuses it; `no_proxy` goes around it."""
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        monkeypatch.setenv("no_proxy", "")
        with pytest.raises(DataUnavailableError, match="cannot be reached"):
            get(base_url + "/plain", tmp_path / "file")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        get(base_url + "/plain", tmp_path / "file")
