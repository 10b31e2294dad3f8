"""How do rows follow from samples where each is shown in several views? Row = position × views + view.

The views are made on the host, in the thread that loads: each from its own seed, or by recorded parameters, so that a
trainer makes the very same bytes again. What is kept as a row's fingerprint is that of the view, not of the sample.
Legend: R rows of a batch, P recorded parameters.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabels.errors import JobError
from softlabels.manifest import Layout, ViewSpec
from softlabels.precompute.job import ViewsTable
from softlabels.precompute.rows import RowBatch
from softlabels.store.sequences import SampleTable
from softlabels.transfer import TransferSet, sample_fingerprints
from softlabels.views import ViewTransform, view_seeds
from softlabels.views.recorded import RecordedTransform


class ViewRows:
    """V rows a sample, one a view, side by side: one view is one small read, all of them one run.

    Args:
        data: the transfer set.
        table: how many views, and made by what.
        transform: as the table's reference made it.
        store: the store's name, which seeds and random draws of its rows hang on.
    Raises:
        JobError: the transform cannot be recorded for these samples.
    """

    table: SampleTable | None = None

    def __init__(self, data: TransferSet, table: ViewsTable, transform: ViewTransform, *, store: str) -> None:
        self._data, self._transform, self._store = data, transform, store
        self._count = table.count
        self.layout = Layout(kind="views", samples=len(data), rows=len(data) * table.count, views=table.count)
        if isinstance(transform, RecordedTransform) and len(data):
            first = data.take(np.zeros(1, dtype=np.int64)).inputs
            transform.probe(torch.from_numpy(np.ascontiguousarray(first))[0])
        self.views: ViewSpec | None = ViewSpec(
            transform=table.transform,
            parameters=transform.parameters,
            seed_key=store,
            libraries=dict(transform.libraries),
            arguments=dict(table.arguments),
            transform_sha256=transform.identity,
        )

    def batches(self, rows: range, batch_size: int) -> Iterator[RowBatch]:
        """The views of these rows, cut into batches from the first on."""
        for start in range(rows.start, rows.stop, batch_size):
            yield self._batch(np.arange(start, min(start + batch_size, rows.stop), dtype=np.int64))

    def samples(self, positions: NDArray[np.int64], batch_size: int) -> Iterator[RowBatch]:
        """Every view of these samples."""
        rows = (positions[:, None] * self._count + np.arange(self._count)).ravel()
        for start in range(0, len(rows), batch_size):
            yield self._batch(rows[start : start + batch_size])

    def prepare(self, inputs: Tensor, batch: RowBatch) -> Tensor:
        """The views as they are."""
        return inputs

    def pick(self, answer: Tensor, batch: RowBatch) -> Tensor:
        """The answer as it is: a view is a row."""
        return answer

    def _batch(self, rows: NDArray[np.int64]) -> RowBatch:
        positions, views = rows // self._count, rows % self._count
        distinct, which = np.unique(positions, return_inverse=True)
        taken = self._data.take(distinct)
        ids = taken.ids[which]
        seeds = view_seeds(self._store, ids, views)
        made, parameters = self._made(taken.inputs[which], seeds)
        return RowBatch(
            inputs=made,
            ids=ids,
            # Of another key than the views' own: what a row's draws are must not follow its augmentation.
            keys=view_seeds(f"{self._store}\0draws", ids, views),
            labels=None if taken.labels is None else taken.labels[which],
            fingerprints=sample_fingerprints(made),
            view_parameters=parameters if parameters.shape[1] else None,
        )

    def _made(
        self, inputs: NDArray[np.generic], seeds: NDArray[np.uint64]
    ) -> tuple[NDArray[np.generic], NDArray[np.float64]]:
        """Views [R, …] and what is recorded of them [R, P]."""
        views, recorded = [], []
        for sample, seed in zip(torch.from_numpy(np.ascontiguousarray(inputs)), seeds.tolist(), strict=True):
            drawn = self._transform.draw(sample, seed)
            views.append(self._transform.view(sample, seed=seed, parameters=drawn))
            recorded.append(drawn)
        shapes = {tuple(view.shape) for view in views}
        if len(shapes) > 1:
            raise JobError(
                f"views of one batch have the shapes {sorted(shapes)[:3]}: a view transform must end in one size"
            )
        return torch.stack(views).numpy(), np.stack(recorded)
