"""The order of epochs for torch's loaders: exact, cut for ranks, and resumed from what was taken."""

from __future__ import annotations

import itertools
import json
import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler

import softlabels
from softlabels.errors import ChecksumError, ConflictError, FingerprintMismatchError, RequestError, StoreChangedError
from softlabels.transfer_set import ArrayTransferSet, Samples
from softlabels_client import SoftTargetDataset, data_loader
from softlabels_client.data.dataset import data_identity
from softlabels_client.data.sampler import EpochDistributedSampler, EpochSampler

DIGEST = "a" * 64


@pytest.fixture
def dataset(tiny_store: Path, tiny_inputs: ArrayTransferSet) -> Iterator[SoftTargetDataset]:
    """The tiny store with its inputs."""
    with softlabels.open(tiny_store) as store:
        yield SoftTargetDataset(tiny_inputs, store)


def sampler(samples: int = 100, **changes: Any) -> EpochSampler:
    """A sampler over this many samples of no store in particular."""
    return EpochSampler(samples, **{"digest": DIGEST, "batch_size": 8, "rank": 0, "world_size": 1, **changes})


def joined(batches: Iterable[list[int]]) -> list[int]:
    """The positions of all batches, in order."""
    return list(itertools.chain.from_iterable(batches))


def ids_of(batches: Any) -> list[int]:
    """The ids of batches, in order."""
    return [int(sample) for batch in batches for sample in batch.ids]


class TestEpochSampler:
    @given(
        samples=st.integers(1, 300),
        sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
        worlds=st.lists(st.integers(1, 5), min_size=4, max_size=4),
        stops=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    )
    def test_every_sample_once_whatever_ranks_sizes_and_interruptions(
        self, samples: int, sizes: list[int], worlds: list[int], stops: list[float]
    ) -> None:
        """Interrupted at random steps and resumed under other ranks and batch sizes, an epoch is the whole set once."""
        seen: list[int] = []
        state: dict[str, Any] | None = None
        for number, (size, world, stop) in enumerate(zip(sizes, worlds, stops, strict=False)):
            last = number == len(sizes) - 1
            ranks = [sampler(samples, batch_size=size, rank=rank, world_size=world) for rank in range(world)]
            for one in ranks if state else ():
                one.load_state_dict(json.loads(json.dumps(state)))
                one.set_epoch(0)  # also where nothing is left of it
            counts = {len(one) for one in ranks}
            assert len(counts) == 1
            kept = state["batches"] if state else 0
            left = counts.pop() - kept
            steps = left if last else int(left * stop)
            passes = [iter(one) for one in ranks]
            for _ in range(steps):
                for one in passes:
                    seen += next(one)
            states = [one.state_dict() for one in ranks] if steps else [state] * world
            assert all(each == states[0] for each in states)
            state = states[0]
            if last:
                assert all(next(one, None) is None for one in passes)
        assert sorted(seen) == list(range(samples))

    def test_the_order_is_the_epochs(self) -> None:
        """Passes follow each other, each its own order; `set_epoch` chooses one."""
        one, other = sampler(), sampler()
        first, second = list(one), list(one)
        assert first != second
        other.set_epoch(1)
        assert other.epoch == 1
        assert list(other) == second
        other.set_epoch(0)
        assert list(other) == first

    def test_seed_store_and_shuffle_decide(self) -> None:
        """Nothing else does."""
        torch.manual_seed(1)
        first = list(sampler(seed=3))
        torch.manual_seed(2)
        assert list(sampler(seed=3)) == first
        assert list(sampler(seed=4)) != first
        assert list(sampler(seed=3, digest="b" * 64)) != first
        assert joined(sampler(shuffle=False)) == list(range(100))
        assert sorted(joined(sampler(block=10))) == list(range(100))

    @pytest.mark.parametrize(
        ("remainder", "counts"), [("split", [8] * 3 + [1]), ("drop", [8] * 3), ("pad", [8] * 4)], ids=str
    )
    def test_the_remainder(self, remainder: Any, counts: list[int]) -> None:
        """Shared out, left out or filled up, and as many batches on each rank."""
        shares = [list(sampler(50, rank=rank, world_size=2, remainder=remainder)) for rank in range(2)]
        assert [[len(batch) for batch in share] for share in shares] == [counts, counts]

    def test_ranks_come_from_torch_where_it_has_any(self) -> None:
        """Without a process group this is the only rank."""
        assert EpochSampler(10, digest=DIGEST, batch_size=3).ranks == (0, 1)

    @pytest.mark.parametrize(
        "changes", [{"rank": 1}, {"world_size": None}, {"rank": 2, "world_size": 2}, {"batch_size": 0}, {"seed": -1}]
    )
    def test_numbers_that_cannot_be(self, changes: dict[str, Any]) -> None:
        """Refused when the sampler is made, not in the first epoch."""
        with pytest.raises(RequestError):
            sampler(**{"rank": 0, "world_size": 1, **changes})


class TestState:
    @pytest.mark.parametrize(
        ("changes", "error", "match"),
        [
            ({"digest": "b" * 64}, StoreChangedError, "store version a+.*are of b"),
            ({"seed": 1}, ConflictError, "seed = 0, here seed is 1"),
            ({"samples": 90}, ConflictError, "samples = 100, here samples is 90"),
            ({"shuffle": False}, ConflictError, "shuffle"),
            ({"block": 4}, ConflictError, "block"),
            ({"data": "x"}, FingerprintMismatchError, "another order"),
        ],
    )
    def test_a_place_of_another_training_is_refused(
        self, changes: dict[str, Any], error: type[Exception], match: str
    ) -> None:
        """What differs is named: a place there is not a place here."""
        state = sampler().state_dict()
        with pytest.raises(error, match=match):
            sampler(**changes).load_state_dict(state)

    def test_a_state_that_is_none(self) -> None:
        """Whatever else a checkpoint holds is refused, and so are numbers that cannot be."""
        good = sampler().state_dict()
        bad = [{}, {**good, "cursor": "3"}, {**good, "cursor": 101}, {**good, "epoch": -1}, {**good, "batches": True}]
        for state in bad:
            with pytest.raises(RequestError):
                sampler().load_state_dict(state)

    @pytest.mark.parametrize("name", ["cursor", "epoch", "batches", "worker", "sum"])
    def test_a_state_that_was_changed(self, name: str) -> None:
        """Its own checksum tells: the samples that it skips or repeats would be nobody's wish."""
        good = json.loads(json.dumps(sampler().state_dict()))
        sampler().load_state_dict(good)
        with pytest.raises(ChecksumError, match="sampler state was changed"):
            sampler().load_state_dict({**good, name: 3})
        sampler().load_state_dict({**good, name: 3, "sum": None})  # as earlier versions saved it

    def test_inputs_are_told_apart_by_their_ids(self, tiny_inputs: ArrayTransferSet) -> None:
        """Another order is another identity; a set that tells no ids is known by some of its samples."""

        class Silent:
            name = "silent"

            def __len__(self) -> int:
                return len(tiny_inputs)

            def take(self, positions: Any) -> Samples:
                return tiny_inputs.take(positions)

        moved = ArrayTransferSet("moved", tiny_inputs.inputs, ids=np.roll(tiny_inputs.ids, 1))
        names = {data_identity(tiny_inputs), data_identity(moved), data_identity(Silent())}
        assert len(names) == 3
        assert data_identity(Silent()) == data_identity(Silent())

    def test_it_pickles(self) -> None:
        """With its place."""
        one = sampler()
        next(iter(one))
        assert pickle.loads(pickle.dumps(one)).state_dict() == one.state_dict()


class TestLoaderState:
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("taken", [0, 1, 5, 13])
    def test_what_was_fetched_ahead_was_not_taken(self, dataset: Any, workers: int, taken: int) -> None:
        """A loop that stopped after n batches goes on with the next, whatever workers had fetched."""
        make: Callable[..., Any] = lambda: data_loader(dataset, batch_size=16, seed=2, workers=workers)  # noqa: E731
        expected = ids_of(make())
        loader = make()
        batches = iter(loader)
        seen = [next(batches) for _ in range(taken)]
        again = make()
        again.load_state_dict(json.loads(json.dumps(loader.state_dict())))
        assert len(again) == len(loader) == 13
        rest = list(again)
        assert ids_of(seen) + (ids_of(rest) if taken < 13 else []) == expected
        if taken == 13:
            assert ids_of(rest) == ids_of(list(both_epochs(make()))[13:])

    def test_a_thread_fetches_ahead_without_taking(self, dataset: Any) -> None:
        """The place counts what the loop got."""
        loader = data_loader(dataset, batch_size=16, ahead=True)
        batches = iter(loader)
        for taken in range(1, 4):
            next(batches)
            assert loader.state_dict()["cursor"] == 16 * taken
        del batches

    def test_passes_follow_each_other(self, dataset: Any) -> None:
        """A whole one is followed by the next epoch, one broken off begins anew, and a kept one goes on."""
        loader = data_loader(dataset, batch_size=50)
        first = ids_of(loader)
        assert loader.epoch == 1
        second = ids_of([next(iter(loader))])
        assert loader.epoch == 1
        assert ids_of(loader)[:50] == second != first[:50]
        assert (loader.epoch, loader.state_dict()["epoch"], loader.state_dict()["cursor"]) == (2, 1, 200)

    def test_a_finished_epoch_stays_finished_where_a_loop_insists_on_it(self, dataset: Any) -> None:
        """A loop that calls `set_epoch` with the epoch it kept gets what is left of it: nothing."""
        loader = data_loader(dataset, batch_size=50)
        list(loader)
        state = loader.state_dict()
        again = data_loader(dataset, batch_size=50)
        again.load_state_dict(state)
        again.set_epoch(0)
        assert (len(again), list(again), again.epoch) == (4, [], 1)
        again.set_epoch(0)
        assert len(ids_of(again)) == 200

    def test_set_epoch_goes_on_in_the_epoch_that_was_kept(self, dataset: Any) -> None:
        """Frameworks call it before every pass, also before the first after a checkpoint was loaded."""
        loader = data_loader(dataset, batch_size=50)
        loader.set_epoch(7)
        batches = iter(loader)
        seen = ids_of([next(batches)])
        for epoch, count in ((7, 150), (8, 200)):
            again = data_loader(dataset, batch_size=50)
            again.load_state_dict(loader.state_dict())
            again.set_epoch(epoch)
            assert len(ids_of(again)) == count
        again.set_epoch(7)
        assert ids_of(again)[:50] == seen

    def test_its_length_counts_what_was_taken_before(self, dataset: Any) -> None:
        """Under other ranks, too: a progress bar ends where the epoch does."""
        loader = data_loader(dataset, batch_size=20, rank=0, world_size=2)
        assert len(loader) == 5
        batches = iter(loader)
        next(batches)
        again = data_loader(dataset, batch_size=20, rank=0, world_size=1)
        again.load_state_dict(loader.state_dict())
        assert len(again) == 1 + 8
        left = iter(again)
        next(left)
        assert len(again) == 1 + 8
        assert len(list(left)) == 7
        assert len(again) == 10

    def test_other_inputs_are_refused(self, dataset: Any, tiny_inputs: ArrayTransferSet) -> None:
        """The same samples in another order would come twice, or never."""
        state = data_loader(dataset, batch_size=50).state_dict()
        turned = ArrayTransferSet("turned", tiny_inputs.inputs[::-1], ids=tiny_inputs.ids[::-1])
        other = data_loader(SoftTargetDataset(turned, dataset.store), batch_size=50)
        with pytest.raises(FingerprintMismatchError, match="another order"):
            other.load_state_dict(state)

    def test_another_version_of_the_store_is_refused(
        self, dataset: Any, tiny_inputs: ArrayTransferSet, tmp_path: Path, make_store: Any
    ) -> None:
        """Precomputed again with another teacher, under the same name, for the same inputs."""
        state = data_loader(dataset, batch_size=50).state_dict()
        logits_BC = np.random.default_rng(3).normal(size=(200, 10)).astype(np.float32)
        with softlabels.open(make_store(tmp_path / "tiny", tiny_inputs, logits_BC)) as changed:
            other = data_loader(SoftTargetDataset(tiny_inputs, changed), batch_size=50)
            with pytest.raises(StoreChangedError, match=changed.digest) as caught:
                other.load_state_dict(state)
        assert caught.value.context == {"kept": dataset.store.digest, "yours": changed.digest}

    def test_ranks_left_without_a_sample_get_an_empty_batch(self, dataset: Any) -> None:
        """So that all have as many: two samples for three ranks."""
        state = sampler(200).state_dict() | {"cursor": 198, "sum": None}
        sizes = []
        for rank in range(3):
            loader = data_loader(dataset, batch_size=8, rank=rank, world_size=3)
            loader.load_state_dict({**loader.state_dict(), "cursor": state["cursor"], "sum": None})
            (batch,) = loader
            sizes.append(len(batch))
            assert batch.inputs.shape == (len(batch), 4)
            assert batch.targets.logits_BC.shape == (len(batch), 10)
        assert sorted(sizes) == [0, 1, 1]

    def test_interruptions_at_random_steps(self, dataset: Any) -> None:
        """Fifty times over three epochs: the uninterrupted order, batch for batch where the size stays."""
        expected = [batch.ids.tolist() for batch in both_epochs(data_loader(dataset, batch_size=7, seed=1), 3)]
        draw = random.Random(5)
        stops = set(draw.sample(range(1, len(expected)), 50))
        seen: list[list[int]] = []
        state: Any = None
        while len(seen) < len(expected):
            loader = data_loader(dataset, batch_size=7, seed=1)
            if state is not None:
                loader.load_state_dict(state)
            while len(seen) < len(expected):
                for batch in loader:
                    seen.append(batch.ids.tolist())
                    state = loader.state_dict()
                    if len(seen) in stops:
                        break
                else:
                    continue
                break
        assert seen == expected


def both_epochs(loader: Any, epochs: int = 2) -> Iterator[Any]:
    """The batches of this many passes."""
    for _ in range(epochs):
        yield from loader


class TestEpochDistributedSampler:
    @pytest.mark.parametrize("world", [1, 2, 3])
    def test_ranks_share_the_epoch(self, world: int) -> None:
        """Equal counts; with one rank or without a rest every sample once."""
        data: Any = range(100)
        shares = [
            list(EpochDistributedSampler(data, digest=DIGEST, rank=rank, world_size=world)) for rank in range(world)
        ]
        assert {len(share) for share in shares} == {-(-100 // world)}
        assert sorted(set(joined(shares))) == list(range(100))
        assert len(joined(shares)) - 100 == (2 if world == 3 else 0)

    def test_it_is_what_frameworks_look_for(self) -> None:
        """They leave a DistributedSampler in its place and call `set_epoch`; a loader takes it as a sampler."""
        data: Any = range(100)
        one = EpochDistributedSampler(data, digest=DIGEST, rank=1, world_size=2, remainder="drop")
        assert isinstance(one, DistributedSampler)
        first = list(one)
        one.set_epoch(1)
        assert list(one) != first
        one.set_epoch(0, cursor=20)
        assert list(one) == first[10:]
        assert len(one) == len(first) - 10
        assert [int(x) for x in DataLoader(data, sampler=one, batch_size=None)] == first[10:]

    def test_ranks_cannot_have_unequal_shares(self) -> None:
        """Single samples cannot be split by batches."""
        with pytest.raises(RequestError, match="EpochSampler"):
            EpochDistributedSampler(range(3), digest=DIGEST, remainder="split")  # type: ignore[arg-type]
