"""The block shuffle: a bijection that touches few blocks at a time."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from softlabels.order.permutation import BlockShuffle


def order_of(samples: int, *, block: int, window_blocks: int, key: bytes = b"k") -> NDArray[np.int64]:
    return BlockShuffle(samples, key, block=block, window_blocks=window_blocks).forward(np.arange(samples))


class TestBijection:
    @given(
        samples=st.integers(1, 20_000),
        block=st.integers(1, 3000) | st.integers(1, 2**48),
        window_blocks=st.integers(1, 40) | st.integers(1, 2**48),
        key=st.binary(max_size=8),
    )
    def test_every_sample_comes_once(self, samples: int, block: int, window_blocks: int, key: bytes) -> None:
        """Also where the last block is short and lies in the middle; in any order of asking."""
        block = max(block, samples // 500)  # a window costs the same however small: keep the example quick
        shuffle = BlockShuffle(samples, key, block=block, window_blocks=window_blocks)
        order = shuffle.forward(np.arange(samples))
        assert np.array_equal(np.arange(samples), np.sort(order))
        asked = np.random.default_rng(0).integers(0, samples, 50)
        assert np.array_equal(order[asked], shuffle.forward(asked))

    def test_a_billion_do_not_collide(self) -> None:
        """Different indices keep different positions, with windows that are networks of their own."""
        shuffle = BlockShuffle(10**9 + 7, b"k", block=4096, window_blocks=16)
        places = np.concatenate([np.random.default_rng(0).integers(0, 10**9 + 7, 1000), np.arange(100_000)])
        positions = shuffle.forward(places)
        assert np.unique(places).size == np.unique(positions).size

    def test_nothing_asked_nothing_given(self) -> None:
        """No places, no positions."""
        assert BlockShuffle(10, b"k", block=3, window_blocks=2).forward(np.empty(0, dtype=np.int64)).size == 0


class TestLocality:
    @pytest.mark.parametrize("samples", [10_000, 10_001, 9_999, 9_901])
    def test_a_window_draws_on_its_own_blocks_alone(self, samples: int) -> None:
        """Every window's places touch at most its number of blocks, and no block is touched by two windows."""
        block, window_blocks = 100, 8
        index = np.argsort(order_of(samples, block=block, window_blocks=window_blocks))
        blocks = np.array_split(index, np.arange(block, samples, block))
        spans = sorted((int(places.min()), int(places.max())) for places in blocks)
        windows = [spans[i : i + window_blocks] for i in range(0, len(spans), window_blocks)]
        for here, following in pairwise(windows):
            assert max(last for _, last in here) + 1 == min(first for first, _ in following)

    def test_blocks_and_their_samples_are_shuffled(self) -> None:
        """The first place falls in any block and at any offset about equally often over keys."""
        first = np.array([order_of(1000, block=100, window_blocks=2, key=b"%d" % k)[0] for k in range(2000)])
        assert np.all(np.abs(np.bincount(first // 100, minlength=10) - 200) < 4.5 * np.sqrt(200))
        assert np.all(np.abs(np.bincount(first % 100 // 10, minlength=10) - 200) < 4.5 * np.sqrt(200))

    def test_windows_are_shuffled_by_keys_of_their_own(self) -> None:
        """No two windows of one epoch mix their samples alike."""
        windows = order_of(6400, block=64, window_blocks=1).reshape(100, 64) % 64
        assert 100 == len({tuple(window) for window in windows.tolist()})


class TestMemory:
    @pytest.mark.parametrize("samples", [10**6, 10**12])
    def test_it_does_not_grow_with_the_store(self, samples: int) -> None:
        """A thousand places cost less than 500 KB, whatever the store they come from."""
        places = np.arange(1000)
        tracemalloc.start()
        BlockShuffle(samples, b"k", block=1024, window_blocks=16).forward(places)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 500_000
