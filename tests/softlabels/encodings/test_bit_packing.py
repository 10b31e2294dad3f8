"""Packing codes of any width into bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softlabels.encodings.array_ops import NUMPY, torch_ops
from softlabels.encodings.bit_packing import BitPacking


class TestBitPacking:
    @pytest.mark.parametrize("bits", [*range(1, 19), 31])
    def test_codes_of_one_width_come_back(self, bits: int) -> None:
        """Every width, with the smallest and the largest code, in both libraries, to the same bytes."""
        codes = np.random.default_rng(bits).integers(0, 1 << bits, size=(3, 37)).astype(np.int32)
        codes[0, :2] = 0, (1 << bits) - 1
        packing = BitPacking.uniform(37, bits)
        packed = packing.pack(NUMPY, codes)
        assert packed.shape == (3, packing.size_bytes)
        assert packed.dtype == np.uint8
        assert np.array_equal(packing.unpack(NUMPY, packed), codes)
        assert np.array_equal(packing.pack(torch_ops(), torch.from_numpy(codes)).numpy(), packed)
        assert np.array_equal(packing.unpack(torch_ops(), torch.from_numpy(packed)).numpy(), codes)

    @given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(0, 2**32 - 1))
    def test_codes_of_mixed_widths_come_back(self, widths: list[int], seed: int) -> None:
        """Any mix of widths, and no more than a byte a plane above the bits themselves."""
        rng = np.random.default_rng(seed)
        codes = np.stack([rng.integers(0, 1 << width, size=2) for width in widths], axis=1).astype(np.int32)
        packing = BitPacking(tuple(widths))
        assert np.array_equal(packing.unpack(NUMPY, packing.pack(NUMPY, codes)), codes)
        assert packing.size_bytes <= sum(widths) / 8 + 4

    def test_four_bit_codes_lie_as_the_page_says(self) -> None:
        """Byte j holds code j in its low half and code j + s in its high half."""
        packed = BitPacking.uniform(5, 4).pack(NUMPY, np.array([[1, 2, 3, 4, 5]], dtype=np.int32))
        assert packed.tolist() == [[1 | 4 << 4, 2 | 5 << 4, 3]]

    def test_six_bit_codes_are_a_plane_of_four_and_one_of_two(self) -> None:
        """The wider plane comes first and has the low bits."""
        packed = BitPacking.uniform(2, 6).pack(NUMPY, np.array([[0b10_0011, 0b01_0100]], dtype=np.int32))
        assert packed.tolist() == [[0x43, 0b0110]]

    def test_nothing_to_pack_takes_no_bytes(self) -> None:
        """No codes, no bytes."""
        assert BitPacking(()).size_bytes == 0
