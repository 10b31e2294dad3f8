"""Rows of sequences: every position of a sample is a row, row number = offset of the sample + position.

Row t of a sample is a teacher's distribution at position t; for a causal language model that is over token t + 1. Ids
and fingerprints are stored once per sample, in a table that one pass over the data, without teachers, makes before the
run. A forward pass takes whole sequences, padded at the end (`softlabels.transfer_sets.ragged`). Where a shard begins
or ends inside a sequence its rows are selected from the output, so that no row depends on where shards are cut.

Legend: B sequences, L positions of the longest, R rows of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabels.encodings import rng_keys
from softlabels.errors import JobError, ShapeMismatchError, TeacherShapeError, TransferSetChangedError
from softlabels.ids import IdArray
from softlabels.manifest import RowLayout
from softlabels.precompute.job import SequencesTable
from softlabels.precompute.row_batches import RowBatch, RowLoader
from softlabels.store.sample_index import SampleTable
from softlabels.transfer_set import FINGERPRINT_BYTES, UNLABELLED, Samples, TransferSet, sequence_fingerprints
from softlabels.transfer_sets import SupportsLengths, examine_ids

_READ_AT_ONCE = 64
"""Sequences per read in the pass before the run: enough to spread the cost of a call, few enough to bound memory."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceBatch(RowBatch):
    """A batch of whole sequences.

    Attributes:
        selected: [R] sequence × L + position of each row; None where every position of the array is a row, in order.
    """

    selected: NDArray[np.int64] | None


class SequenceRows(RowLoader):
    """One row per position of each sample.

    Args:
        data: transfer set; one with `lengths` where its samples differ in length.
        table: [sequences] of the job.
        store: name of the store, the key of random draws of its rows.
    Raises:
        JobError: no sample has a position. BadIdsError: an id repeats.
    """

    def __init__(self, data: TransferSet, table: SequencesTable, *, store: str) -> None:
        self._data, self._settings, self._store = data, table, store
        self.table = sample_table(data)
        self._lengths, self._fingerprints = self.table.lengths, self.table.fingerprints
        self._offsets = np.concatenate([[0], np.cumsum(self._lengths)]).astype(np.int64)
        self.layout = RowLayout(kind="sequences", samples=len(data), rows=self.table.rows)
        if self.layout.rows == 0:
            raise JobError(f"no sample of {data.name!r} has a position: there is nothing to compute targets for")

    def batches(self, rows: range, batch_size: int) -> Iterator[SequenceBatch]:
        """Yield the sequences that hold these rows, cut into batches from the first one on."""
        first = int(np.searchsorted(self._offsets, rows.start, side="right")) - 1
        last = int(np.searchsorted(self._offsets, rows.stop, side="left"))
        for group in self._groups(np.arange(first, last, dtype=np.int64), batch_size):
            yield self._batch(group, rows)

    def samples(self, positions: NDArray[np.int64], batch_size: int) -> Iterator[SequenceBatch]:
        """Yield batches of every position of these samples."""
        for group in self._groups(positions, batch_size):
            yield self._batch(group, range(self.layout.rows))

    def select_rows(self, output: Tensor, batch: RowBatch) -> Tensor:
        """Return the outputs at the batch's rows. Raises TeacherShapeError: not one output per position."""
        if output.ndim != 3 or tuple(output.shape[:2]) != batch.inputs.shape[:2]:
            raise TeacherShapeError(
                f"a teacher returns {list(output.shape)} for sequences {list(batch.inputs.shape)}: with [sequences] in "
                "the job it must return [samples, positions, classes], once for every position"
            )
        assert isinstance(batch, SequenceBatch)
        flat_PC = output.flatten(0, 1)
        if batch.selected is None:
            return flat_PC
        selected = torch.from_numpy(batch.selected)
        if output.is_cuda:
            # A copy from pinned memory does not wait for the device; one from pageable memory does.
            selected = selected.pin_memory().to(output.device, non_blocking=True)
        return flat_PC.index_select(0, selected.to(output.device))

    def _groups(self, positions: NDArray[np.int64], batch_size: int) -> Iterator[NDArray[np.int64]]:
        """Yield samples that share a forward pass, within `batch_size` and `positions_per_pass` (padding included)."""
        group: list[int] = []
        longest = 0
        for position, length in zip(positions.tolist(), self._lengths[positions].tolist(), strict=True):
            if length == 0:
                continue
            wider = max(longest, length)
            if group and (len(group) == batch_size or (len(group) + 1) * wider > self._settings.positions_per_pass):
                yield np.array(group, dtype=np.int64)
                group, wider = [], length
            group.append(position)
            longest = wider
        if group:
            yield np.array(group, dtype=np.int64)

    def _batch(self, positions: NDArray[np.int64], rows: range) -> SequenceBatch:
        taken = self._data.take(positions)
        inputs = np.ascontiguousarray(taken.inputs)
        lengths = self._lengths[positions]
        found = _fingerprints(taken, lengths, self._data.name)
        if (found != self._fingerprints[positions]).any():
            changed = taken.ids[(found != self._fingerprints[positions]).any(axis=1)].tolist()
            raise TransferSetChangedError(
                f"transfer set {self._data.name!r} changed under the job: sample {changed[0]!r} is not what it was "
                "when the job began. Put the data back as they were and resume, or begin another store"
            )
        begin = np.maximum(self._offsets[positions], rows.start) - self._offsets[positions]
        end = np.minimum(self._offsets[positions + 1], rows.stop) - self._offsets[positions]
        which = np.repeat(np.arange(len(positions)), end - begin)
        starts = np.cumsum(end - begin) - (end - begin)
        within = np.arange(len(which)) - np.repeat(starts, end - begin) + np.repeat(begin, end - begin)
        ids: IdArray = taken.ids[which]
        labels = self._labels(taken, lengths)
        return SequenceBatch(
            inputs=inputs,
            numbers=self._offsets[positions][which] + within,
            ids=ids,
            keys=rng_keys(self._store, ids, within),
            labels=None if labels is None else labels[which, within],
            selected=None if len(which) == inputs.shape[0] * inputs.shape[1] else which * inputs.shape[1] + within,
        )

    def _labels(self, taken: Samples, lengths: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Return labels [B, L], as the job asks."""
        if self._settings.labels == "none":
            return None
        if self._settings.labels == "own":
            return None if taken.labels is None else _own_labels(taken, self._data.name)
        tokens = np.asarray(taken.inputs)
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            raise JobError(
                f'labels = "next" needs sequences of token ids, and the samples of {self._data.name!r} are '
                f"{tokens.dtype} {list(tokens.shape[1:])}: leave it out of [sequences]"
            )
        labels = np.full(tokens.shape, UNLABELLED, dtype=np.int64)
        labels[:, :-1] = tokens[:, 1:]
        # The last token has no next one, and padding follows it.
        labels[np.arange(tokens.shape[1]) >= lengths[:, None] - 1] = UNLABELLED
        return labels


def sample_table(data: TransferSet) -> SampleTable:
    """Return ids, lengths and fingerprints of every sample, by one pass over the data.

    Raises:
        BadIdsError: an id repeats. ShapeMismatchError: samples are shorter than `lengths` says.
    """
    ids: list[IdArray] = []
    lengths = np.empty(len(data), dtype=np.int64)
    fingerprints = np.empty((len(data), FINGERPRINT_BYTES), dtype=np.uint8)
    for start in range(0, len(data), _READ_AT_ONCE):
        positions = np.arange(start, min(start + _READ_AT_ONCE, len(data)), dtype=np.int64)
        taken = data.take(positions)
        ids.append(taken.ids)
        lengths[positions] = _lengths_of(data, taken, positions)
        fingerprints[positions] = _fingerprints(taken, lengths[positions], data.name)
    spec = examine_ids(ids, len(data), data.name)
    joined: Any = np.concatenate(ids)
    return SampleTable(ids=joined, lengths=lengths, fingerprints=fingerprints, dense=spec.dense_start is not None)


def _lengths_of(data: TransferSet, taken: Samples, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    if taken.inputs.ndim < 2:
        raise JobError(
            f"the samples of {data.name!r} are single {taken.inputs.dtype} values, not sequences: leave [sequences] "
            "out of the job"
        )
    if not isinstance(data, SupportsLengths):
        return np.full(len(positions), taken.inputs.shape[1], dtype=np.int64)
    return np.asarray(data.lengths(positions), dtype=np.int64)


def _fingerprints(taken: Samples, lengths: NDArray[np.int64], name: str) -> NDArray[np.uint8]:
    if len(lengths) and (int(lengths.max()) > taken.inputs.shape[1] or int(lengths.min()) < 0):
        raise ShapeMismatchError(
            f"transfer set {name!r} reports lengths up to {int(lengths.max())} and returns sequences of "
            f"{taken.inputs.shape[1]} positions: `lengths` and `take` must agree"
        )
    return sequence_fingerprints(taken.inputs, lengths)


def _own_labels(taken: Samples, name: str) -> NDArray[np.int64]:
    assert taken.labels is not None
    labels = np.asarray(taken.labels)
    if labels.shape != taken.inputs.shape[:2]:
        raise ShapeMismatchError(
            f"labels of {name!r} have shape {list(labels.shape)}, its sequences {list(taken.inputs.shape[:2])}: a "
            'store of sequences keeps one label per position; provide these, or set labels = "none" in [sequences]'
        )
    return labels.astype(np.int64)
