"""Do the teachers still say what the store keeps? Sampled rows computed again and compared.

Legend: R rows of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import structs
from numpy.typing import NDArray
from torch import Tensor

from softlabels.encodings import make_encoding
from softlabels.errors import JobError
from softlabels.manifest import RowLayout
from softlabels.precompute.job import Job
from softlabels.precompute.pipeline.inference import ask, rows_to_keep
from softlabels.precompute.planning.prepared_job import choose_device, load_teachers, load_transfer_set, row_maker
from softlabels.precompute.row_batches import RowBatch, RowMaker
from softlabels.precompute.teachers import Teacher
from softlabels.store.store_reader import LocalRows
from softlabels.store.verify_report import Fault, Report, ShowProgress, silent
from softlabels.transfer_set import TransferSet

SAMPLED_ROWS = 256
LEAST_COSINE = 0.9999
"""Between the target kept and the target computed again: other kernels round differently, other weights do not pass."""

_FEWEST_SAMPLES = 4
"""Of views and sequences, whose rows are many."""

_BLOCK_ENTRIES = 1 << 23
"""Entries that are compared at once, in a few float64 temporaries of 64 MiB."""


@dataclass(frozen=True, kw_only=True)
class TeacherAgreement:
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


def verify_against_teachers(
    where: Path,
    job: Job,
    report: Report,
    *,
    samples: int | None = None,
    seed: int = 0,
    show: ShowProgress = silent,
    transfer_set: TransferSet | None = None,
    teachers: Sequence[Teacher] | None = None,
) -> TeacherAgreement:
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
    maker = row_maker(structs.replace(job, store=structs.replace(job.store, name=manifest.name)), data)
    if (maker.layout.kind, maker.layout.views) != (manifest.layout.kind, manifest.layout.views):
        raise JobError(
            f"the job makes {_described(maker.layout)}, {manifest.name!r} keeps {_described(manifest.layout)}: verify "
            "a store with the job that it was made by"
        )
    members = load_teachers(job, device) if teachers is None else list(teachers)
    if len(members) != len(manifest.teachers):
        raise JobError(f"the job has {len(members)} teachers, the store was made by {len(manifest.teachers)}")
    positions = _drawn(maker, min(manifest.samples, len(data)), samples, seed)
    check = _Check(rows, maker, members, device)
    with show(len(positions), "ask the teachers again", "samples") as progress:
        for batch, place in check.batches(positions, job.run.pilot_batch_size):
            report.faults += check.faults(batch, place)
            progress.advance(int((place.within_R == 0).sum()))
    return TeacherAgreement(
        samples=len(positions),
        rows=len(check.cosines),
        least_cosine=min(check.cosines),
        mean_cosine=float(np.mean(check.cosines)),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Place:
    """Where the rows of a batch stand.

    Attributes:
        position_R: of the sample; within_R: which of its rows, a view or a position.
        number_R: in the store.
    """

    position_R: NDArray[np.int64]
    within_R: NDArray[np.int64]
    number_R: NDArray[np.int64]


class _Check:
    """Compares batches of fresh rows with kept ones; `cosines` collects what was found."""

    def __init__(self, rows: LocalRows, maker: RowMaker, teachers: Sequence[Teacher], device: torch.device) -> None:
        self._rows, self._maker, self._device = rows, maker, device
        self._teachers = list(teachers)
        self.cosines: list[float] = []

    def batches(self, positions: NDArray[np.int64], batch_size: int) -> Iterator[tuple[RowBatch, _Place]]:
        """Batches of all rows of these samples, and where they stand."""
        table, views = self._maker.table, self._maker.layout.views
        lengths = np.full(len(positions), views) if table is None else table.lengths[positions]
        first = positions * views if table is None else (np.cumsum(table.lengths) - table.lengths)[positions]
        position_R = np.repeat(positions, lengths)
        within_R = np.arange(len(position_R)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        number_R = np.repeat(first, lengths) + within_R
        done = 0
        for batch in self._maker.samples(positions, batch_size):
            part = slice(done, done + batch.rows)
            yield (
                batch,
                _Place(position_R=position_R[part], within_R=within_R[part], number_R=number_R[part]),
            )
            done += batch.rows

    def faults(self, batch: RowBatch, place: _Place) -> list[Fault]:
        """What differs in a batch, with the rows' numbers in the store."""
        kept, other_R = self._kept(batch, place)
        found = [_fault(int(row), "its input is not the one that the teachers saw") for row in place.number_R[other_R]]
        kind = self._rows.encoding.row_kind
        answers = ask(self._teachers, batch, self._maker, self._device, row_kind=kind)
        fresh = rows_to_keep(answers, self._teachers, self._rows.manifest, row_kind=kind)
        cosine_R = np.concatenate([self._cosines(kept, fresh, batch, part) for part in self._parts(batch)])
        if kind == "hidden_states":
            cosine_R = np.minimum(cosine_R, self._head_cosines(fresh, batch))
        self.cosines += cosine_R.tolist()
        found += [
            _fault(row, f"the teachers say something else by now (cosine {cosine:.6f})")
            for row, cosine in zip(place.number_R.tolist(), cosine_R.tolist(), strict=True)
            if not cosine >= LEAST_COSINE
        ]
        return found

    def _kept(self, batch: RowBatch, place: _Place) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_]]:
        """What is kept in these rows, and which of them were made of another input."""
        fields, kind = (*self._rows.encoding.fields, "fingerprints"), self._maker.layout.kind
        if self._maker.table is None:
            views = {"views": place.within_R} if kind == "views" else {}
            kept = self._rows.fetch(batch.ids, fields, **views)
            assert batch.fingerprints is not None  # rows of such layouts have their own
            return kept, (batch.fingerprints != kept["fingerprints"]).any(axis=1)
        # Sequences come whole, a fingerprint each, their rows joined.
        first = np.flatnonzero(np.diff(place.position_R, prepend=-1))
        kept = self._rows.fetch(batch.ids[first], fields)
        now = self._maker.table.fingerprints[place.position_R[first]]
        other = (now != kept["fingerprints"]).any(axis=1)
        if len(kept[fields[0]]) != batch.rows:
            raise JobError(
                f"samples of {self._rows.manifest.name!r} have other lengths than the transfer set's: the store was "
                "made for other data",
                ids=batch.ids[first][:5].tolist(),
            )
        return kept, np.repeat(other, np.diff(np.append(first, batch.rows)))

    def _cosines(
        self, kept: dict[str, NDArray[Any]], fresh: Tensor, batch: RowBatch, part: slice
    ) -> NDArray[np.float64]:
        """Of kept and fresh targets of each row; the fresh ones go through the same encoding, with its error."""
        encoding, members = self._rows.encoding, self._rows.manifest.members
        several = members or 1
        keys = batch.keys[part] if members is None else None
        again = encoding.decode_torch(encoding.encode_torch(_rows_of(fresh, part, several), keys_B=keys))
        axes = 1 if members is None else 2
        flat = {name: kept[name][part].reshape(-1, *kept[name].shape[axes:]) for name in encoding.fields}
        before = torch.from_numpy(encoding.decode(flat)).to(again.device)
        return _cosine(before, again).reshape(-1, several).amin(dim=1).cpu().numpy()

    def _head_cosines(self, hidden_RD: Tensor, batch: RowBatch) -> NDArray[np.float64]:
        """Of what the store's head and what the teacher itself makes of the same hidden states."""
        (answer,) = ask(self._teachers, batch, self._maker, self._device)
        head, half = self._teachers[0].head(), answer.dtype != torch.float32
        encoding, pieces = self._rows.encoding, []
        if half:
            # In half precision a teacher rounds its logits, so the heads are compared, before any scale or cap.
            params = {**encoding.params, "scale": 1.0, "softcap": 0.0}
            classes, constants = encoding.classes, encoding.constants
            encoding = make_encoding(encoding.name, classes=classes, params=params, constants=constants)
        for part in self._parts(batch):
            live = head.logits(hidden_RD[part].to(head.weight_CD.dtype)).float() if half else answer[part]
            pieces.append(_cosine(encoding.logits_of_torch(hidden_RD[part]), live))
        return torch.cat(pieces).cpu().numpy()

    def _parts(self, batch: RowBatch) -> list[slice]:
        step = max(1, _BLOCK_ENTRIES // (self._rows.manifest.classes * (self._rows.manifest.members or 1)))
        return [slice(start, min(start + step, batch.rows)) for start in range(0, batch.rows, step)]


def _drawn(maker: RowMaker, samples: int, wanted: int | None, seed: int) -> NDArray[np.int64]:
    """Positions of the samples to ask about, ascending; of sequences only those that have rows."""
    positions = np.arange(samples) if maker.table is None else np.flatnonzero(maker.table.lengths[:samples])
    a_sample = max(1, maker.layout.rows // max(1, maker.layout.samples))
    count = max(_FEWEST_SAMPLES, SAMPLED_ROWS // a_sample) if wanted is None else wanted
    found = np.random.default_rng(seed).choice(positions, min(count, len(positions)), replace=False)
    return np.sort(found).astype(np.int64)


def _rows_of(fresh: Tensor, part: slice, several: int) -> Tensor:
    """The part's rows, where each has `several` members side by side."""
    return fresh[part.start * several : part.stop * several]


def _cosine(logits_RC: Tensor, other_RC: Tensor) -> Tensor:
    """Between the distributions of each row."""
    p_RC, q_RC = (rows.double().softmax(dim=-1) for rows in (logits_RC, other_RC))
    return torch.nn.functional.cosine_similarity(p_RC, q_RC, dim=-1)


def _described(layout: RowLayout) -> str:
    what = {"single": "one row a sample", "views": f"{layout.views} views a sample", "sequences": "sequences"}
    return what[layout.kind]


def _fault(row: int, message: str) -> Fault:
    return Fault(kind="contents", message=message, rows=(row, row))
