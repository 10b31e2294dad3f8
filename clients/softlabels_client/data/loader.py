"""Batches of inputs and soft targets, and the loader that counts them, so that a run resumes after the last one."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from softlabels.errors import EmptyBatchError, ShapeMismatchError, WorkerDiedError
from softlabels.extras import needs_extra
from softlabels.ids import IdArray, as_ids
from softlabels.losses import SoftTargetBatch
from softlabels_client.data.prefetch import batches_ahead
from softlabels_client.data.sampler import ResumableEpochs

with needs_extra("torch", "training a student"):
    import torch
    from torch import Tensor
    from torch.utils.data import DataLoader, Dataset


@dataclass(frozen=True, kw_only=True, eq=False)
class DistillationBatch:
    """B samples with their soft targets: row i of all three belongs to the same sample.

    Attributes:
        inputs: [B, ...], as in the data set.
        targets: soft targets with their temperature, and hard labels if there are any.
        ids: [B] sample ids.
    """

    inputs: Tensor
    targets: SoftTargetBatch
    ids: IdArray

    def __post_init__(self) -> None:
        rows = {len(self.inputs), len(self.targets.logits_BC), len(self.ids)}
        if len(rows) != 1:
            raise ShapeMismatchError(
                f"{len(self.inputs)} inputs, {len(self.targets.logits_BC)} targets and {len(self.ids)} ids differ"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, rows: int) -> DistillationBatch:
        """Return the first rows; 0 gives an empty batch of the same shapes and dtypes."""
        labels_B = self.targets.labels_B
        targets = dataclasses.replace(
            self.targets,
            logits_BC=self.targets.logits_BC[:rows],
            labels_B=None if labels_B is None else labels_B[:rows],
        )
        return dataclasses.replace(self, inputs=self.inputs[:rows], targets=targets, ids=self.ids[:rows])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> DistillationBatch:
        """Return the batch on another device; ids stay on the host."""
        return dataclasses.replace(
            self,
            inputs=self.inputs.to(device, non_blocking=non_blocking),
            targets=self.targets.to(device, non_blocking=non_blocking),
        )


def collate_batches(fetched: DistillationBatch | Iterable[DistillationBatch]) -> DistillationBatch:
    """Return one batch: `fetched` itself, or its batches concatenated. The `collate_fn` for a `SoftTargetDataset`.

    Raises:
        EmptyBatchError: nothing to concatenate. ShapeMismatchError: batches of different temperatures.
    """
    if isinstance(fetched, DistillationBatch):
        return fetched
    parts = list(fetched)
    if not parts:
        raise EmptyBatchError("a batch needs at least one sample")
    if len(parts) == 1:
        return parts[0]
    targets = [part.targets for part in parts]
    carried = {(t.temperature, t.captured_temperature, t.locked) for t in targets}
    if len(carried) != 1:
        raise ShapeMismatchError(
            f"targets of different temperatures {sorted(carried)} cannot share a batch: the loss has one T"
        )
    return DistillationBatch(
        inputs=torch.cat([part.inputs for part in parts]),
        targets=dataclasses.replace(
            targets[0], logits_BC=torch.cat([t.logits_BC for t in targets]), labels_B=_joined_labels(targets)
        ),
        ids=as_ids(np.concatenate([part.ids for part in parts])),
    )


def _joined_labels(targets: list[SoftTargetBatch]) -> Tensor | None:
    labels = [t.labels_B for t in targets if t.labels_B is not None]
    if not labels:
        return None
    if len(labels) != len(targets):
        raise ShapeMismatchError(
            "targets with labels and targets without cannot share a batch: mark unlabelled rows -1"
        )
    return torch.cat(labels)


class StatefulLoader(ResumableEpochs):
    """Batches of a DataLoader, with a state that counts batches handed out, not batches prefetched.

    Save `state_dict()` after the step that used the batch: it is that of the last batch handed out. A data set with a
    method `show_epoch(epoch)`, such as `ViewDataset`, is told of each new epoch. This is deliberately not a DataLoader:
    frameworks replace its sampler by a distributed one, and each rank would then get only a part of its samples.

    Args:
        loader: returns batches in the order of `source`.
        source: the sampler or stream that `loader` was made with.
        ahead: fetch batches ahead in a thread; loaders with workers do so anyway.
    """

    def __init__(self, loader: DataLoader[Any], source: ResumableEpochs, *, ahead: bool = False) -> None:
        self.loader = loader
        self._source = source
        self._ahead = ahead and loader.num_workers == 0
        # A copy: the state of the source is ahead of the training loop where batches are prefetched.
        self.state = source.state.copy()

    @property
    def dataset(self) -> Dataset[Any]:
        """Data set that batches are fetched from."""
        return self.loader.dataset

    @property
    def finished(self) -> bool:
        """Whether the last batch handed out was the last of its epoch."""
        return self.state.finished

    def __len__(self) -> int:
        """Number of batches of the current pass, else of the next; of a resumed pass including those before."""
        return self.state.batch_count()

    def __iter__(self) -> Generator[DistillationBatch, None, None]:
        # A generator begins with its first batch, which matters: frameworks create iterators that they never use.
        self.state.begin()
        start = self.state.progress
        self._source.begin_at(start)
        show_epoch = getattr(self.dataset, "show_epoch", None)
        if show_epoch is not None:
            show_epoch(start.epoch)
        fetched = _fetched(self.loader)
        for step, batch in enumerate(batches_ahead(fetched, size_of=_batch_bytes) if self._ahead else fetched):
            # Before `yield`, which returns only when the next batch is wanted: the state then counts the batch in use.
            self.state.took(step)
            yield batch


def stateful_loader(
    dataset: Dataset[DistillationBatch],
    source: ResumableEpochs,
    *,
    workers: int,
    start_method: Literal["fork", "spawn", "forkserver"] | None,
    ahead: bool,
    **sampling: Any,
) -> StatefulLoader:
    """Return a `StatefulLoader` over a new DataLoader, whose arguments for its sampler are `sampling`."""
    loader = DataLoader(
        dataset,
        # With torch's global generator, making a loader would draw from it and so change dropout.
        generator=torch.Generator().manual_seed(source.state.config.seed),
        num_workers=workers,
        collate_fn=collate_batches,
        multiprocessing_context=start_method if workers else None,
        # A new worker would connect again and check every fingerprint again.
        persistent_workers=workers > 0,
        **sampling,
    )
    return StatefulLoader(loader, source, ahead=ahead)


def _fetched(loader: DataLoader[Any]) -> Iterator[DistillationBatch]:
    """Yield a loader's batches; a worker that ended raises `WorkerDiedError`."""
    try:
        yield from loader
    except RuntimeError as error:
        # torch raises a plain RuntimeError, which only its message tells from others.
        if "exited unexpectedly" not in str(error):
            raise
        raise WorkerDiedError(
            f"{error}: see what it printed above; a worker that the system killed usually ran out of memory, so try "
            "fewer workers, or none"
        ) from error


def _batch_bytes(batch: DistillationBatch) -> int:
    return batch.inputs.nbytes + batch.targets.logits_BC.nbytes
