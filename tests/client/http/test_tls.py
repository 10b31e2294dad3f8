"""Stores behind https: certificates are checked, and what is wrong with one is told."""

from __future__ import annotations

import http.server
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from softlabels.errors import ServerUnreachableError
from softlabels_client import HttpTransport, RetryPolicy, parse_address


class _Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *args: Any) -> None:
        """Quiet."""


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that refuses the certificate hangs up, which is what is tested."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for `localhost` that nobody signed, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the openssl command, which makes the certificate, is not there")
    folder = tmp_path_factory.mktemp("tls")
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "certificate.pem")]
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names, *files],
        check=True,
        capture_output=True,
    )
    return folder / "certificate.pem", folder / "key.pem"


@pytest.fixture
def port(certificate: tuple[Path, Path]) -> Iterator[int]:
    """The port of an https server with that certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server = _Server(("127.0.0.1", 0), _Answer)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    serving.start()
    yield server.server_address[1]
    server.shutdown()
    serving.join()
    server.server_close()


class TestHttps:
    def test_a_trusted_certificate_lets_answers_through(
        self, port: int, certificate: tuple[Path, Path], quick: RetryPolicy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`SSL_CERT_FILE` names further authorities, as for any program that uses OpenSSL."""
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        link = HttpTransport(parse_address(f"https://localhost:{port}/tiny"), retry=quick)
        for _ in range(3):
            assert link.request("GET", "/x", max_bytes=100).body == b"hello"
        link.close()

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1"], ids=["unknown authority", "another name"])
    def test_a_certificate_that_does_not_hold_is_refused_at_once(
        self,
        port: int,
        certificate: tuple[Path, Path],
        quick: RetryPolicy,
        monkeypatch: pytest.MonkeyPatch,
        host: str,
    ) -> None:
        """Nothing is sent over it, least of all the token; a retry would not mend it."""
        if host != "localhost":
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        link = HttpTransport(parse_address(f"https://{host}:{port}/tiny"), retry=quick, token="s3cret")
        with pytest.raises(ServerUnreachableError, match=r"certificate.*SSL_CERT_FILE"):
            link.request("GET", "/x", max_bytes=100)

    def test_plain_http_on_that_port_is_told(self, peer: Any, quick: RetryPolicy) -> None:
        """https towards a server that speaks http ends as any server that gives no usable answer."""
        peer.acts = [peer.hang_up]
        link = HttpTransport(parse_address(peer.url.replace("http:", "https:") + "/tiny"), retry=quick, timeout_s=2)
        with pytest.raises(ServerUnreachableError, match="https://"):
            link.request("GET", "/x", max_bytes=100)
