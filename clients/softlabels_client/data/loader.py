"""StatefulLoader: the batches that a training loop gets, counted so that the next run can resume after the last one."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import Any, Literal, Protocol

from softlabels.errors import WorkerDiedError
from softlabels.extras import needs_extra
from softlabels_client.data.distillation_batch import DistillationBatch, collate_batches
from softlabels_client.data.prefetch import batches_ahead
from softlabels_client.data.sampler_state import EpochProgress, SamplerState

with needs_extra("torch", "training a student"):
    import torch
    from torch.utils.data import DataLoader, Dataset


class EpochSource(Protocol):
    """What determines a loader's order: an `EpochSampler` or a `SoftTargetStream`."""

    state: SamplerState

    def begin_at(self, progress: EpochProgress) -> None:
        """Begin the next pass here."""
        ...


class StatefulLoader:
    """Batches of a DataLoader, with a state that counts batches handed out, not batches prefetched.

    Save `state_dict()` after the step that used the batch. This is deliberately not a DataLoader: frameworks replace
    the sampler of a DataLoader by a distributed one, and each rank would then get only a part of its samples. A data
    set with a method `show_epoch(epoch)`, such as `ViewDataset`, is told of each new epoch.

    Args:
        loader: returns batches in the order of `source`.
        source: the sampler or stream that `loader` was made with.
        ahead: fetch batches ahead in a thread; loaders with workers do so anyway.
    """

    def __init__(self, loader: DataLoader[Any], source: EpochSource, *, ahead: bool = False) -> None:
        self.loader = loader
        self._source = source
        self._ahead = ahead and loader.num_workers == 0
        # A copy: the state of the source is ahead of the training loop where batches are prefetched.
        self._state = source.state.copy()

    @property
    def dataset(self) -> Dataset[Any]:
        """Data set that batches are fetched from."""
        return self.loader.dataset

    @property
    def epoch(self) -> int:
        """Epoch of the next pass."""
        return self._state.upcoming.epoch

    @property
    def finished(self) -> bool:
        """Whether the last batch handed out was the last of its epoch."""
        return self._state.finished

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass; if a state in it was loaded, the pass continues from there.

        Without a call, a completed pass is followed by the next epoch, and an interrupted one starts over.
        """
        self._state.set_epoch(epoch)

    def __len__(self) -> int:
        """Number of batches of the current pass, else of the next; of a resumed pass including those before."""
        return self._state.batch_count()

    def __iter__(self) -> Generator[DistillationBatch, None, None]:
        # A generator begins with its first batch, which matters: frameworks create iterators that they never use.
        self._state.begin()
        start = self._state.progress
        self._source.begin_at(start)
        show_epoch = getattr(self.dataset, "show_epoch", None)
        if show_epoch is not None:
            show_epoch(start.epoch)
        fetched = _fetched(self.loader)
        for step, batch in enumerate(batches_ahead(fetched, size_of=_batch_bytes) if self._ahead else fetched):
            # Before `yield`, which returns only when the next batch is wanted: the state then counts the batch in use.
            self._state.took(step)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last batch handed out, which is the same on every rank; ready for JSON."""
        return self._state.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state, also with other ranks, workers or batch size.

        Raises:
            RequestError: not a sampler state.
            StoreChangedError, FingerprintMismatchError, ConflictError: the state of another training run.
        """
        self._state.load_state_dict(state)


def stateful_loader(
    dataset: Dataset[DistillationBatch],
    source: EpochSource,
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
