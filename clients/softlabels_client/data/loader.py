"""How does a training loop get batches, and how does it keep the place for the next run? A loader that counts."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from softlabels.errors import MissingExtraError, WorkerDiedError

try:
    from torch.utils.data import DataLoader, Dataset
except ImportError as error:
    raise MissingExtraError(
        "training a student needs torch, which is not installed: `pip install softlabels[torch]`", extra="torch"
    ) from error

from softlabels_client.data.distillation_batch import DistillationBatch
from softlabels_client.data.prefetch import batches_ahead
from softlabels_client.data.sampler_state import EpochProgress, Walk


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


class Ordered(Protocol):
    """What decides a loader's order: an `EpochSampler`, or a `SoftTargetStream`."""

    @property
    def ranks(self) -> tuple[int, int]:
        """Rank and world size."""
        ...

    def walk(self) -> Walk:
        """A walk of its own over the same course."""
        ...

    def begin_at(self, place: EpochProgress) -> None:
        """The next pass begins here."""
        ...


@runtime_checkable
class ShowsEpochs(Protocol):
    """A data set that shows something else each epoch, another view of every sample for one."""

    def show_epoch(self, epoch: int) -> None:
        """This epoch begins."""
        ...


class StatefulLoader:
    """A DataLoader's batches, and a place that counts the batches taken, however many more were fetched ahead.

    A batch is taken when the loop gets it: keep `state_dict()` after the step that learnt from it. It is no DataLoader
    on purpose: frameworks put samplers of their own into those, and every rank would see a share of its share.

    Args:
        loader: gives batches in the order that `order` decides.
        order: the sampler or the stream that the loader was made with.
        ahead: a thread fetches batches while the ones before are used; workers do so anyway.
    """

    def __init__(self, loader: DataLoader[Any], order: Ordered, *, ahead: bool = False) -> None:
        self.loader = loader
        self._order = order
        self._ahead = ahead and loader.num_workers == 0
        self._walk = order.walk()

    @property
    def dataset(self) -> Dataset[Any]:
        """What the batches are fetched from."""
        return self.loader.dataset

    @property
    def epoch(self) -> int:
        """The epoch that the next pass goes through, or goes on with."""
        return self._walk.upcoming(self._order.ranks).epoch

    @property
    def finished(self) -> bool:
        """Whether the last batch taken was its epoch's last."""
        return self._walk.finished(self._order.ranks)

    def set_epoch(self, epoch: int) -> None:
        """The next pass goes through this epoch; on from a place in it, if such a one was loaded.

        Without a call, passes follow each other: a whole one is followed by the next epoch, one broken off begins anew.
        """
        self._walk.set_epoch(epoch)

    def __len__(self) -> int:
        """Batches of a pass, the same on every rank: the one underway, or the next; a resumed one's are all counted."""
        return self._walk.batch_count(self._order.ranks)

    def __iter__(self) -> Generator[DistillationBatch, None, None]:
        # A generator begins with the first batch: frameworks make iterators that they never use.
        walked = self._walk.begin(self._order.ranks)
        self._order.begin_at(walked.place)
        if isinstance(self.dataset, ShowsEpochs):
            self.dataset.show_epoch(walked.place.epoch)
        fetched = _fetched(self.loader)
        for step, batch in enumerate(batches_ahead(fetched, size_of=_batch_bytes) if self._ahead else fetched):
            walked.took(step)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch taken: epoch, cursor and what they are places in; ready for JSON.

        The same on every rank once each has taken as many batches.
        """
        return self._walk.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next pass goes on from a kept place, also under other ranks, workers or batch size.

        Raises:
            RequestError: this is no place.
            StoreChangedError, FingerprintMismatchError, ConflictError: it is one in another training.
        """
        self._walk.load_state_dict(state)


def _batch_bytes(batch: DistillationBatch) -> int:
    return batch.inputs.nbytes + batch.targets.logits_BC.nbytes
