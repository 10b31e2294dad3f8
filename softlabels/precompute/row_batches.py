"""How do the rows of a shard follow from samples? The one seam between layouts of rows and the run that computes them.

The run knows nothing of samples: it asks a `RowMaker` for the batches of a range of rows, sends each batch's inputs
through every teacher, and asks the maker which parts of the answers are rows. `SingleRows` is the simplest one.

What an implementer gives, and may rely on:

- `batches(rows, batch_size)` is called once a shard, in a thread of its own, at most a few batches ahead of the device:
  it is the place for decoding, augmenting and hashing on the host. It yields batches whose rows, one batch after the
  other, are exactly `rows`. A shard may begin or end inside a sample: a batch then carries the whole sample's inputs
  and only some of its rows. The batches depend on `rows` and `batch_size` alone and start with the shard, since kernels
  round differently for another batch size: a shard computed again is computed in the same ones. `batch_size` counts
  what a forward pass takes (samples, views, sequences), so no batch has more inputs than that.
- `prepare(inputs, batch)` makes, on the device, what the teachers are given of the batch's inputs. It runs with the
  forward passes and must not wait for the device.
- `pick(answer, batch)` turns one teacher's answer into the batch's rows, [R, classes]: the answer itself where every
  input is one row; chosen positions, where a teacher answers [inputs, length, classes]. It may raise TeacherError for
  an answer of another shape, and must not wait for the device either.
- `samples(positions, batch_size)` yields batches of all rows of some samples, for the pilot that an encoding is learnt
  from and for `verify --against-teacher`: no other order, no other rows.
- `layout`, `views` and `table` go into the plan as they are.

Everything in a `RowBatch` is on the host and stands one entry a row; only `inputs` may have another length.
Legend: B inputs, R rows of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabels.encodings import rng_keys
from softlabels.errors import JobError
from softlabels.ids import IdArray
from softlabels.manifest import RowLayout, ViewSpec
from softlabels.precompute.job import ViewsTable
from softlabels.store.sample_index import SampleTable
from softlabels.transfer_set import Samples, TransferSet, sample_fingerprints
from softlabels.views import ViewTransform, view_seeds
from softlabels.views.transforms import RecordedTransform


@dataclass(frozen=True, kw_only=True, eq=False)
class RowBatch:
    """The inputs of one forward pass, and whose rows it gives.

    Attributes:
        inputs: [B, ...], contiguous.
        ids: [R] the sample that each row belongs to: kept with the rows, and named when a row is to blame.
        keys: [R] of `rng_keys`, for encodings that draw.
        labels: [R] int64, `UNLABELLED` where absent; None when no row has one.
        fingerprints: [R, 16]; None where the store keeps neither these nor ids a row, but once a sample (sequences).
        view_parameters: [R, parameters], where the store records them.
        kept_inputs: [R, ...] what a store that keeps its inputs keeps of them; None where rows have none of their own.
    """

    inputs: NDArray[Any]
    ids: IdArray
    keys: NDArray[np.uint64]
    labels: NDArray[np.int64] | None = None
    fingerprints: NDArray[np.uint8] | None = None
    view_parameters: NDArray[np.float64] | None = None
    kept_inputs: NDArray[Any] | None = None

    @property
    def rows(self) -> int:
        """How many rows of the store this batch gives."""
        return len(self.ids)


class RowMaker(Protocol):
    """How rows follow from samples; this file's first lines say what an implementer must hold to."""

    @property
    def layout(self) -> RowLayout:
        """What the plan says of rows and samples."""
        ...

    @property
    def views(self) -> ViewSpec | None:
        """How views were made, for a layout of views."""
        ...

    @property
    def table(self) -> SampleTable | None:
        """The samples, for a layout of sequences."""
        ...

    def batches(self, rows: range, batch_size: int) -> Iterator[RowBatch]:
        """The batches whose rows are `rows`, in order; at most `batch_size` inputs each."""
        ...

    def samples(self, positions: NDArray[np.int64], batch_size: int) -> Iterator[RowBatch]:
        """Batches of every row of the samples at these positions; at most `batch_size` inputs each."""
        ...

    def prepare(self, inputs: Tensor, batch: RowBatch) -> Tensor:
        """What the teachers are given, from the batch's inputs on the device."""
        ...

    def pick(self, answer: Tensor, batch: RowBatch) -> Tensor:
        """The batch's rows, [R, C], from one teacher's answer."""
        ...


class SingleRows:
    """One row a sample: row i is the sample at position i.

    Args:
        data: the transfer set.
        store: the store's name, which random draws of its rows hang on.
    """

    views: ViewSpec | None = None
    table: SampleTable | None = None

    def __init__(self, data: TransferSet, *, store: str) -> None:
        self._data, self._store = data, store
        self.layout = RowLayout(kind="single", samples=len(data), rows=len(data))

    def batches(self, rows: range, batch_size: int) -> Iterator[RowBatch]:
        """The samples at these positions, cut into batches from the first on."""
        for start in range(rows.start, rows.stop, batch_size):
            yield self._batch(np.arange(start, min(start + batch_size, rows.stop), dtype=np.int64))

    def samples(self, positions: NDArray[np.int64], batch_size: int) -> Iterator[RowBatch]:
        """These samples' only rows."""
        for start in range(0, len(positions), batch_size):
            yield self._batch(positions[start : start + batch_size])

    def prepare(self, inputs: Tensor, batch: RowBatch) -> Tensor:
        """The inputs as they are."""
        return inputs

    def pick(self, answer: Tensor, batch: RowBatch) -> Tensor:
        """The answer as it is: an input is a row."""
        return answer

    def _batch(self, positions: NDArray[np.int64]) -> RowBatch:
        taken: Samples = self._data.take(positions)
        inputs = np.ascontiguousarray(taken.inputs)
        return RowBatch(
            inputs=inputs,
            ids=taken.ids,
            keys=rng_keys(self._store, taken.ids),
            labels=taken.labels,
            fingerprints=sample_fingerprints(inputs),
            kept_inputs=inputs,
        )


# MERGED from softlabels.precompute.row_batches: How do rows follow from samples where each is shown in several views? Row = position × views + view.
#
# The views are made on the host, in the thread that loads: each from its own seed, or by recorded parameters, so that a
# trainer makes the very same bytes again. What is kept as a row's fingerprint is that of the view, not of the sample.
# Legend: R rows of a batch, P recorded parameters.


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
        self.layout = RowLayout(kind="views", samples=len(data), rows=len(data) * table.count, views=table.count)
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
