"""How is one public file fetched? Checked against its SHA-256, whole or not at all, and quick to give up offline."""

from __future__ import annotations

import hashlib
import os
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import urllib3

from softlabels.errors import ChecksumError, DataUnavailableError

CONNECT_TIMEOUT_S = 5.0
"""For each address of a host; a machine without a way out finds out in seconds."""
READ_TIMEOUT_S = 30.0
"""For each read: a slow line is fine, a dead one is not."""
BLOCK_BYTES = 1 << 16

Advance = Callable[[int], None]
"""Told the number of bytes that have just arrived."""

_GZIP_WINDOW = 16 + zlib.MAX_WBITS


def fetch(url: str, target: Path, *, sha256: str, size_bytes: int, gzipped: bool = False, advance: Advance) -> None:
    """Download `url` to `target`, which appears only when its bytes are right.

    Args:
        url: http or https.
        target: file to write; its folder is made.
        sha256: hex digest of the content that is kept (unpacked, where `gzipped`).
        size_bytes: its size; more than that is never written.
        gzipped: the URL holds a gzip file of the content.
        advance: told of the bytes that are written.
    Raises:
        DataUnavailableError: no such host, no answer in time, an HTTP error, or a reply that is not gzip.
        ChecksumError: the content is not what the checksum says.
    """
    try:
        reply = _pool(url).request(
            "GET",
            url,
            preload_content=False,
            retries=urllib3.Retry(total=0, redirect=3),
            timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S),
        )
        try:
            if reply.status != 200:
                raise DataUnavailableError(f"{url} answers with HTTP status {reply.status}")
            blocks = reply.stream(BLOCK_BYTES, decode_content=False)
            write_checked(
                _gunzipped(blocks, url) if gzipped else blocks,
                target,
                sha256=sha256,
                size_bytes=size_bytes,
                origin=url,
                advance=advance,
            )
        finally:
            reply.release_conn()
    except urllib3.exceptions.HTTPError as error:
        raise DataUnavailableError(f"{url} cannot be reached: {_reason(error)}") from error


def write_checked(
    blocks: Iterator[bytes], target: Path, *, sha256: str, size_bytes: int, origin: str, advance: Advance
) -> None:
    """Write `blocks` to `target` by a temporary file beside it, renamed when size and checksum are right.

    Raises:
        ChecksumError: they are not; `target` is as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, written = hashlib.sha256(), 0
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            for block in blocks:
                written += len(block)
                if written > size_bytes:
                    raise ChecksumError(f"{origin} gives more than the {size_bytes:,} bytes of {target.name}")
                digest.update(block)
                file.write(block)
                advance(len(block))
        if digest.hexdigest() != sha256:
            raise ChecksumError(
                f"{origin} gives {written:,} bytes with SHA-256 {digest.hexdigest()}, where {target.name} has "
                f"{size_bytes:,} bytes and {sha256}: it was cut short, changed or replaced"
            )
        Path(temporary).chmod(0o644)  # mkstemp makes it readable by its owner alone
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _pool(url: str) -> urllib3.PoolManager:
    """A connection pool that goes through the proxy which the environment names for this URL, if any."""
    parts = urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        return urllib3.ProxyManager(proxy)
    return urllib3.PoolManager()


def _gunzipped(blocks: Iterator[bytes], url: str) -> Iterator[bytes]:
    unpacker = zlib.decompressobj(_GZIP_WINDOW)
    try:
        for block in blocks:
            while block:  # at most a block at a time comes out, so that a bomb meets the size limit before memory does
                yield unpacker.decompress(block, BLOCK_BYTES)
                block = unpacker.unconsumed_tail
        yield unpacker.flush()
    except zlib.error as error:
        raise DataUnavailableError(
            f"{url} is not a gzip file ({error}): a login page of the network may have answered in its place"
        ) from error


def _reason(error: urllib3.exceptions.HTTPError) -> str:
    """The innermost cause in a few words; urllib3's own texts repeat the host, the path and the attempts."""
    cause: Exception = error
    if isinstance(cause, urllib3.exceptions.MaxRetryError) and cause.reason is not None:
        cause = cause.reason
    if isinstance(cause, urllib3.exceptions.ProxyError):
        cause = cause.original_error
    text = str(cause)
    return text.partition(": ")[2] or text
