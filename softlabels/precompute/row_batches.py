"""Row batches: how rows of a store follow from samples, and the model inputs of one forward pass.

A `RowLoader` is the seam between the layouts of a store (one row per sample, views, sequences) and the run, which asks
for the batches of a range of rows, feeds each to every teacher, and lets the loader select the rows of the outputs.

Legend: B inputs, R rows of a batch, C classes, P recorded view parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabels.encodings import rng_keys
from softlabels.errors import JobError
from softlabels.ids import IdArray
from softlabels.manifest import RowLayout, ViewSpec
from softlabels.precompute.checks.data_snapshot import PlannedSamples
from softlabels.precompute.job import ViewsTable
from softlabels.store.sample_index import SampleTable
from softlabels.transfer_set import Samples, TransferSet, sample_fingerprints
from softlabels.views import ViewTransform, view_seeds
from softlabels.views.transforms import RecordedTransform

_SPLIT_KEY = "\0draws"
"""Appended to the store's name for the keys of an encoding's draws: those must not follow a view's augmentation."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RowBatch:
    """The inputs of one forward pass and the facts of its rows, on the host; all but `inputs` have one entry per row.

    Attributes:
        inputs: [B, ...], contiguous.
        numbers: [R] int64, row numbers in the store.
        ids: [R] sample id of each row.
        keys: [R] random-number keys, for encodings that draw.
        labels: [R] int64, `UNLABELLED` where absent; None when no row has one.
        fingerprints: [R, 16]; None for sequences, whose ids and fingerprints are stored once per sample.
        view_parameters: [R, P], where the store records them.
        kept_inputs: [R, ...] inputs for a store that keeps them; None where rows have none of their own.
    """

    inputs: NDArray[Any]
    numbers: NDArray[np.int64]
    ids: IdArray
    keys: NDArray[np.uint64]
    labels: NDArray[np.int64] | None = None
    fingerprints: NDArray[np.uint8] | None = None
    view_parameters: NDArray[np.float64] | None = None
    kept_inputs: NDArray[Any] | None = None

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return len(self.ids)


class RowLoader(ABC):
    """Loads the rows of one layout, in batches, on loader threads of the host.

    Attributes:
        layout, views, table: what the plan says of rows, views, and (for sequences) samples.
        planned: some samples as they were when the job was planned, to compare whenever they are read again.
    """

    layout: RowLayout
    views: ViewSpec | None = None
    table: SampleTable | None = None
    planned: PlannedSamples | None = None

    @abstractmethod
    def batches(self, rows: range, batch_size: int) -> Iterator[RowBatch]:
        """Yield batches whose rows, one batch after the other, are exactly `rows`, in order.

        The batches depend on `rows` and `batch_size` alone: kernels round differently for another batch size, and a
        shard that is computed again must come out the same. A batch at either end of `rows` may carry the inputs of a
        whole sample and only some of its rows.

        Args:
            rows: row numbers in the store.
            batch_size: most inputs (samples, views, sequences) of a batch.
        """

    @abstractmethod
    def samples(self, positions: NDArray[np.int64], batch_size: int) -> Iterator[RowBatch]:
        """Yield batches of every row of the samples at these positions, at most `batch_size` inputs each."""

    @abstractmethod
    def select_rows(self, output: Tensor, batch: RowBatch) -> Tensor:
        """Return the batch's rows, [R, ...], of one teacher's output; must not wait for the device."""

    @property
    def rows_per_sample(self) -> float:
        """Return the mean number of rows per sample."""
        return max(1.0, self.layout.rows / max(1, self.layout.samples))

    def positions(self) -> NDArray[np.int64]:
        """Return the positions of all samples that have rows, ascending; only empty sequences have none."""
        return np.arange(self.layout.samples) if self.table is None else np.flatnonzero(self.table.lengths)

    def spread_positions(self, count: int) -> NDArray[np.int64]:
        """Return at most `count` positions, evenly spread over all samples that have rows."""
        positions = self.positions()
        return positions[np.unique(np.linspace(0, len(positions) - 1, max(1, count)).astype(np.int64))]


class _OneInputPerRow(RowLoader):
    """Common part of layouts in which every input is one row."""

    _data: TransferSet

    @abstractmethod
    def _batch(self, rows: NDArray[np.int64]) -> RowBatch: ...

    def batches(self, rows: range, batch_size: int) -> Iterator[RowBatch]:
        """Yield the inputs of these rows, cut into batches from the first row on."""
        return self._cut(np.arange(rows.start, rows.stop), batch_size)

    def select_rows(self, output: Tensor, batch: RowBatch) -> Tensor:
        """Return the output as it is."""
        return output

    def _take(self, positions: NDArray[np.int64]) -> Samples:
        taken = self._data.take(positions)
        if self.planned is not None:
            self.planned.check(positions, taken)
        return taken

    def _cut(self, rows: NDArray[np.int64], batch_size: int) -> Iterator[RowBatch]:
        for start in range(0, len(rows), batch_size):
            yield self._batch(rows[start : start + batch_size])


class SingleRows(_OneInputPerRow):
    """One row per sample: row i is the sample at position i.

    Args:
        store: name of the store, the key of random draws of its rows.
    """

    def __init__(self, data: TransferSet, *, store: str) -> None:
        self._data, self._store = data, store
        self.layout = RowLayout(kind="single", samples=len(data), rows=len(data))

    def samples(self, positions: NDArray[np.int64], batch_size: int) -> Iterator[RowBatch]:
        """Yield batches of these samples."""
        return self._cut(positions, batch_size)

    def _batch(self, rows: NDArray[np.int64]) -> RowBatch:
        taken = self._take(rows)
        inputs = np.ascontiguousarray(taken.inputs)
        return RowBatch(
            inputs=inputs,
            numbers=rows,
            ids=taken.ids,
            keys=rng_keys(self._store, taken.ids),
            labels=taken.labels,
            fingerprints=sample_fingerprints(inputs),
            kept_inputs=inputs,
        )


class ViewRows(_OneInputPerRow):
    """V rows per sample, one per view: row = position × V + view.

    Views are made on the host by the loader threads, each from its own seed, so that a trainer makes the same bytes
    again. A row's fingerprint is that of the view.

    Args:
        table: [views] of the job.
        transform: view transform that `table.transform` refers to.
        store: name of the store, the key of seeds and random draws of its rows.
    Raises:
        JobError: the transform cannot be recorded for these samples.
    """

    def __init__(self, data: TransferSet, table: ViewsTable, transform: ViewTransform, *, store: str) -> None:
        self._data, self._transform, self._store, self._count = data, transform, store, table.count
        self.layout = RowLayout(kind="views", samples=len(data), rows=len(data) * table.count, views=table.count)
        if isinstance(transform, RecordedTransform) and len(data):
            first = data.take(np.zeros(1, dtype=np.int64)).inputs
            transform.probe(torch.from_numpy(np.ascontiguousarray(first))[0])
        self.views = ViewSpec(
            transform=table.transform,
            parameters=transform.parameters,
            seed_key=store,
            libraries=dict(transform.libraries),
            arguments=dict(table.arguments),
            transform_sha256=transform.identity,
        )

    def samples(self, positions: NDArray[np.int64], batch_size: int) -> Iterator[RowBatch]:
        """Yield batches of every view of these samples."""
        return self._cut((positions[:, None] * self._count + np.arange(self._count)).ravel(), batch_size)

    def _batch(self, rows: NDArray[np.int64]) -> RowBatch:
        positions, views = rows // self._count, rows % self._count
        distinct, which = np.unique(positions, return_inverse=True)
        taken = self._take(distinct)
        ids = taken.ids[which]
        made, parameters = self._make_views(taken.inputs[which], view_seeds(self._store, ids, views))
        return RowBatch(
            inputs=made,
            numbers=rows,
            ids=ids,
            keys=view_seeds(self._store + _SPLIT_KEY, ids, views),
            labels=None if taken.labels is None else taken.labels[which],
            fingerprints=sample_fingerprints(made),
            view_parameters=parameters if parameters.shape[1] else None,
        )

    def _make_views(
        self, inputs: NDArray[np.generic], seeds: NDArray[np.uint64]
    ) -> tuple[NDArray[np.generic], NDArray[np.float64]]:
        """Return views [R, ...] and their recorded parameters [R, P]."""
        views, recorded = [], []
        for sample, seed in zip(torch.from_numpy(np.ascontiguousarray(inputs)), seeds.tolist(), strict=True):
            drawn = self._transform.draw(sample, seed)
            views.append(self._transform.view(sample, seed=seed, parameters=drawn))
            recorded.append(drawn)
        shapes = {tuple(view.shape) for view in views}
        if len(shapes) > 1:
            raise JobError(
                f"views of one batch have the shapes {sorted(shapes)[:3]}: a view transform must return one size"
            )
        return torch.stack(views).numpy(), np.stack(recorded)
