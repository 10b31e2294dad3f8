"""Do the teachers still say what the store keeps? Sampled rows computed again and compared.

Legend: R rows of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabels.encodings import Hidden
from softlabels.errors import JobError
from softlabels.precompute.answers import ask, rows_to_keep
from softlabels.precompute.hidden_states import asked
from softlabels.precompute.job import Job
from softlabels.precompute.planning import choose_device, load_teachers, load_transfer_set, row_maker
from softlabels.precompute.rows import RowBatch, RowMaker
from softlabels.precompute.teachers import Teacher
from softlabels.store.faults import Fault, Report, ShowProgress, silent
from softlabels.store.rows import LocalRows
from softlabels.transfer import TransferSet

SAMPLED_ROWS = 256
LEAST_COSINE = 0.9999
"""Between the target kept and the target computed again: other kernels round differently, other weights do not pass."""

_FEWEST_SAMPLES = 4
"""Of views and sequences, whose rows are many."""

_BLOCK_ENTRIES = 1 << 23
"""Entries that are compared at once, in a few float64 temporaries of 64 MiB."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How well the teachers agree with the store.

    Attributes:
        samples, rows: how many were asked about.
        least_cosine, mean_cosine: between kept and fresh targets, both through the store's encoding.
    """

    samples: int
    rows: int
    least_cosine: float
    mean_cosine: float

    def to_json(self) -> dict[str, object]:
        """The figures as JSON-able facts."""
        return asdict(self)


def check_agreement(
    where: Path,
    job: Job,
    report: Report,
    *,
    samples: int | None = None,
    seed: int = 0,
    show: ShowProgress = silent,
    transfer_set: TransferSet | None = None,
    teachers: Sequence[Teacher] | None = None,
) -> Agreement:
    """Run the job's teachers on random samples and compare with what the store keeps; faults go into the report.

    All rows of a sample are computed again. Of hidden states it is also asked whether the store's head is still the
    teacher's.

    Args:
        where: the store.
        job: names the teachers, the transfer set, views and sequences; its store is not looked at.
        report: of `verify`; a row whose input or target differs is added as a fault.
        samples: how many to draw; as many as have about `SAMPLED_ROWS` rows when None.
        seed: of the draw.
        transfer_set, teachers: given where they live in this process already.
    Raises:
        JobError: the job is of another kind than the store, has other teachers in number or other samples.
    """
    rows, device = LocalRows(where), choose_device(job.run.device)
    manifest = rows.manifest
    data = load_transfer_set(job) if transfer_set is None else transfer_set
    # What is drawn at random, views and tokens, hangs on the store's name.
    maker = row_maker(replace(job, store=replace(job.store, name=manifest.name)), data)
    if (maker.layout.kind, maker.layout.views) != (manifest.layout.kind, manifest.layout.views):
        raise JobError(
            f"the job makes {_described(maker.layout)}, {manifest.name!r} keeps {_described(manifest.layout)}: verify a "
            "store with the job that it was made by"
        )
    members = load_teachers(job, device) if teachers is None else list(teachers)
    if len(members) != len(manifest.teachers):
        raise JobError(f"the job has {len(members)} teachers, the store was made by {len(manifest.teachers)}")
    positions = _drawn(maker, min(manifest.samples, len(data)), samples, seed)
    check = _Check(rows, maker, members, device)
    with show(len(positions), "ask the teachers again", "samples") as progress:
        for batch, chosen in check.batches(positions, job.run.pilot_batch_size):
            report.faults += check.faults(batch, chosen)
            progress.advance(len(np.unique(chosen)))
    return Agreement(
        samples=len(positions),
        rows=len(check.cosines),
        least_cosine=min(check.cosines),
        mean_cosine=float(np.mean(check.cosines)),
    )


class _Check:
    """Compares batches of fresh rows with kept ones; `cosines` collects what was found."""

    def __init__(
        self, rows: LocalRows, maker: RowMaker, teachers: Sequence[Teacher], device: torch.device
    ) -> None:
        self._rows, self._maker, self._device = rows, maker, device
        self._live, self._asked = teachers, asked(teachers, rows.encoding)
        self._views = rows.manifest.layout.views
        self.cosines: list[float] = []

    def batches(
        self, positions: NDArray[np.int64], batch_size: int
    ) -> Iterator[tuple[RowBatch, NDArray[np.int64]]]:
        """Batches of all rows of these samples, and the sample's position of each row."""
        lengths = self._maker.table.lengths[positions] if self._maker.table is not None else self._views
        owners = np.repeat(positions, lengths)
        done = 0
        for batch in self._maker.samples(positions, batch_size):
            yield batch, owners[done : done + batch.rows]
            done += batch.rows

    def faults(self, batch: RowBatch, positions_R: NDArray[np.int64]) -> list[Fault]:
        """What differs in a batch, with the rows' numbers in the store."""
        numbers_R, kept = self._kept(batch, positions_R)
        found = [
            _fault(int(row), "its input is not the one that the teachers saw")
            for row in numbers_R[self._other_inputs(batch, positions_R, kept)]
        ]
        answers = ask(self._asked, batch, self._maker, self._device)
        fresh = rows_to_keep(answers, self._asked, self._rows.manifest)
        members = self._rows.manifest.members or 1
        step = max(1, _BLOCK_ENTRIES // (self._rows.manifest.classes * members))
        cosines = [self._cosines(kept, fresh, batch, slice(at, at + step)) for at in range(0, batch.rows, step)]
        cosine_R = np.concatenate(cosines)
        if isinstance(self._rows.encoding, Hidden):
            cosine_R = np.minimum(cosine_R, self._head_cosines(answers[0], batch, step))
        self.cosines += cosine_R.tolist()
        found += [
            _fault(int(row), f"the teachers say something else by now (cosine {cosine:.6f})")
            for row, cosine in zip(numbers_R, cosine_R.tolist(), strict=True)
            if not cosine >= LEAST_COSINE
        ]
        return found

    def _kept(
        self, batch: RowBatch, positions_R: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], dict[str, NDArray[Any]]]:
        """The rows' numbers in the store, and what is kept in them."""
        fields = (*self._rows.encoding.fields, "fingerprints")
        if self._maker.table is not None:  # whole sequences, side by side
            first = np.flatnonzero(np.diff(positions_R, prepend=-1))
            kept = self._rows.fetch(batch.ids[first], fields)
            offsets = np.concatenate([[0], np.cumsum(self._maker.table.lengths)])
            within = np.arange(batch.rows) - np.repeat(first, np.diff(np.append(first, batch.rows)))
            return offsets[positions_R] + within, kept
        if self._rows.manifest.layout.kind == "single":
            return positions_R, self._rows.fetch(batch.ids, fields)
        begins = np.searchsorted(positions_R, positions_R)
        views_R = np.arange(batch.rows) - begins
        # A batch may begin inside a sample: its first rows are that one's last views.
        views_R[begins == 0] += self._skipped(batch, positions_R)
        return positions_R * self._views + views_R, self._rows.fetch(batch.ids, fields, views=views_R)

    def _skipped(self, batch: RowBatch, positions_R: NDArray[np.int64]) -> int:
        return self._carried

    _carried = 0
