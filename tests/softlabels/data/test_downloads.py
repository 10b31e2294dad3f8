"""Files of known SHA-256: order of locations, downloads that arrive whole or not at all, and the report of failures."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import socket
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from softlabels.data.downloads import Location, fetch_files, mirror, npm_package
from softlabels.errors import DataUnavailableError

CONTENTS = {"images": b"some images" * 100, "labels": b"some labels"}
FILES = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENTS.items()}


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without logging."""

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output quiet."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder that the server serves: both files gzipped."""
    served = tmp_path / "mirror"
    served.mkdir()
    for name, content in CONTENTS.items():
        (served / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
    return served


@pytest.fixture
def url(folder: Path) -> Iterator[str]:
    """The URL of a real HTTP server on loopback."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def local(name: str, folder: Path) -> Location:
    """A folder that is only read."""
    return Location(name=name, folder=folder)


def npm_that(tmp_path: Path, script: str) -> Location:
    """A package whose npm is a shell script: the program itself needs a registry, which a test has not."""
    program = tmp_path / "npm"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return npm_package("some-data@1.0.0", program=str(program), members="package/data", cache=tmp_path / "cache")


def archive(path: Path, contents: dict[str, bytes]) -> Path:
    """An npm archive with these files in its data folder."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"package/data/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


class TestFolders:
    @pytest.mark.parametrize("gzipped", [False, True])
    def test_a_folder_serves_plain_and_gzipped_files(self, tmp_path: Path, gzipped: bool) -> None:
        """Either form, and the location is named."""
        for name, content in CONTENTS.items():
            if gzipped:
                (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
            else:
                (tmp_path / name).write_bytes(content)
        found = fetch_files("SET", FILES, [local("here", tmp_path)])
        assert found.contents == CONTENTS
        assert found.source == "here"
        assert found.failures == ()

    def test_a_damaged_folder_is_reported_and_the_next_one_used(self, tmp_path: Path) -> None:
        """The reason why the first was not used is kept."""
        first, second = tmp_path / "first", tmp_path / "second"
        for each in (first, second):
            each.mkdir()
            for name, content in CONTENTS.items():
                (each / name).write_bytes(content)
        (first / "images").write_bytes(b"damaged")
        found = fetch_files("SET", FILES, [local("one", first), local("two", second)])
        assert found.source == "two"
        assert "images has SHA-256" in found.failures[0]

    @pytest.mark.parametrize(
        "damage", [b"", b"no gzip", gzip.compress(b"other", mtime=0), gzip.compress(CONTENTS["images"], mtime=0)[:-9]]
    )
    def test_a_bad_gzip_file_is_an_error_not_a_traceback(self, tmp_path: Path, damage: bytes) -> None:
        """Empty, another format, other content, truncated."""
        (tmp_path / "images.gz").write_bytes(damage)
        with pytest.raises(DataUnavailableError, match="images"):
            fetch_files("SET", FILES, [local("here", tmp_path)])


class TestMirrors:
    def test_a_mirror_fills_the_cache_and_the_cache_serves_next_time(self, tmp_path: Path, url: str) -> None:
        """Uncompressed, readable by all, into a folder that is made; the second time no mirror is needed."""
        cache = tmp_path / "new" / "cache"
        first = fetch_files("SET", FILES, [mirror(url, cache)])
        second = fetch_files("SET", FILES, [local("the cache", cache)])
        assert CONTENTS == first.contents == second.contents
        assert first.source.startswith("the mirror 127.0.0.1")
        assert sorted(entry.name for entry in cache.iterdir()) == sorted(CONTENTS)
        assert {entry.stat().st_mode & 0o777 for entry in cache.iterdir()} == {0o644}

    def test_a_mirror_that_fails_gives_way_to_the_next(self, tmp_path: Path, url: str) -> None:
        """The first mirror's reason is kept."""
        found = fetch_files("SET", FILES, [mirror(f"{url}/moved", tmp_path / "c"), mirror(url, tmp_path / "c")])
        assert found.contents == CONTENTS
        assert "404" in found.failures[0]

    def test_a_cache_that_cannot_be_written_is_reported(self, tmp_path: Path, url: str) -> None:
        """Not a traceback: the reason is listed among the locations tried."""
        taken = tmp_path / "taken"
        taken.write_text("a file where the cache's folder should be")
        with pytest.raises(DataUnavailableError, match=r"mirror 127\.0\.0\.1:\d+: .*taken"):
            fetch_files("SET", FILES, [mirror(url, taken)])

    @pytest.mark.parametrize(
        ("reply", "words"),
        [
            (gzip.compress(CONTENTS["images"], mtime=0)[:-10], "not a whole gzip file"),
            (b"<html>Please log in to the hotel's network</html>", "login page"),
            (gzip.compress(bytes(100_000_000)), FILES["images"]),
            (gzip.compress(b"x", mtime=0), FILES["images"]),
        ],
    )
    def test_a_wrong_reply_leaves_nothing_behind(
        self, tmp_path: Path, folder: Path, url: str, reply: bytes, words: str
    ) -> None:
        """Neither the file nor a part of it, and what was in the cache before stays; the error says what came."""
        (folder / "images.gz").write_bytes(reply)
        cache = tmp_path / "cache"
        cache.mkdir()
        (cache / "images").write_bytes(b"before")
        with pytest.raises(DataUnavailableError, match=words):
            fetch_files("SET", FILES, [mirror(url, cache)])
        assert [entry.name for entry in cache.iterdir()] == ["images"]
        assert (cache / "images").read_bytes() == b"before"

    def test_a_compressed_reply_is_bounded_while_it_arrives(
        self, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A reply without end must fill neither the memory nor the disk."""
        monkeypatch.setattr("softlabels.data.downloads.MAX_FILE_BYTES", 20)
        with pytest.raises(DataUnavailableError, match=r"images\.gz sends more than the 20 bytes"):
            fetch_files("SET", FILES, [mirror(url, tmp_path / "cache")])
        assert list((tmp_path / "cache").iterdir()) == []

    def test_no_answer_is_reported_in_few_words(self, tmp_path: Path) -> None:
        """A closed port fails at once, without the texts that requests and urllib3 wrap around it."""
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
        with pytest.raises(DataUnavailableError, match=r"cannot be downloaded: [^<>]*refused\)?$"):
            fetch_files("SET", FILES, [mirror(f"http://127.0.0.1:{port}", tmp_path / "cache")])

    def test_a_proxy_of_the_environment_is_used(
        self, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The request goes to the proxy, which here refuses it; `no_proxy` goes around it."""
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        monkeypatch.setenv("no_proxy", "")
        with pytest.raises(DataUnavailableError, match="cannot be downloaded"):
            fetch_files("SET", FILES, [mirror(url, tmp_path / "cache")])
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert fetch_files("SET", FILES, [mirror(url, tmp_path / "cache")]).contents == CONTENTS


class TestNpm:
    def test_the_files_are_taken_out_of_the_package(self, tmp_path: Path) -> None:
        """Only the files wanted, checked, into the cache."""
        packed = archive(tmp_path / "some.tgz", {**CONTENTS, "other": b"x"})
        found = fetch_files("SET", FILES, [npm_that(tmp_path, f"cp {packed} .")])
        assert found.contents == CONTENTS
        assert sorted(entry.name for entry in (tmp_path / "cache").iterdir()) == sorted(CONTENTS)

    def test_no_script_of_the_package_may_run(self, tmp_path: Path) -> None:
        """npm is called for the archive alone."""
        with pytest.raises(DataUnavailableError):
            fetch_files("SET", FILES, [npm_that(tmp_path, f'echo "$@" > {tmp_path}/called; exit 1')])
        assert "pack some-data@1.0.0 --ignore-scripts" in (tmp_path / "called").read_text()

    @pytest.mark.parametrize(
        ("script", "words"),
        [
            ("echo 'npm error code ENOTFOUND' >&2; exit 1", "npm ends with status 1: npm error code ENOTFOUND"),
            ("exit 0", "it gave no reason"),
            ("echo nonsense > some.tgz", "its archive is not as expected"),
        ],
    )
    def test_a_failing_npm_is_reported(self, tmp_path: Path, script: str, words: str) -> None:
        """With its own message."""
        with pytest.raises(DataUnavailableError, match=words):
            fetch_files("SET", FILES, [npm_that(tmp_path, script)])

    @pytest.mark.parametrize(
        ("contents", "words"),
        [
            ({"images": CONTENTS["images"]}, "labels"),
            ({**CONTENTS, "images": CONTENTS["images"][:-1] + b"!"}, "SHA256"),
        ],
    )
    def test_another_package_under_the_name_is_refused(
        self, tmp_path: Path, contents: dict[str, bytes], words: str
    ) -> None:
        """A file missing or changed."""
        npm = npm_that(tmp_path, f"cp {archive(tmp_path / 'some.tgz', contents)} .")
        with pytest.raises(DataUnavailableError, match=words):
            fetch_files("SET", FILES, [npm])


class TestNoLocation:
    def test_the_message_lists_every_location_with_its_reason(self, tmp_path: Path, url: str) -> None:
        """And says what to do."""
        cache = tmp_path / "cache"
        locations = [
            local("SOFTLABELS_DATA", tmp_path / "absent"),
            local("the cache", cache),
            mirror(f"{url}/a", cache),
            mirror(f"{url}/b", cache),
            npm_that(tmp_path, "exit 3"),
        ]
        with pytest.raises(DataUnavailableError) as caught:
            fetch_files("SET", FILES, locations)
        lines = str(caught.value).splitlines()
        assert "SOFTLABELS_DATA" in lines[0]
        assert len(lines) == 6
        assert "there is no such folder" in lines[1]
        assert "status 3" in lines[5]
