"""StatefulLoader: the batches that a training loop gets, counted so that the next run can resume after the last one."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from softlabels.errors import WorkerDiedError
from softlabels.extras import needs_extra
from softlabels_client.data.distillation_batch import DistillationBatch
from softlabels_client.data.prefetch import batches_ahead
from softlabels_client.data.sampler_state import EpochProgress, SamplerState

with needs_extra("torch", "training a student"):
    from torch.utils.data import DataLoader, Dataset


class EpochSource(Protocol):
    """What determines a loader's order: an `EpochSampler` or a `SoftTargetStream`."""

    state: SamplerState

    def begin_at(self, progress: EpochProgress) -> None:
        """Begin the next pass here."""
        ...


@runtime_checkable
class ShowsEpochs(Protocol):
    """A data set that changes with the epoch, for example by showing another view of every sample."""

    def show_epoch(self, epoch: int) -> None:
        """Switch to this epoch."""
        ...


class StatefulLoader:
    """Batches of a DataLoader, with a state that counts batches handed out, not batches prefetched.

    Save `state_dict()` after the step that used the batch. This is deliberately not a DataLoader: frameworks replace
    the sampler of those by one of their own, and each rank would then get a share of its share.

    Args:
        loader: returns batches in the order of `source`.
        source: the sampler or stream that `loader` was made with.
        ahead: fetch batches ahead in a thread; loaders with workers do so anyway.
    """

    def __init__(self, loader: DataLoader[Any], source: EpochSource, *, ahead: bool = False) -> None:
        self.loader = loader
        self._source = source
        self._ahead = ahead and loader.num_workers == 0
        # A copy: the source's own state runs ahead of the training loop where batches are prefetched.
        self._state = source.state.copy()

    @property
    def dataset(self) -> Dataset[Any]:
        """The data set that batches are fetched from."""
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
        # A generator begins with its first batch: frameworks create iterators that they never use.
        self._state.begin()
        start = self._state.progress
        self._source.begin_at(start)
        if isinstance(self.dataset, ShowsEpochs):
            self.dataset.show_epoch(start.epoch)
        fetched = _fetched(self.loader)
        for step, batch in enumerate(batches_ahead(fetched, size_of=_batch_bytes) if self._ahead else fetched):
            self._state.took(step)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last batch handed out; ready for JSON.

        Identical on every rank once each has taken the same number of batches.
        """
        return self._state.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state, also with other ranks, workers or batch size.

        Raises:
            RequestError: not a sampler state.
            StoreChangedError, FingerprintMismatchError, ConflictError: the state of another training run.
        """
        self._state.load_state_dict(state)


def _fetched(loader: DataLoader[Any]) -> Iterator[DistillationBatch]:
    """Yield a loader's batches; a worker that ended becomes a `WorkerDiedError`."""
    try:
        yield from loader
    except RuntimeError as error:
        # torch has no class of its own for this: only the message tells it from other RuntimeErrors.
        if "exited unexpectedly" not in str(error):
            raise
        raise WorkerDiedError(
            f"{error}: what it printed above says why; a worker that the system killed usually ran out of memory, so "
            "try fewer workers, or none"
        ) from error


def _batch_bytes(batch: DistillationBatch) -> int:
    return batch.inputs.nbytes + batch.targets.logits_BC.nbytes
