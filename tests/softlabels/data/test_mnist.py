"""MNIST as transfer sets: idx files are read strictly; the real files where they are at hand; errors where not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from softlabels.data.mnist import MIRRORS, load_mnist, mnist_locations, open_mnist, parse_idx
from softlabels.errors import DataUnavailableError, TruncatedError


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    """An idx file of unsigned bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()


class TestParseIdx:
    @given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=4))
    def test_what_was_written_is_read_back(self, shape: list[int]) -> None:
        """Any sizes, none included, come back as they were, in an array that may be written to."""
        array = np.arange(math.prod(shape), dtype=np.uint8).reshape(shape)
        found = parse_idx(idx_bytes(array), name="f", dimensions=len(shape))
        np.testing.assert_array_equal(array, found)
        assert found.flags.writeable

    @given(cut=st.integers(1, 27))
    def test_a_cut_file_is_refused(self, cut: int) -> None:
        """Whatever part is missing at the end, header included, it is an error that names the file."""
        whole = idx_bytes(np.zeros((3, 2, 2), np.uint8))
        with pytest.raises(TruncatedError, match="images"):
            parse_idx(whole[:-cut], name="images", dimensions=3)

    def test_bytes_after_the_last_element_are_refused(self) -> None:
        """A longer file is another file."""
        with pytest.raises(DataUnavailableError, match="2 bytes after its last element"):
            parse_idx(idx_bytes(np.zeros(3, np.uint8)) + b"xx", name="labels", dimensions=1)

    @pytest.mark.parametrize(
        "magic", [b"\x1f\x8b\x08\x00", b"\x00\x00\x08\x03", b"\x00\x00\x0d\x01", b"\x01\x00\x08\x01"]
    )
    def test_another_magic_is_refused(self, magic: bytes) -> None:
        """A gzip file, another number of dimensions, floats, or no idx file at all."""
        with pytest.raises(DataUnavailableError, match=magic.hex()):
            parse_idx(magic + bytes(20), name="labels", dimensions=1)

    def test_sizes_that_lie_do_not_allocate(self) -> None:
        """A header that promises 2^96 elements meets the length check, not the memory."""
        with pytest.raises(TruncatedError, match="ends after 0 of"):
            parse_idx(bytes([0, 0, 8, 3]) + b"\xff" * 12, name="images", dimensions=3)


class TestLocations:
    def test_the_environment_names_the_folders(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """`SOFTLABELS_DATA` first, then the cache, then the mirrors."""
        monkeypatch.setenv("SOFTLABELS_DATA", str(tmp_path / "data"))
        monkeypatch.setenv("SOFTLABELS_CACHE", str(tmp_path / "cache"))
        data, cache, *mirrors = mnist_locations()[: 2 + len(MIRRORS)]
        assert (data.folder, data.download) == (tmp_path / "data" / "mnist", None)
        assert (cache.folder, cache.download) == (tmp_path / "cache" / "mnist", None)
        assert all(each.name.startswith("the mirror") and each.folder == cache.folder for each in mirrors)

    def test_without_them_the_cache_is_in_the_home_folder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """And there is no folder before it."""
        monkeypatch.delenv("SOFTLABELS_DATA", raising=False)
        monkeypatch.delenv("SOFTLABELS_CACHE", raising=False)
        assert mnist_locations()[0].folder == Path.home() / ".cache" / "softlabels" / "mnist"

    def test_npm_is_left_out_where_there_is_none(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """An empty PATH holds no npm."""
        monkeypatch.setenv("PATH", str(tmp_path))
        assert not any("npm" in each.name for each in mnist_locations())


class TestLoadMnist:
    def test_a_folder_that_is_named_is_the_only_place(self, tmp_path: Path) -> None:
        """No download takes the place of a folder that the caller chose."""
        with pytest.raises(DataUnavailableError, match="holds neither train-images-idx3-ubyte") as caught:
            load_mnist(folder=tmp_path)
        assert "mirror" not in str(caught.value)

    def test_an_unknown_split_is_refused(self) -> None:
        """There are two."""
        with pytest.raises(DataUnavailableError, match="'train' and 'test', not 'valid'"):
            load_mnist(split="valid")  # type: ignore[arg-type]

    @pytest.mark.needs_data
    def test_the_real_files_are_as_the_world_knows_them(self, data_dir: Path) -> None:
        """The known count of each class, ids by position, inputs as bytes."""
        mnist = open_mnist(folder=data_dir / "mnist")
        assert mnist.train.name == "mnist"
        assert mnist.test.name == "mnist-test"
        assert mnist.train.inputs.shape == (60_000, 28, 28)
        assert mnist.test.inputs.shape == (10_000, 28, 28)
        assert mnist.train.inputs.dtype == np.uint8
        assert mnist.train.labels is not None
        assert mnist.test.labels is not None
        assert np.bincount(mnist.train.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
        assert int((mnist.test.labels == 3).sum()) == 1_010
        np.testing.assert_array_equal(np.arange(60_000), mnist.train.ids)
        np.testing.assert_array_equal(mnist.test.inputs, load_mnist(folder=data_dir / "mnist", split="test").inputs)
