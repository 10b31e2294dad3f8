"""What each worker of each rank takes of an epoch: together the epoch's batches, in order, each once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import softlabels
from softlabels.order import EpochConfig
from softlabels_client.data.sampler import EpochProgress
from softlabels_client.data.stream_dataset import _WorkerShard

SAMPLES = 200


@pytest.fixture(scope="module")
def store(tiny_store: Path) -> Any:
    """The tiny store on this disk."""
    with softlabels.open(tiny_store) as opened:
        yield opened


@settings(max_examples=40)
@given(
    workers=st.integers(1, 5),
    world=st.integers(1, 4),
    batch_size=st.integers(1, 40),
    cursor=st.integers(0, SAMPLES),
    remainder=st.sampled_from(["split", "drop", "pad"]),
)
# Here 12 shares of 16 leave 8 samples over: fewer than shares, so that the last two steps of all of them share.
@example(workers=4, world=3, batch_size=16, cursor=0, remainder="split")
def test_workers_take_their_ranks_batches_in_turn(
    store: softlabels.TargetStore,
    workers: int,
    world: int,
    batch_size: int,
    cursor: int,
    remainder: Literal["split", "drop", "pad"],
) -> None:
    """Worker w of W takes batch w, W + w, … of its rank, also when it goes on in the middle of its share."""
    rank = batch_size % world
    config = EpochConfig(
        seed=3, epoch=1, batch_size=batch_size, rank=rank, world_size=world, cursor=cursor, remainder=remainder
    )
    batches = config.batches(store.manifest, store.digest)
    expected = [step.positions.tolist() for step in batches]
    for worker in range(workers):
        shard = _WorkerShard(config, EpochProgress(epoch=1, cursor=cursor), worker, workers)
        own = expected[worker::workers]
        assert [targets.ids.tolist() for targets in shard.targets(batches, store.epoch)] == own
        shard.taken = len(own) // 2
        assert [targets.ids.tolist() for targets in shard.targets(batches, store.epoch)] == own[shard.taken :]
