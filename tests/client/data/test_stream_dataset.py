"""An epoch as a stream through torch's loaders: shared exactly by ranks and workers, resumed under others."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info

import softlabels
from softlabels.errors import (
    BadIdsError,
    ConflictError,
    FingerprintMismatchError,
    RequestError,
    StoreChangedError,
    TemperatureError,
)
from softlabels.transfer_set import ArrayTransferSet, Samples
from softlabels_client import SoftTargetStream, StatefulLoader, stream_loader
from softlabels_client.data.loader import DistillationBatch

# torch warns of more workers than cores; some of these tests want more wherever they run.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Two cores are shared with servers and other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["near", "far"])
def store(request: pytest.FixtureRequest, tiny_store: Path, served_store: str) -> Iterator[softlabels.TargetStore]:
    """The tiny store on this disk, and behind its server."""
    with softlabels.open(tiny_store if request.param == "near" else served_store) as opened:
        yield opened


@pytest.fixture
def far(served_store: str) -> Iterator[softlabels.TargetStore]:
    """The tiny store behind its server."""
    with softlabels.open(served_store) as opened:
        yield opened


def pairs(batches: Any) -> list[tuple[int, bytes, bytes]]:
    """Of each row its id, its target's bytes and its input's, in order."""
    return [
        (int(sample), row.numpy().tobytes(), given.numpy().tobytes())
        for batch in batches
        for sample, row, given in zip(batch.ids, batch.targets.logits_BC, batch.inputs, strict=True)
    ]


def own_pairs(store: softlabels.TargetStore, inputs: ArrayTransferSet) -> set[tuple[int, bytes, bytes]]:
    """What every sample should come with."""
    targets = store.batch(inputs.ids)
    return {
        (int(sample), row.tobytes(), given.tobytes())
        for sample, row, given in zip(inputs.ids, targets.logits(), inputs.inputs, strict=True)
    }


def stream_of(store: softlabels.TargetStore, inputs: Any = None, **changes: Any) -> SoftTargetStream:
    """A stream of the tiny store."""
    return SoftTargetStream(store, inputs, **{"batch_size": 16, "seed": 3, **changes})


class TestBatches:
    @pytest.mark.parametrize("world", [1, 2, 3])
    @pytest.mark.parametrize("remainder", ["split", "drop", "pad"])
    def test_batches_do_not_depend_on_workers(self, far: Any, tiny_inputs: Any, world: int, remainder: Any) -> None:
        """For each rank the same batches, in the same order, by one process as by workers; in `split` each once."""
        seen = []
        for rank in range(world):
            known = {"rank": rank, "world_size": world, "remainder": remainder}
            expected = [pairs([batch]) for batch in stream_loader(stream_of(far, tiny_inputs, **known))]
            loader = stream_loader(stream_of(far, tiny_inputs, **known), workers=3, start_method="fork")
            assert [pairs([batch]) for batch in loader] == expected
            assert len(expected) == len(loader)
            seen += [pair for batch in expected for pair in batch]
        if remainder == "split":
            assert len(seen) == 200
        if remainder != "drop":
            assert set(seen) == own_pairs(far, tiny_inputs)

    @pytest.mark.parametrize(
        ("workers", "method"),
        [
            (0, None),
            (4, "fork"),
            pytest.param(1, "spawn", marks=pytest.mark.slow),
            pytest.param(4, "forkserver", marks=pytest.mark.slow),
        ],
        ids=str,
    )
    def test_epochs_follow_each_other(self, store: Any, tiny_inputs: Any, workers: int, method: Any) -> None:
        """Near and far and however workers start: workers that live on learn of the new epoch."""
        loader = stream_loader(stream_of(store, tiny_inputs), workers=workers, start_method=method)
        passes = [pairs(loader) for _ in range(3)]
        for seen in passes:
            assert len(seen) == 200
            assert set(seen) == own_pairs(store, tiny_inputs)
        assert passes[0] != passes[1] != passes[2]
        orders = [far_order(store, epoch) for epoch in range(3)]
        assert [[sample for sample, _, _ in seen] for seen in passes] == orders

    def test_a_store_alone(self, far: Any) -> None:
        """Without inputs the batches have none, and pair by id as ever."""
        batches = list(stream_loader(stream_of(far)))
        assert [tuple(batch.inputs.shape) for batch in batches] == [(16, 0)] * 12 + [(8, 0)]
        assert sorted(int(sample) for batch in batches for sample in batch.ids) == list(range(200))

    def test_inputs_in_another_order_pair_by_id(self, far: Any, tiny_inputs: ArrayTransferSet) -> None:
        """The stream's order is the store's; inputs lie as they like, also where their ids come with each sample."""
        order = np.random.default_rng(1).permutation(200)
        moved = ArrayTransferSet("moved", tiny_inputs.inputs[order], ids=tiny_inputs.ids[order])

        class Silent:
            name = "silent"

            def __len__(self) -> int:
                return 200

            def take(self, positions: Any) -> Samples:
                return moved.take(positions)

        for inputs in (moved, Silent()):
            assert set(pairs(stream_loader(stream_of(far, inputs)))) == own_pairs(far, tiny_inputs)

    def test_ranks_left_without_a_sample_get_an_empty_batch(self, store: Any, tiny_inputs: Any) -> None:
        """So that all have as many: two samples for three ranks, with inputs and without."""
        for inputs, width in ((tiny_inputs, 4), (None, 0)):
            sizes = []
            for rank in range(3):
                loader = stream_loader(stream_of(store, inputs, rank=rank, world_size=3))
                loader.load_state_dict({**loader.state_dict(), "cursor": 198, "sum": None})
                (batch,) = loader
                assert batch.inputs.shape == (len(batch), width)
                sizes.append(len(batch))
            assert sorted(sizes) == [0, 1, 1]

    def test_blocks_and_the_stores_own_order(self, far: Any) -> None:
        """As `TargetStore.epoch` takes them."""
        plain = [
            int(sample) for batch in stream_loader(stream_of(far, shuffle=False), workers=2) for sample in batch.ids
        ]
        assert plain == list(range(200))
        blocks = [int(sample) for batch in stream_loader(stream_of(far, block=8), workers=2) for sample in batch.ids]
        assert sorted(blocks) == plain != blocks


def far_order(store: softlabels.TargetStore, epoch: int) -> list[int]:
    """The ids of an epoch as the store itself gives them."""
    return [int(sample) for batch in store.epoch(seed=3, epoch=epoch, batch_size=16) for sample in batch.ids]


class TestChecks:
    def test_shuffled_inputs_are_found_out(self, far: Any, tiny_inputs: ArrayTransferSet) -> None:
        """By their fingerprints, as what they are."""
        shuffled = ArrayTransferSet("shuffled", tiny_inputs.inputs[::-1])
        with pytest.raises(FingerprintMismatchError, match="not those that the targets"):
            list(stream_loader(stream_of(far, shuffled)))

    def test_samples_that_the_inputs_lack_are_named(self, far: Any, tiny_inputs: ArrayTransferSet) -> None:
        """A stream goes through the whole store."""
        some = ArrayTransferSet("some", tiny_inputs.inputs[:199])
        with pytest.raises(FingerprintMismatchError, match="targets for 199"):
            list(stream_loader(stream_of(far, some)))

    def test_ids_of_another_kind(self, far: Any, tiny_inputs: ArrayTransferSet) -> None:
        """Names are not numbers."""
        named = ArrayTransferSet("named", tiny_inputs.inputs, ids=np.arange(200).astype(str))
        with pytest.raises(BadIdsError, match="those of the inputs"):
            list(stream_loader(stream_of(far, named)))

    def test_what_cannot_be_is_refused_at_once(self, far: Any, tiny_inputs: Any) -> None:
        """Before an epoch begins."""
        with pytest.raises(TemperatureError):
            stream_of(far, tiny_inputs, temperature=-1.0)
        with pytest.raises(RequestError):
            stream_of(far, tiny_inputs, batch_size=0)
        with pytest.raises(RequestError):
            stream_of(far, tiny_inputs, check="frist")

    def test_the_temperature_reaches_the_targets(self, far: Any, tiny_inputs: Any) -> None:
        """As in every batch of a store."""
        for inputs in (tiny_inputs, None):
            batch = next(iter(stream_of(far, inputs, temperature=2.5)))
            assert batch.targets.temperature == 2.5


class TestState:
    @pytest.mark.parametrize("inputs", [True, False])
    def test_resumed_under_other_workers_and_ranks(self, far: Any, tiny_inputs: Any, inputs: bool) -> None:
        """Taken part by part by 1 rank × 2 workers, 3 × 0, 2 × 3 and 1 × 0, an epoch is every sample once."""
        seen: list[tuple[int, bytes, bytes]] = []
        state: dict[str, Any] | None = None
        for world, workers, steps, size in ((1, 2, 3, 16), (3, 0, 1, 9), (2, 3, 2, 10), (1, 0, 99, 16)):
            states = []
            for rank in range(world):
                known = {"rank": rank, "world_size": world, "batch_size": size}
                loader = stream_loader(stream_of(far, tiny_inputs if inputs else None, **known), workers=workers)
                if state is not None:
                    loader.load_state_dict(json.loads(json.dumps(state)))
                for number, batch in enumerate(loader):
                    seen += pairs([batch])
                    if number + 1 == steps:
                        break
                states.append(loader.state_dict())
            assert all(other == states[0] for other in states)
            state = states[0]
        assert len(seen) == 200
        assert {pair[:2] for pair in seen} == {pair[:2] for pair in own_pairs(far, tiny_inputs)}

    def test_another_version_of_the_store_is_refused(self, far: Any) -> None:
        """Its order is another, and its targets may be."""
        state = {**stream_of(far).state_dict(), "digest": "0" * 64}
        with pytest.raises(StoreChangedError, match=r"version 0+"):
            stream_loader(stream_of(far)).load_state_dict(state)

    def test_a_place_in_inputs_is_none_in_the_store(self, far: Any, tiny_inputs: Any) -> None:
        """A map-style loader counts positions of the inputs."""
        from softlabels_client import SoftTargetDataset, data_loader

        state = data_loader(SoftTargetDataset(tiny_inputs, far), batch_size=16).state_dict()
        with pytest.raises((FingerprintMismatchError, ConflictError)):
            stream_of(far).load_state_dict(state | {"seed": 3})

    def test_a_bare_stream_keeps_its_place(self, far: Any, tiny_inputs: Any) -> None:
        """Without a loader around it: passes follow each other, and a kept one goes on."""
        stream = stream_of(far, tiny_inputs)
        first = pairs(stream)
        assert stream.epoch == 1
        batches = iter(stream)
        begun = pairs([next(batches), next(batches)])
        again = pickle.loads(pickle.dumps(stream_of(far, tiny_inputs)))
        again.load_state_dict(stream.state_dict())
        rest = pairs(again)
        assert set(begun + rest) == set(first)
        assert len(begun + rest) == 200

    def test_a_bare_loader_with_workers_asks_for_the_epoch(self, far: Any) -> None:
        """`set_epoch` reaches workers that live on."""
        stream = stream_of(far)
        loader = DataLoader(
            stream, batch_size=None, num_workers=2, persistent_workers=True, multiprocessing_context="fork"
        )
        for epoch in (0, 4):
            stream.set_epoch(epoch)
            assert [int(sample) for batch in loader for sample in batch.ids] == far_order(far, epoch)

    @pytest.mark.parametrize("taken", [0, 1, 4, 6])
    def test_loaders_that_keep_each_workers_place(self, far: Any, taken: int) -> None:
        """They call the same two methods in every worker: what each has left comes, in order."""
        expected = [batch.ids.tolist() for batch in stream_of(far)]
        states = _states_in_workers(stream_of(far), taken)
        assert [state["taken"] for state in states] == [taken, taken]
        left = _batches_in_workers(stream_of(far), states)
        assert [batch for share in left for batch in share] == expected[2 * taken :: 2] + expected[2 * taken + 1 :: 2]

    def test_another_workers_place_is_refused(self, far: Any) -> None:
        """A share of three is none of two, and none of the whole."""
        (state, _) = _states_in_workers(stream_of(far), 1)
        with pytest.raises(ConflictError, match="worker 0 of 2, this is worker 0 of 1"):
            stream_of(far).load_state_dict(state)


class _KeepsPlaces(torch.utils.data.IterableDataset[Any]):
    """What a loader that keeps each worker's place does in a worker: load, take some, tell the state or the rest."""

    def __init__(self, stream: SoftTargetStream, taken: int, states: list[dict[str, Any]] | None) -> None:
        self.stream, self.taken, self.states = stream, taken, states

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        assert info is not None
        if self.states is not None:
            self.stream.load_state_dict(self.states[info.id])
            yield [batch.ids.tolist() for batch in self.stream]
            return
        batches = iter(self.stream)
        for _ in range(self.taken):
            next(batches)
        yield self.stream.state_dict() if self.taken else {**_fresh(self.stream), "worker": info.id, "workers": 2}


def _fresh(stream: SoftTargetStream) -> dict[str, Any]:
    return {**stream.state_dict(), "taken": 0, "sum": None}


def _states_in_workers(stream: SoftTargetStream, taken: int) -> list[dict[str, Any]]:
    return list(DataLoader(_KeepsPlaces(stream, taken, None), batch_size=None, num_workers=2))


def _batches_in_workers(stream: SoftTargetStream, states: list[dict[str, Any]]) -> list[list[list[int]]]:
    return list(DataLoader(_KeepsPlaces(stream, 0, states), batch_size=None, num_workers=2))


def test_what_a_loader_gives(far: softlabels.TargetStore) -> None:
    """Distillation batches, from an object that is no DataLoader."""
    loader = stream_loader(stream_of(far))
    assert isinstance(loader, StatefulLoader)
    assert not isinstance(loader, DataLoader)
    assert isinstance(loader.dataset, SoftTargetStream)
    assert isinstance(next(iter(loader)), DistillationBatch)
