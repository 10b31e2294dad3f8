"""Fletcher-32 is computed as the HDF5 library does, for every length and every extreme."""

from __future__ import annotations

import io

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softlabels.store.hdf5_container import fletcher32


def by_the_letter(data: bytes) -> int:
    """`H5_checksum_fletcher32` of H5checksum.c, statement by statement."""
    sum1 = sum2 = 0
    words = len(data) // 2
    position = 0
    while words:
        block = min(360, words)
        words -= block
        for _ in range(block):
            sum1 += data[position] << 8 | data[position + 1]
            position += 2
            sum2 += sum1
        sum1 = (sum1 & 0xFFFF) + (sum1 >> 16)
        sum2 = (sum2 & 0xFFFF) + (sum2 >> 16)
    if len(data) % 2:
        sum1 += data[position] << 8
        sum2 += sum1
        sum1 = (sum1 & 0xFFFF) + (sum1 >> 16)
        sum2 = (sum2 & 0xFFFF) + (sum2 >> 16)
    sum1 = (sum1 & 0xFFFF) + (sum1 >> 16)
    sum2 = (sum2 & 0xFFFF) + (sum2 >> 16)
    return sum2 << 16 | sum1


class TestFletcher32:
    @given(data=st.binary(max_size=3000))
    def test_any_bytes(self, data: bytes) -> None:
        """Odd and even lengths, none at all among them."""
        assert fletcher32(np.frombuffer(data, dtype=np.uint8)) == by_the_letter(data)

    @pytest.mark.parametrize("size", [0, 1, 2, 511, 512, 513, 131_071, 131_072, 131_073, 300_001])
    @pytest.mark.parametrize("value", [0, 1, 255])
    def test_extremes(self, size: int, value: int) -> None:
        """All zeros give 0, all ones the largest sums that there are, around the sizes of blocks."""
        data = np.full(size, value, dtype=np.uint8)
        assert fletcher32(data) == by_the_letter(data.tobytes())

    @pytest.mark.parametrize("position", [0, 1, 255, 256, 65_535, 65_536, 131_071])
    def test_one_byte_anywhere(self, position: int) -> None:
        """The place of a byte counts, in every row, column and block."""
        data = np.zeros(131_072, dtype=np.uint8)
        data[position] = 7
        assert fletcher32(data) == by_the_letter(data.tobytes())

    @pytest.mark.parametrize("size", [1, 2, 3, 1000, 131_072, 200_001])
    def test_what_hdf5_itself_writes(self, size: int) -> None:
        """The four bytes that the HDF5 library puts behind a chunk are ours, little-endian."""
        data = np.random.default_rng(size).integers(0, 256, size=size, dtype=np.uint8)
        with h5py.File(io.BytesIO(), "w") as file:
            dataset = file.create_dataset("x", data=data, chunks=(size,), fletcher32=True)
            file.flush()
            _, raw = dataset.id.read_direct_chunk((0,))
        assert raw[:-4] == data.tobytes()
        assert int.from_bytes(raw[-4:], "little") == fletcher32(data)

    def test_bytes_at_an_odd_address(self) -> None:
        """Chunks lie anywhere in a mapped file."""
        data = np.random.default_rng(0).integers(0, 256, size=200_003, dtype=np.uint8)
        for start in range(1, 9):
            assert fletcher32(data[start:]) == fletcher32(data[start:].copy())
