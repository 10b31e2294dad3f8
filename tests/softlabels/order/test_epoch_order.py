"""The order of an epoch: a pure function that never changes."""

from __future__ import annotations

import dataclasses
import pickle
from hashlib import blake2b
from math import isqrt
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from softlabels.errors import RequestError
from softlabels.order import EpochOrder
from softlabels.order.permutation import BlockShuffle

DIGEST = "5f" * 32


def an_order(samples: int = 10_000, **changes: Any) -> EpochOrder:
    return EpochOrder(**{"store_digest": DIGEST, "samples": samples, "seed": 0, "epoch": 0, **changes})


def in_order(order: EpochOrder, start: int, stop: int) -> NDArray[np.int64]:
    """The positions at indices [start, stop) of the epoch."""
    return order.positions_at(np.arange(start, stop))


def index_of(order: EpochOrder, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The index at which each position comes: the steps of the shuffle undone one by one."""
    shuffle = order._permutation
    if not isinstance(shuffle, BlockShuffle):
        assert shuffle is not None
        return shuffle.backward(positions)
    padded = shuffle._blocks.backward(positions // shuffle._block) * shuffle._block + positions % shuffle._block
    indices = padded - np.where(padded >= shuffle._gap_begin + shuffle._gap, shuffle._gap, 0)
    windows = padded // shuffle._window
    ordered = np.argsort(windows, kind="stable")
    for rows in np.split(ordered, np.flatnonzero(np.diff(windows[ordered])) + 1):
        begin, within = shuffle._window_shuffle(int(windows[rows[0]]))
        indices[rows] = within.backward(indices[rows] - begin) + begin
    return indices


class TestGoldenOrders:
    """Orders once published never change: a trainer resumes tomorrow, on another machine, where it stopped today."""

    @pytest.mark.parametrize(
        ("order", "first", "checksum"),
        [
            (an_order(10), [6, 8, 5, 4, 3], "fa66eaffa305ba6f"),
            (an_order(4096, seed=1), [3326, 2080, 3218, 3873, 3857], "1a50209e15437b05"),
            (an_order(60_000, seed=2, epoch=3), [22200, 38934, 52202, 20322, 29747], "4d4fadddea2f20c9"),
            (
                an_order(10**9, seed=2**64 - 1, epoch=2**64 - 1),
                [364544694, 742456748, 442487997, 643110353, 645020717],
                "403f2eb0ee15a74e",
            ),
            (
                an_order(2**48),
                [35452821736870, 87456140538523, 93319107962796, 152354374761325, 269937881793825],
                "709abdfde0ec8983",
            ),
            (an_order(1003, block=100, window_blocks=3), [436, 651, 513, 405, 510], "5fdb587d70a98bd6"),
            (
                an_order(10**9 + 1, block=4096),
                [456880290, 839930552, 456880921, 14672491, 649966388],
                "f3c42e1eef145bd5",
            ),
            (an_order(60_000, store_digest="é"), [29910, 47913, 53402, 36900, 24934], "52d9fb5d602c843c"),
        ],
        ids=["short", "longest table", "mnist", "billion", "longest", "short blocks", "long blocks", "not ascii"],
    )
    def test_they_are_as_published(self, order: EpochOrder, first: list[int], checksum: str) -> None:
        """The first positions, and a checksum over the first hundred thousand."""
        positions = in_order(order, 0, min(100_000, order.samples))
        assert first == positions[:5].tolist()
        assert checksum == blake2b(positions.astype("<i8").tobytes(), digest_size=8).hexdigest()


class TestAgainstPlainPython:
    """The decision note's description, once more in whole numbers: what another language would implement."""

    @staticmethod
    def words(order: EpochOrder) -> list[int]:
        """Twelve 64-bit words for the purpose "samples"."""
        digest = order.store_digest.encode()
        material = b"".join(n.to_bytes(8, "little") for n in (len(digest), order.seed, order.epoch)) + digest
        key = blake2b(material, person=b"softlabels-ord-1").digest()
        stream = blake2b(b"samples/0", key=key).digest() + blake2b(b"samples/1", key=key).digest()
        return [int.from_bytes(stream[i : i + 8], "little") for i in range(0, 96, 8)]

    @staticmethod
    def mixed(word: int) -> int:
        for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            word = (word ^ word >> 33) * multiplier % 2**64
        return word ^ word >> 33

    def test_a_short_epoch(self) -> None:
        """Samples sorted by their hashes."""
        order = an_order(500, seed=8)
        first, second, *_ = self.words(order)
        expected = sorted(range(500), key=lambda i: self.mixed(self.mixed((i + first) % 2**64) ^ second))
        assert expected == in_order(order, 0, 500).tolist()

    @pytest.mark.parametrize("samples", [4097, 60_000, 10**9, 2**48])
    def test_a_long_epoch(self, samples: int) -> None:
        """Twelve rounds on a near-square, again until inside."""
        order = an_order(samples, seed=8, epoch=5)
        sides = [isqrt(samples - 1) + 1, -(-samples // (isqrt(samples - 1) + 1))]

        def once(place: int) -> int:
            halves = list(divmod(place, sides[1]))
            for i, word in enumerate(self.words(order)):
                side, spare = sides[i % 2], 64 - sides[i % 2].bit_length()
                mixed = (halves[1 - i % 2] ^ word) * 0xFF51AFD7ED558CCD % 2**64
                mixed = (mixed ^ mixed >> 33) * 0xC4CEB9FE1A85EC53 % 2**64
                halves[i % 2] = (halves[i % 2] + ((mixed >> (64 - spare)) * side >> spare)) % side
            return halves[0] * sides[1] + halves[1]

        expected = []
        for place in range(samples - 500, samples):
            position = once(place)
            while position >= samples:
                position = once(position)
            expected.append(position)
        assert expected == in_order(order, samples - 500, samples).tolist()


class TestPureFunction:
    @pytest.mark.parametrize("block", [None, 64])
    @pytest.mark.parametrize("samples", [1, 2, 100, 4096, 4097, 50_000])
    def test_any_part_is_that_part_of_the_whole(self, samples: int, block: int | None) -> None:
        """Where a reader starts, or how much it asks for, changes nothing."""
        order = an_order(samples, block=block)
        whole = in_order(order, 0, samples)
        assert np.int64 == whole.dtype
        for start, stop in [(0, 1), (0, 0), (samples, samples), (samples // 3, samples // 2 + 1)]:
            assert np.array_equal(whole[start:stop], in_order(an_order(samples, block=block), start, stop))
        places = np.random.default_rng(0).integers(0, samples, 20)
        assert np.array_equal(whole[places], order.positions_at(places))

    @pytest.mark.parametrize("block", [None, 512])
    def test_it_survives_the_journey_to_a_worker(self, block: int | None) -> None:
        """Pickled before and after use, it is equal and gives the same order."""
        order = an_order(block=block)
        fresh = pickle.loads(pickle.dumps(order))
        expected = in_order(order, 0, 100)
        used = pickle.loads(pickle.dumps(order))
        assert order == fresh == used
        assert hash(order) == hash(used)
        assert np.array_equal(expected, in_order(fresh, 0, 100))
        assert np.array_equal(expected, in_order(used, 0, 100))

    @pytest.mark.parametrize("block", [None, 100])
    @pytest.mark.parametrize(
        "change", [{"seed": 1}, {"epoch": 1}, {"store_digest": "60" * 32}, {"seed": 2**63}, {"seed": 1, "epoch": 1}]
    )
    def test_another_seed_epoch_or_store_has_an_unrelated_order(
        self, change: dict[str, Any], block: int | None
    ) -> None:
        """Neither the orders nor their neighbours go together more than by chance."""
        size = 10_000
        one, other = an_order(block=block), an_order(block=block, **change)
        a, b = in_order(one, 0, size), in_order(other, 0, size)
        assert int((a == b).sum()) < 8
        if block is None:
            assert abs(float(np.corrcoef(a, b)[0, 1])) < 4.5 / np.sqrt(size)
            indices = np.argsort(b)[a]
            assert int((np.diff(indices) == 1).sum()) < 8

    @pytest.mark.parametrize("block", [None, 4096])
    def test_each_of_a_billion_samples_comes_once(self, block: int | None) -> None:
        """In 100 parts of 4,096, and at both ends, each position is reached from one index, and each index has one."""
        samples, length = 10**9 + 7, 4096
        order = an_order(samples, block=block)
        begins = np.random.default_rng(0).integers(0, samples - length, 100)
        begins = np.concatenate([begins, [0, samples - length]])
        numbers = np.unique(begins[:, None] + np.arange(length))
        indices = index_of(order, numbers)
        assert 0 <= indices.min() <= indices.max() < samples
        assert np.unique(indices).size == numbers.size
        assert np.array_equal(numbers, order.positions_at(indices))
        assert np.array_equal(numbers, index_of(order, order.positions_at(numbers)))

    def test_seed_and_epoch_are_not_interchangeable(self) -> None:
        """Seed 1 of epoch 2 is not seed 2 of epoch 1."""
        assert not np.array_equal(in_order(an_order(seed=1, epoch=2), 0, 9), in_order(an_order(seed=2, epoch=1), 0, 9))

    def test_orders_of_a_hundred_epochs_are_distinct(self) -> None:
        """A run does not see one order twice."""
        assert 100 == len({tuple(in_order(an_order(1000, epoch=epoch), 0, 1000).tolist()) for epoch in range(100)})


class TestInOrder:
    def test_it_is_the_store_s_own(self) -> None:
        """Without a shuffle, index and position are equal, whatever the seed; the result is the caller's to change."""
        order = an_order(1000, shuffle=False, seed=7)
        assert np.array_equal(np.arange(10, 20), in_order(order, 10, 20))
        indices = np.array([3, 3])
        order.positions_at(indices)[0] = 9
        assert np.array_equal([3, 3], indices)


class TestRefusals:
    @pytest.mark.parametrize(
        "change",
        [
            {"samples": 0},
            {"samples": 2**48 + 1},
            {"samples": 1.0},
            {"seed": -1},
            {"seed": 2**64},
            {"seed": True},
            {"epoch": -1},
            {"epoch": "1"},
            {"block": 0},
            {"window_blocks": 0},
            {"store_digest": ""},
            {"block": 64, "shuffle": False},
        ],
        ids=str,
    )
    def test_what_cannot_be_an_order(self, change: dict[str, Any]) -> None:
        """A wrong number is refused when the order is made, not when it is walked."""
        with pytest.raises(RequestError):
            an_order(**change)

    @pytest.mark.parametrize("values", [[-1], [100], [[1]], [1.0], [2**63]])
    def test_indices_that_do_not_exist(self, values: list[Any]) -> None:
        """An index outside the epoch neither wraps round nor is cut off silently."""
        dtype = np.uint64 if values == [2**63] else None
        with pytest.raises(RequestError):
            an_order(100).positions_at(np.array(values, dtype=dtype))

    def test_it_is_frozen(self) -> None:
        """An order cannot change under a reader."""
        with pytest.raises(dataclasses.FrozenInstanceError):
            an_order().seed = 1  # type: ignore[misc]
