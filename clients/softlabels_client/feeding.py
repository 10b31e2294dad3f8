"""Where do a training's batches come from, epoch by epoch and from wherever it was left?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from softlabels.errors import MissingExtraError

try:
    import torch
    from torch.utils.data import DataLoader
except ImportError as error:
    raise MissingExtraError(
        "training a student needs torch, which is not installed: `pip install softlabels[torch]`", extra="torch"
    ) from error

from softlabels_client.batches import DistillationBatch, collate_batches
from softlabels_client.datasets import SoftTargetDataset
from softlabels_client.ordering import EpochSampler
from softlabels_client.places import Place
from softlabels_client.prefetch import one_ahead
from softlabels_client.settings import DistillSettings


class Feed:
    """The batches of every epoch, in the order that follows from store, seed and epoch alone; fetched ahead.

    Args:
        dataset: inputs paired with targets.
        settings: batch size, seed and workers.
    """

    def __init__(self, dataset: SoftTargetDataset, settings: DistillSettings) -> None:
        self.samples = len(dataset)
        self._batch_size, self._workers = settings.batch_size, settings.workers
        self._order = EpochSampler(
            len(dataset),
            digest=dataset.store.digest,
            batch_size=settings.batch_size,
            seed=settings.seed,
            rank=0,
            world_size=1,
        )
        self._loader: DataLoader[DistillationBatch] = DataLoader(
            dataset,
            batch_sampler=self._order,
            # Of its own: a loader draws a number each pass, and from torch's global generator a resumed training would
            # draw another.
            generator=torch.Generator().manual_seed(settings.seed),
            num_workers=settings.workers,
            collate_fn=collate_batches,
            # Kept from epoch to epoch: a fresh worker connects again and checks every fingerprint again.
            persistent_workers=settings.workers > 0,
        )

    @contextlib.contextmanager
    def epoch(self, epoch: int, cursor: int) -> Iterator[Iterator[DistillationBatch]]:
        """The batches of an epoch from a cursor on, the number of samples of it that were taken before."""
        self._order.begin_at(Place(epoch=epoch, cursor=cursor, batches=cursor // self._batch_size))
        if self._workers:
            yield iter(self._loader)
        else:
            with contextlib.closing(one_ahead(self._loader)) as batches:
                yield batches
