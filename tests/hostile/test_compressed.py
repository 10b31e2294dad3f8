"""Whatever a compressed chunk declares, no more is decoded than a chunk holds."""

from __future__ import annotations

import zlib
from typing import Any

import numcodecs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softlabels.store.chunks import compress, decompress

SIZE = 4096
F16 = np.dtype("<f2")
COMPRESSIONS = ("zstd", "blosc", "gzip")


def bomb(compression: str, size: int) -> bytes:
    """A valid frame of zeros, of another size than the chunk."""
    zeros = np.zeros(size, dtype=np.uint8)
    if compression == "gzip":
        return zlib.compress(zeros.data, 9)
    return bytes(numcodecs.Zstd(1).encode(zeros) if compression == "zstd" else numcodecs.Blosc("zstd").encode(zeros))


@pytest.mark.parametrize("compression", COMPRESSIONS)
class TestDecompress:
    def test_what_was_compressed_comes_back(self, compression: str) -> None:
        """Chunks of one, two, four and eight bytes an item, bit by bit."""
        for dtype in ("u1", "<f2", "<f4", "<i8"):
            items = np.frombuffer(np.random.default_rng(0).bytes(SIZE), dtype=dtype)
            body = bytes(compress(items, compression))
            found = decompress(body, compression, dtype=np.dtype(dtype), size_bytes=SIZE)
            assert found.tobytes() == items.tobytes()

    @pytest.mark.parametrize("size", [0, 1, SIZE - 1, SIZE + 1, 200 << 20])
    def test_a_frame_of_another_size(self, compression: str, size: int, little_memory: Any) -> None:
        """A frame that holds less would leave rows undefined, one that holds more would fill the memory."""
        body = bomb(compression, size)
        with little_memory(8), pytest.raises(ValueError, match="chunk"):
            decompress(body, compression, dtype=F16, size_bytes=SIZE)

    def test_a_frame_that_lies_about_its_size(self, compression: str, little_memory: Any) -> None:
        """A header that claims the right size for another content is refused as well."""
        for size in (SIZE // 2, SIZE * 2, SIZE * 256):
            body = bytearray(bomb(compression, size))
            if compression == "blosc":
                body[4:8] = SIZE.to_bytes(4, "little")
            elif compression == "zstd":
                body = bytearray(bomb(compression, SIZE)[:7]) + body[7:]
            with little_memory(8):
                try:
                    decompress(bytes(body), compression, dtype=F16, size_bytes=SIZE)
                except ValueError:
                    continue
                assert compression != "gzip"

    @given(body=st.binary(max_size=100))
    def test_anything(self, compression: str, body: bytes) -> None:
        """Random bytes are a plain error."""
        with pytest.raises(ValueError, match="chunk"):
            decompress(body, compression, dtype=F16, size_bytes=SIZE)

    @given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
    def test_a_flipped_bit(self, compression: str, position: int, bit: int) -> None:
        """A damaged frame gives a chunk's worth of bytes or an error, and never anything worse."""
        items = np.arange(SIZE // 2, dtype="<f2")
        body = bytearray(bytes(compress(items, compression)))
        body[position % len(body)] ^= 1 << bit
        try:
            assert decompress(bytes(body), compression, dtype=F16, size_bytes=SIZE).size == SIZE
        except ValueError:
            return
