"""How idx files are read: strictly."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from softlabels.data.mnist import parse_idx
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
