"""The keyed shuffles: bijections, fair ones, in constant memory."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from softlabels.order.permutation import (
    LONGEST,
    ROUNDS,
    TABLE_LIMIT,
    FeistelNetwork,
    ShuffledTable,
    keyed_permutation,
    subkeys,
)

Counts = NDArray[np.int64]
MOST_SIGMAS = 4.5
"""One fair test in 300,000 passes this by chance; the keys are fixed, so a test that passes once always does."""


def words_of(number: int) -> NDArray[np.uint64]:
    return subkeys(number.to_bytes(8, "little"), "test")


def shuffled(size: int, number: int) -> Counts:
    return keyed_permutation(size, words_of(number)).forward(np.arange(size))


def sigmas(counts: Counts) -> float:
    """How many standard deviations Pearson's chi-square lies above its mean, were all counts expected equal."""
    freedom = counts.size - 1
    expected = counts.mean()
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


class TestBijection:
    @given(size=st.integers(1, 100_000), number=st.integers(0, 2**63))
    def test_every_number_is_reached_once(self, size: int, number: int) -> None:
        """Each of 0 … n - 1 comes out exactly once, and the inverse finds where from."""
        permutation = keyed_permutation(size, words_of(number))
        moved = permutation.forward(np.arange(size))
        assert np.array_equal(np.arange(size), np.sort(moved))
        assert np.array_equal(np.arange(size), permutation.backward(moved))

    @pytest.mark.parametrize("size", [*range(1, 40), 255, 256, 257, 4096, 4097, 65_535, 65_536, 65_537, 99_999])
    def test_the_network_is_one_at_every_length(self, size: int) -> None:
        """Also where a table would be used, at squares and beside them."""
        network = FeistelNetwork(size, words_of(size))
        moved = network.forward(np.arange(size))
        assert np.array_equal(np.arange(size), np.sort(moved))
        assert np.array_equal(np.arange(size), network.backward(moved))

    @pytest.mark.parametrize("size", [10**9, 2**32 + 1, 10**12, LONGEST - 1, LONGEST])
    def test_long_ranges_come_back(self, size: int) -> None:
        """A million numbers at random, and both ends, return from there and back."""
        permutation = keyed_permutation(size, words_of(1))
        edge = np.arange(1000)
        numbers = np.concatenate([np.random.default_rng(0).integers(0, size, 1_000_000), edge, size - 1 - edge])
        moved = permutation.forward(numbers)
        assert 0 <= int(moved.min()) <= int(moved.max()) < size
        assert np.array_equal(numbers, permutation.backward(moved))
        assert np.array_equal(numbers, permutation.forward(permutation.backward(numbers)))

    def test_long_structured_ranges_do_not_collide(self) -> None:
        """1.6 million numbers in runs, strides and columns of the network's square stay distinct at 10⁹."""
        size, run = 10**9, np.arange(400_000)
        runs = [run, size - 1 - run, 500_000_000 + run, run * 2048, run[:31_000] * 31_623]
        numbers = np.array(sorted(set(np.concatenate(runs).tolist())))
        moved = np.sort(keyed_permutation(size, words_of(2)).forward(numbers))
        assert bool(np.all(moved[:-1] < moved[1:]))

    def test_the_length_decides_how(self) -> None:
        """Short ranges are tables, long ones networks."""
        assert isinstance(keyed_permutation(TABLE_LIMIT, words_of(0)), ShuffledTable)
        assert isinstance(keyed_permutation(TABLE_LIMIT + 1, words_of(0)), FeistelNetwork)


class TestFairnessOfShortRanges:
    @pytest.mark.parametrize("size", [2, 3, 4, 5])
    def test_all_orders_are_equally_likely(self, size: int) -> None:
        """Over 24,000 keys each of the n! orders appears as often as any other."""
        radix = size ** np.arange(size)
        codes = np.array([int((shuffled(size, number) * radix).sum()) for number in range(24_000)])
        orders, counts = np.unique(codes, return_counts=True)
        assert math.factorial(size) == orders.size
        assert sigmas(counts) < MOST_SIGMAS

    @pytest.mark.parametrize(("size", "keys"), [(10, 10_000), (100, 10_000)])
    def test_every_element_lands_everywhere(self, size: int, keys: int) -> None:
        """The table of (element, place) is flat, and so is that of what follows what."""
        landed = np.zeros((size, size), dtype=np.int64)
        followed = np.zeros((size, size), dtype=np.int64)
        for number in range(keys):
            order = shuffled(size, number)
            landed[np.arange(size), order] += 1
            followed[order[:-1], order[1:]] += 1
        assert max(sigmas(row) for row in landed) < MOST_SIGMAS
        assert sigmas(landed.ravel()) < MOST_SIGMAS
        assert sigmas(followed[~np.eye(size, dtype=bool)]) < MOST_SIGMAS


class TestFairnessOfTheNetwork:
    SIZE, KEYS = TABLE_LIMIT + 1, 2000  # the shortest range it meets is the hardest

    def orders(self, *, rounds: int) -> NDArray[np.int64]:
        index = np.arange(self.SIZE)
        return np.stack([FeistelNetwork(self.SIZE, words_of(k)[:rounds]).forward(index) for k in range(self.KEYS)])

    @staticmethod
    def neighbours(orders: NDArray[np.int64]) -> float:
        """How often i + 1 comes right after i in an order; 1 in a fair shuffle, with a variance of 1."""
        return float((np.diff(orders, axis=1) == 1).sum(axis=1).mean())

    def test_elements_land_everywhere(self) -> None:
        """Thirty elements, each over 40 bins of places, and pairs of them over 64 cells."""
        orders = self.orders(rounds=ROUNDS)
        for element in [*range(10), *range(2040, 2050), *range(self.SIZE - 10, self.SIZE)]:
            assert sigmas(np.bincount(orders[:, element] * 40 // self.SIZE, minlength=40)) < MOST_SIGMAS
        cells = orders * 8 // self.SIZE
        for element in range(0, 4000, 400):
            pair = cells[:, element] * 8 + cells[:, element + 1]
            assert sigmas(np.bincount(pair, minlength=64)) < MOST_SIGMAS

    def test_what_follows_is_unrelated(self) -> None:
        """Neighbours are neither near nor correlated; fixed points and successors are one each, as by chance."""
        orders = self.orders(rounds=ROUNDS)
        steps = np.diff(orders, axis=1) % self.SIZE
        assert sigmas(np.bincount((steps * 64 // self.SIZE).ravel(), minlength=64)) < MOST_SIGMAS
        centred = orders / (self.SIZE - 1) - 0.5
        correlations = 12 * (centred[:, :-1] * centred[:, 1:]).mean(axis=1)
        assert abs(float(correlations.mean())) < 1 / self.SIZE + 4.5 / math.sqrt(self.SIZE * self.KEYS)
        assert float(correlations.std()) * math.sqrt(self.SIZE) == pytest.approx(1, abs=0.07)
        fixed = (orders == np.arange(self.SIZE)).sum(axis=1)
        assert float(fixed.mean()) == pytest.approx(1, abs=4.5 / math.sqrt(self.KEYS))
        assert float(fixed.var()) == pytest.approx(1, abs=0.2)
        assert self.neighbours(orders) == pytest.approx(1, abs=4.5 / math.sqrt(self.KEYS))

    def test_these_tests_can_fail(self) -> None:
        """Four rounds leave twice as many neighbours together, two leave sixty times."""
        assert 1.5 < self.neighbours(self.orders(rounds=4)) < 2.5
        assert self.neighbours(self.orders(rounds=2)) > 30

    def test_columns_of_a_billion_spread(self) -> None:
        """Numbers that share a half of the network's square spread over the whole range all the same."""
        network = keyed_permutation(10**9, words_of(3))
        for column in (np.arange(31_000), np.arange(31_000) * 31_623, np.arange(31_000) * 32_768):
            assert sigmas(np.bincount(network.forward(column) * 200 // 10**9, minlength=200)) < MOST_SIGMAS


class TestMemory:
    @pytest.mark.parametrize("size", [10**5, 10**9, LONGEST])
    def test_it_does_not_grow_with_the_range(self, size: int) -> None:
        """A thousand numbers cost less than 200 KB, whatever the range they come from."""
        index = np.arange(1000)
        tracemalloc.start()
        keyed_permutation(size, words_of(0)).forward(index)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 200_000
