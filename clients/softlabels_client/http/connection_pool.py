"""Requests over TLS or through a proxy, by a urllib3 connection pool. Imported only where one is needed."""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Mapping
from typing import Any

import urllib3
from urllib3.exceptions import HTTPError, ProxyError, ProxySchemeUnknown
from urllib3.exceptions import TimeoutError as PoolTimeoutError
from urllib3.util import make_headers, parse_url

from softlabels.errors import RequestError
from softlabels_client.http.raw_connection import Buffers
from softlabels_client.http.replies import ParsedReply
from softlabels_client.http.retry import Deadline

_CONNECTIONS = 16
"""Idle connections kept: more than the threads of a trainer; urllib3 logs a warning for each that it drops."""


class ConnectionPool:
    """Sends requests through urllib3, one attempt each: the transport retries.

    Args:
        proxy: URL of the proxy; None connects directly.
        timeout_s: limit of each read of a streaming reply, seconds.
        buffers: memory for frames.
    Raises:
        RequestError: a proxy of a kind that urllib3 does not support.
    """

    def __init__(self, *, proxy: str | None, timeout_s: float, buffers: Buffers) -> None:
        # The standard library's default context honours SSL_CERT_FILE; urllib3's own does not.
        options: dict[str, Any] = {"maxsize": _CONNECTIONS, "ssl_context": ssl.create_default_context()}
        self._proxy, self._timeout_s, self._buffers = proxy, timeout_s, buffers
        if proxy is None:
            self._manager = urllib3.PoolManager(**options)
            return
        # urllib3 does not send credentials that are part of the proxy's URL by itself.
        login = parse_url(proxy).auth
        try:
            headers = make_headers(proxy_basic_auth=login) if login else None
            self._manager = urllib3.ProxyManager(proxy, proxy_headers=headers, **options)
        except ProxySchemeUnknown as error:
            raise RequestError(f"the environment names a proxy that is not an http(s) URL ({error})") from error

    def send(
        self, method: str, url: str, *, body: bytes | None, headers: Mapping[str, str], deadline: Deadline
    ) -> ParsedReply:
        """Send a request and return its reply once the head has arrived. Raises OSError, http.client.HTTPException."""
        left_s = deadline.left_s()
        try:
            response = self._manager.request(
                method,
                url,
                body=body,
                headers=headers,
                timeout=urllib3.Timeout(connect=left_s, read=left_s),
                # `HttpTransport` retries, within one deadline. A redirect must not carry the token to another server.
                retries=False,
                redirect=False,
                # The body is read later, once its length is checked; a compressed one is refused, not decoded.
                preload_content=False,
                decode_content=False,
            )
        except HTTPError as error:
            raise self._builtin_error(error) from error
        assert isinstance(response, urllib3.HTTPResponse)

        def read_once(size_bytes: int) -> bytes:
            try:
                piece = response.read1(size_bytes, decode_content=False)
                if not response.length_remaining and response.length_remaining is not None:
                    # All of a known length has arrived; only another read, past the end, returns the connection.
                    response.read(decode_content=False)
            except HTTPError as error:
                raise self._builtin_error(error) from error
            return piece

        def set_timeout(seconds: float) -> None:
            connection = response.connection
            if connection is not None and connection.sock is not None:
                connection.sock.settimeout(seconds)

        def close() -> None:
            # If the body was not read to its end this closes the connection too: the rest of it must not be read as the
            # reply to another request.
            response.close()
            response.release_conn()

        return ParsedReply(
            status=response.status,
            headers={name.lower(): value for name, value in response.headers.items()},
            length=response.length_remaining,
            chunked=response.chunked,
            read_once=read_once,
            set_timeout=set_timeout,
            close=close,
            timeout_s=self._timeout_s,
            buffers=self._buffers,
        )

    def close(self) -> None:
        """Close idle connections; later requests open new ones."""
        self._manager.clear()

    def _builtin_error(self, error: BaseException) -> OSError | http.client.HTTPException:
        """Return the error of the standard library behind one of urllib3's, which the transport explains."""
        if isinstance(error, ProxyError):
            found = parse_url(self._proxy or "")
            # Without the login, which would end up in logs.
            return ConnectionError(f"through the proxy {found.scheme}://{found.netloc}: {error}")
        if isinstance(error, PoolTimeoutError):
            return TimeoutError(str(error))
        # The class of the cause decides whether a retry can help: an invalid certificate, for instance, stays invalid.
        for cause in (*error.args, error.__cause__):
            if isinstance(cause, OSError | http.client.HTTPException):
                return cause
        return ConnectionError(f"{type(error).__name__}: {error}")
