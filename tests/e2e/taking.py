"""A trainer that learns little and notes everything: which target came with which sample, and how far the epoch is.

A batch's pairs are on the disk (fsync) before the place after it is; what a killed trainer noted behind the last place
kept was not taken. Runs as a process of its own, one a rank: under `torchrun`, or forked from a server that has
imported everything already.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

import softlabels
from softlabels.losses import DistillationLoss
from softlabels.transfer_set import ArrayTransferSet
from softlabels_client import (
    DistillationBatch,
    SoftTargetDataset,
    SoftTargetStream,
    StatefulLoader,
    data_loader,
    stream_loader,
)
from softlabels_client.training.step import step_loss

PLACE = "place.json"


def loader_of(url: str, *, kind: str, batch_size: int, workers: int, method: str | None) -> StatefulLoader:
    """A loader of the tiny store that the tests share, with the inputs that it was made for."""
    store = softlabels.open(url)
    inputs = ArrayTransferSet("noise", np.random.default_rng(7).normal(size=(200, 4)).astype(np.float32))
    start: Any = method
    if kind == "stream":
        stream = SoftTargetStream(store, inputs, batch_size=batch_size, seed=11)
        return stream_loader(stream, workers=workers, start_method=start)
    dataset = SoftTargetDataset(inputs, store)
    return data_loader(dataset, batch_size=batch_size, seed=11, workers=workers, start_method=start)


def take(
    url: str,
    folder: str,
    *,
    kind: str,
    rank: int,
    world: int,
    run: int = 0,
    batch_size: int = 16,
    workers: int = 0,
    method: str | None = None,
    epochs: int = 1,
    pause_s: float = 0.0,
    learn: bool = False,
) -> None:
    """Go on from the place kept in the folder to the end of the last epoch, noting every pair.

    With `learn` a student on all ranks learns from every batch, and its weights are noted at the end.
    """
    step = Learner() if learn else None
    loader = loader_of(url, kind=kind, batch_size=batch_size, workers=workers, method=method)
    place = Path(folder) / PLACE
    if place.exists():
        loader.load_state_dict(json.loads(place.read_text()))
    began = loader.state_dict()
    with (Path(folder) / f"pairs-{run:03d}-{rank}.log").open("w") as log:
        log.write(json.dumps([began["epoch"], began["cursor"]]) + "\n")
        while loader.epoch < epochs:
            for batch in loader:
                state = loader.state_dict()
                rows = batch.targets.logits_BC.numpy()
                pairs = [[int(i), digest_of(row)] for i, row in zip(batch.ids, rows, strict=True)]
                log.write(json.dumps([state["epoch"], state["cursor"], pairs]) + "\n")
                log.flush()
                os.fsync(log.fileno())
                if world > 1:
                    distributed.barrier()
                if rank == 0:
                    keep(place, state)
                if world > 1:
                    distributed.barrier()
                if step is not None:
                    step.learn(batch)
                time.sleep(pause_s)
    if step is not None:
        (Path(folder) / f"weights-{rank}.json").write_text(step.weights())


class Learner:
    """A student that ranks train together."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.student = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 10))
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.01)

    def learn(self, batch: DistillationBatch) -> None:
        """One step, in which every rank waits for the others."""
        loss = step_loss(self.student, batch, DistillationLoss())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def weights(self) -> str:
        """As JSON."""
        return json.dumps([parameter.tolist() for parameter in self.student.parameters()])


def keep(place: Path, state: dict[str, Any]) -> None:
    """Write a state so that it is there whole, or not at all, whatever happens."""
    fresh = place.with_suffix(".new")
    with fresh.open("w") as out:
        json.dump(state, out)
        out.flush()
        os.fsync(out.fileno())
    fresh.rename(place)
    parent = os.open(place.parent, os.O_RDONLY)
    os.fsync(parent)
    os.close(parent)


def digest_of(row: Any) -> str:
    """SHA-256 of a target's bytes."""
    return hashlib.sha256(row.tobytes()).hexdigest()


def forked_rank(url: str, folder: str, options: dict[str, Any]) -> None:
    """One rank of a run, in a process group of its own, so that it can be killed with its workers."""
    os.setsid()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    if options["world"] > 1:
        meeting = f"file://{folder}/gloo-{options['run']:03d}"
        distributed.init_process_group("gloo", init_method=meeting, rank=options["rank"], world_size=options["world"])
    take(url, folder, **options)


def main(url: str, folder: str, tasks: str) -> None:
    """All tasks one after the other, as the rank that torchrun made this process."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    for name, options in json.loads(tasks).items():
        own = Path(folder) / name
        own.mkdir(parents=True, exist_ok=True)
        take(url, str(own), rank=rank, world=world, **options)
        distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
