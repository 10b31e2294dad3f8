"""Writing a file whole or not at all: what is written is what was given, and its size and digest are told."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from softlabels.atomic_files import atomic_path, make_folder, purge, write_atomically


class TestWriteAtomically:
    @given(pieces=st.lists(st.binary(max_size=50), max_size=30))
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_any_pieces(self, tmp_path: Path, pieces: list[bytes]) -> None:
        """Empty ones among them, and none at all."""
        size, digest = write_atomically(tmp_path / "file", pieces)
        assert (tmp_path / "file").read_bytes() == b"".join(pieces)
        assert (size, digest) == (len(b"".join(pieces)), hashlib.sha256(b"".join(pieces)).hexdigest())

    @pytest.mark.parametrize("sizes", [[20_000_000], [100_003] * 300, [1] * 3000, [5, 9_000_000, 7, 9_000_000]])
    def test_large_ones(self, tmp_path: Path, sizes: list[int]) -> None:
        """Larger than a write call takes, more than a write call takes, hashed beside the writing."""
        rng = np.random.default_rng(len(sizes))
        pieces = [rng.integers(0, 256, size, dtype=np.uint8).tobytes() for size in sizes]
        size, digest = write_atomically(tmp_path / "file", pieces)
        assert (tmp_path / "file").read_bytes() == b"".join(pieces)
        assert (size, digest) == (sum(sizes), hashlib.sha256(b"".join(pieces)).hexdigest())

    def test_an_error_halfway_leaves_the_old_file(self, tmp_path: Path) -> None:
        """The contents may come from a generator that fails: nothing of the new file is left."""

        def failing() -> Iterator[bytes]:
            yield bytes(10_000_000)
            raise OSError("the source is gone")

        write_atomically(tmp_path / "file", [b"old"])
        with pytest.raises(OSError, match="gone"):
            write_atomically(tmp_path / "file", failing())
        assert (tmp_path / "file").read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["file"]

    def test_it_is_written_elsewhere_first(self, tmp_path: Path) -> None:
        """In the place given, whose leftovers a later writer purges."""
        (tmp_path / "staging").mkdir()
        (tmp_path / "staging" / "dead.part").write_text("half")
        write_atomically(tmp_path / "a" / "b" / "file", [b"new"], staging=tmp_path / "staging" / "file.part")
        assert purge(tmp_path / "staging") == [tmp_path / "staging" / "dead.part"]
        assert (tmp_path / "a" / "b" / "file").read_bytes() == b"new"


class TestMakeFolder:
    def test_it_may_be_there(self, tmp_path: Path) -> None:
        """Made by this process or by another at the same moment."""
        make_folder(tmp_path / "a" / "b")
        make_folder(tmp_path / "a" / "b")
        assert (tmp_path / "a" / "b").is_dir()


class TestAtomicPath:
    def test_a_finished_file_replaces_the_old_one(self, tmp_path: Path) -> None:
        """And no temporary file is left."""
        (tmp_path / "file").write_bytes(b"old")
        with atomic_path(tmp_path / "file") as temporary:
            temporary.write_bytes(b"new")
        assert (tmp_path / "file").read_bytes() == b"new"
        assert os.listdir(tmp_path) == ["file"]

    def test_an_error_leaves_the_old_file(self, tmp_path: Path) -> None:
        """And removes the temporary one."""
        (tmp_path / "file").write_bytes(b"old")
        with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "file") as temporary:
            temporary.write_bytes(bytes(1 // 0))
        assert (tmp_path / "file").read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["file"]
