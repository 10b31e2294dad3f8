"""Ranks and batches: every sample once, whoever takes it, however often the epoch is cut."""

from __future__ import annotations

import tracemalloc
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from softlabels.errors import RequestError
from softlabels.order import EpochConfig, EpochOrder, RankBatches, Remainder

sizes = st.integers(1, 700)
worlds = st.integers(1, 9)
batch_sizes = st.integers(1, 80)


def an_order(samples: int, **changes: Any) -> EpochOrder:
    return EpochOrder("d", samples, **{"seed": 3, "epoch": 1, **changes})


def config_of(**changes: Any) -> EpochConfig:
    return EpochConfig(**{"seed": 3, "epoch": 1, **changes})


def ranks_of(samples: int, world_size: int, batch_size: int, **changes: Any) -> list[RankBatches]:
    return [
        RankBatches(an_order(samples), config_of(batch_size=batch_size, rank=rank, world_size=world_size, **changes))
        for rank in range(world_size)
    ]


def in_order(order: EpochOrder, start: int, stop: int) -> NDArray[np.int64]:
    """The positions at indices [start, stop) of the epoch."""
    return order.positions_at(np.arange(start, stop))


def taken(ranks: list[RankBatches], step: int) -> NDArray[np.int64]:
    """What all ranks together take at a step, in rank order."""
    return np.concatenate([rank.batch_positions(step) for rank in ranks])


class TestSplit:
    @given(samples=sizes, world_size=worlds, batch_size=batch_sizes, data=st.data())
    def test_every_sample_once_in_order(
        self, samples: int, world_size: int, batch_size: int, data: st.DataObject
    ) -> None:
        """From any cursor, the ranks' batches side by side are the rest of the epoch's order, no more, no less."""
        cursor = data.draw(st.integers(0, samples))
        ranks = ranks_of(samples, world_size, batch_size, cursor=cursor)
        assert 1 == len({rank.batch_count for rank in ranks})
        steps = [taken(ranks, step) for step in range(len(ranks[0]))]
        assert np.array_equal(in_order(an_order(samples), cursor, samples), np.concatenate([*steps, np.empty(0, int)]))
        assert -(-(samples - cursor) // (world_size * batch_size)) == len(steps)

    @given(samples=sizes, world_size=worlds, batch_size=batch_sizes)
    def test_batches_are_full_then_even_and_not_empty(self, samples: int, world_size: int, batch_size: int) -> None:
        """All but the last two steps are full; a step's batches differ by one at most; none is empty without need."""
        ranks = ranks_of(samples, world_size, batch_size)
        for step in range(len(ranks[0])):
            shares = [rank.batch_samples(step) for rank in ranks]
            assert max(shares) - min(shares) <= 1
            assert max(shares) <= batch_size
            assert step >= len(ranks[0]) - 2 or min(shares) == batch_size
            assert min(shares) > 0 or batch_size == 1 or samples < world_size

    def test_a_rest_smaller_than_the_ranks_is_shared_with_the_step_before(self) -> None:
        """Four ranks of eight with 66 samples: 32, then 17 and 17, rather than 32, 32 and 2 with two ranks idle."""
        ranks = ranks_of(66, 4, 8)
        assert [32, 17, 17] == [sum(rank.batch_samples(step) for rank in ranks) for step in range(3)]

    @given(samples=sizes, world_size=worlds, batch_size=batch_sizes)
    def test_resumed_alike_it_goes_on_alike(self, samples: int, world_size: int, batch_size: int) -> None:
        """With the same ranks and batch size, a resumed epoch takes the very batches of one that was never broken."""
        ranks = ranks_of(samples, world_size, batch_size)
        for step in range(len(ranks[0]) - 1):
            resumed = [RankBatches(r.order, r.config.resumed_at(r.cursor_after(step))) for r in ranks]
            assert len(ranks[0]) - step - 1 == len(resumed[0])
            for rank, again in zip(ranks, resumed, strict=True):
                assert np.array_equal(rank.batch_positions(step + 1), again.batch_positions(0))


class TestElasticity:
    @given(samples=sizes, data=st.data())
    def test_any_change_of_ranks_and_batches_keeps_every_sample_once(self, samples: int, data: st.DataObject) -> None:
        """However the job is cut and re-cut at its cursors, the epoch is its order, each sample once."""
        seen: list[NDArray[np.int64]] = []
        cursor = 0
        while cursor < samples:
            ranks = ranks_of(samples, data.draw(worlds), data.draw(batch_sizes), cursor=cursor)
            for step in range(data.draw(st.integers(1, len(ranks[0])))):
                seen.append(taken(ranks, step))
                cursor = ranks[0].cursor_after(step)
                assert {cursor} == {rank.cursor_after(step) for rank in ranks}
        assert np.array_equal(in_order(an_order(samples), 0, samples), np.concatenate(seen))

    @pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
    def test_a_step_is_the_same_samples_on_any_number_of_ranks(self, world_size: int) -> None:
        """One rank of 24 or twelve of two: step s takes the same samples in the same order."""
        alone = ranks_of(1000, 1, 24)
        ranks = ranks_of(1000, world_size, 24 // world_size)
        for step in range(len(alone[0])):
            assert np.array_equal(taken(alone, step), taken(ranks, step))


class TestDrop:
    @given(samples=sizes, world_size=worlds, batch_size=batch_sizes)
    def test_all_batches_are_full_and_the_rest_is_told(self, samples: int, world_size: int, batch_size: int) -> None:
        """What is taken and what is left out make up the epoch."""
        ranks = ranks_of(samples, world_size, batch_size, remainder="drop")
        steps = [taken(ranks, step) for step in range(len(ranks[0]))]
        assert all(step.size == world_size * batch_size for step in steps)
        seen = np.concatenate([*steps, np.empty(0, int)])
        assert samples == seen.size + ranks[0].left_out
        assert ranks[0].left_out < world_size * batch_size
        assert np.array_equal(in_order(an_order(samples), 0, seen.size), seen)

    def test_nothing_is_left_out_otherwise(self) -> None:
        """Only "drop" drops."""
        assert 0 == ranks_of(10, 3, 3, remainder="pad")[0].left_out == ranks_of(10, 3, 3)[0].left_out


class TestPad:
    @given(samples=sizes, world_size=worlds, batch_size=batch_sizes)
    def test_all_batches_are_full_and_repeats_are_marked(self, samples: int, world_size: int, batch_size: int) -> None:
        """Without what is marked as repeated, every sample is there once; what is repeated is the epoch's beginning."""
        ranks = ranks_of(samples, world_size, batch_size, remainder="pad")
        walks = [list(rank) for rank in ranks]
        assert all(batch.positions.size == batch_size for walk in walks for batch in walk)
        order = in_order(an_order(samples), 0, samples)
        everything = np.concatenate([batch.positions for step in zip(*walks, strict=True) for batch in step])
        assert np.array_equal(np.resize(order, everything.size), everything)
        new = [batch.positions[: batch.positions.size - batch.repeated] for walk in walks for batch in walk]
        assert np.array_equal(np.arange(samples), np.sort(np.concatenate(new)))
        assert samples == walks[0][-1].cursor_after


class TestWalk:
    @pytest.mark.parametrize("remainder", ["split", "drop", "pad"])
    @given(samples=st.integers(1, 40_000), world_size=worlds, batch_size=st.integers(20, 900))
    def test_it_gives_what_asking_step_by_step_gives(
        self, remainder: Remainder, samples: int, world_size: int, batch_size: int
    ) -> None:
        """Working ahead changes nothing, and the sum of the batches is known beforehand."""
        rank = ranks_of(samples, world_size, batch_size, remainder=remainder)[world_size // 2]
        walk = list(rank)
        assert list(range(rank.batch_count)) == [batch.step for batch in walk]
        assert rank.sample_count == sum(batch.positions.size for batch in walk)
        for batch in walk[:2] + walk[-3:]:
            assert np.array_equal(rank.batch_positions(batch.step), batch.positions)
            assert rank.cursor_after(batch.step) == batch.cursor_after

    @pytest.mark.parametrize("workers", [1, 2, 4, 50])
    def test_workers_share_a_rank_s_steps(self, workers: int) -> None:
        """Taken in turn, what the workers have is what one would have had."""
        rank = ranks_of(1000, 2, 16)[1]
        steps = [batch for worker in range(workers) for batch in rank.steps(worker, stride=workers)]
        for expected, batch in zip(rank, sorted(steps, key=lambda batch: batch.step), strict=True):
            assert expected.step == batch.step
            assert np.array_equal(expected.positions, batch.positions)

    def test_an_epoch_that_is_over_has_no_batches(self) -> None:
        """At the last cursor there is nothing to take, and a step is refused."""
        rank = ranks_of(100, 2, 16, cursor=100)[0]
        assert [] == list(rank)
        assert 0 == rank.batch_count == rank.sample_count
        with pytest.raises(RequestError, match="no step 0"):
            rank.batch_positions(0)

    def test_memory_does_not_grow_with_the_epoch(self) -> None:
        """A hundred batches of an epoch of 10¹² samples cost less than 2 MB."""
        rank = RankBatches(an_order(10**12), config_of(batch_size=1024, rank=3, world_size=8))
        tracemalloc.start()
        for _, batch in zip(range(100), rank, strict=False):
            assert 1024 == batch.positions.size
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2_000_000


class TestRefusals:
    @pytest.mark.parametrize(
        "change",
        [
            {"batch_size": 0},
            {"batch_size": 2.5},
            {"world_size": 0},
            {"rank": 2},
            {"rank": -1},
            {"cursor": -1},
            {"cursor": 101},
            {"remainder": "keep"},
        ],
        ids=str,
    )
    def test_what_cannot_be_a_share(self, change: dict[str, Any]) -> None:
        """A wrong number is refused when the share is made."""
        with pytest.raises(RequestError):
            RankBatches(an_order(100), config_of(**{"batch_size": 4, "rank": 0, "world_size": 2, **change}))

    @pytest.mark.parametrize("step", [-1, 13])
    def test_steps_that_do_not_exist(self, step: int) -> None:
        """A step before the first or after the last is not wrapped round."""
        rank = ranks_of(100, 2, 4)[0]
        for ask in (rank.batch_positions, rank.batch_samples, rank.cursor_after):
            with pytest.raises(RequestError):
                cast("Any", ask)(step)

    @pytest.mark.parametrize(("first_step", "stride"), [(-1, 1), (0, 0)])
    def test_walks_that_go_nowhere(self, first_step: int, stride: int) -> None:
        """Refused when asked for, not at the first batch."""
        with pytest.raises(RequestError):
            ranks_of(100, 2, 4)[0].steps(first_step, stride=stride)
