"""What each worker of each rank takes of an epoch: together the epoch's batches, in order, each once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import softlabels
from softlabels.epochs import EpochIterator
from softlabels_client.data.sampler_state import Course, EpochProgress, Walk
from softlabels_client.data.stream_dataset import WorkerShare

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
    walk = Walk(Course(digest=store.digest, samples=SAMPLES, seed=3), batch_size=batch_size, remainder=remainder)

    def open_epoch(place: EpochProgress, ranks: tuple[int, int]) -> EpochIterator:
        known: dict[str, Any] = {"batch_size": batch_size, "remainder": remainder, "labels": False}
        return store.epoch(seed=3, epoch=place.epoch, cursor=place.cursor, rank=ranks[0], world_size=ranks[1], **known)

    rank, place = batch_size % world, EpochProgress(epoch=1, cursor=cursor)
    steps = walk.steps(place, (rank, world))
    expected = [step.positions.tolist() for step in steps]
    for worker in range(workers):
        share = WorkerShare(place, (rank, world), worker, workers)
        own = expected[worker::workers]
        assert [targets.ids.tolist() for targets in share.targets(steps, open_epoch)] == own
        share.taken = len(own) // 2
        assert [targets.ids.tolist() for targets in share.targets(steps, open_epoch)] == own[share.taken :]
