"""Verify against teachers: run them again on random samples and compare with the targets in the store.

Legend: R rows of a batch, C classes, D width of hidden states, M members.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from softlabels.precompute.pipeline.inference import TeacherEnsemble
from softlabels.precompute.planning.prepared_job import prepare_job
from softlabels.precompute.row_batches import RowBatch, RowLoader
from softlabels.precompute.teachers import Teacher
from softlabels.progress import ShowProgress, silent
from softlabels.store.shard_checks import Fault, Report
from softlabels.store.store_reader import LocalRows
from softlabels.transfer_set import UNLABELLED, TransferSet

SAMPLED_ROWS = 256
LEAST_COSINE = 0.9999
"""Between the stored target and the target computed again: other kernels round differently, other weights fail."""

_FEWEST_SAMPLES = 4
"""Of views and sequences, which have many rows each."""

_NAMED_ROWS = 5
"""Row numbers that a fault names; its message says how many there are."""

_BLOCK_ENTRIES = 1 << 23
"""Entries compared at once, in a few float64 temporaries of 64 MiB."""


@dataclass(frozen=True, kw_only=True)
class TeacherAgreement:
    """How many samples and rows were compared, and how similar stored and fresh targets are (cosine, as encoded).

    Attributes:
        other_inputs: rows whose input is not the one that the store was made from; their targets are not compared.
        other_targets: rows of the others whose target has a cosine below `LEAST_COSINE`.
    """

    samples: int
    rows: int
    other_inputs: int
    other_targets: int
    least_cosine: float
    mean_cosine: float

    def to_json(self) -> dict[str, object]:
        """Return the figures as JSON."""
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
    """Run the job's teachers on random samples, compare with the store, and add faults to the report.

    All rows of a sample are computed again. For hidden states, the store's head is compared with the teacher's too.

    Args:
        job: job with the teachers, transfer set, views and sequences; its own store is not read.
        report: report of `verify`; gets one fault of kind "agreement" where inputs differ, and one where targets do.
        samples, seed: how many samples to draw, and the seed; when None, as many as have about `SAMPLED_ROWS` rows.
        transfer_set, teachers: given where they live in this process already.
    Raises:
        JobError: the job has another layout, number of teachers, or samples than the store.
    """
    stored = LocalRows(where, verify="every-read")
    manifest = stored.manifest
    # Random draws of views and tokens depend on the store's name.
    named = structs.replace(job, store=structs.replace(job.store, name=manifest.name))
    ensemble = prepare_job(named, transfer_set=transfer_set, teachers=teachers).ensemble
    layout = ensemble.rows.layout
    if (layout.kind, layout.views) != (manifest.layout.kind, manifest.layout.views):
        raise JobError(
            f"the job makes {_described(layout)}, {manifest.name!r} keeps {_described(manifest.layout)}: verify a "
            "store with the job that made it"
        )
    if len(ensemble.teachers) != len(manifest.teachers):
        raise JobError(f"the job has {len(ensemble.teachers)} teachers, the store was made by {len(manifest.teachers)}")
    positions = _draw_positions(ensemble.rows, min(manifest.samples, layout.samples), samples, seed)
    comparison = Comparison(stored, ensemble)
    lengths = layout.views if ensemble.rows.table is None else ensemble.rows.table.lengths[positions]
    with show(int(np.broadcast_to(lengths, positions.shape).sum()), "run the teachers again", "rows") as progress:
        for batch in ensemble.rows.samples(positions, job.run.pilot_batch_size):
            comparison.add(batch)
            progress.advance(batch.rows)
    report.faults += comparison.faults()
    cosines = np.concatenate(comparison.cosines)
    return TeacherAgreement(
        samples=len(positions),
        rows=len(cosines),
        other_inputs=int(sum(map(len, comparison.other_inputs))),
        other_targets=int(sum(map(len, comparison.other_targets))),
        least_cosine=float(cosines.min()),
        mean_cosine=float(cosines.mean()),
    )


class Comparison:
    """Compares batches of fresh rows with stored ones; each attribute has one array a batch.

    Attributes:
        numbers: row numbers.
        cosines: similarity of each row.
        soft_cosines: the same, softened until the standard deviation of a row's logits is at most 1.
        other_inputs, other_targets: numbers of the rows that differ; a row of another input is not counted among the
            targets, since what the teachers make of it says nothing about them.
    """

    def __init__(self, stored: LocalRows, ensemble: TeacherEnsemble) -> None:
        self._stored, self._ensemble, self._rows = stored, ensemble, ensemble.rows
        self.teachers = ensemble.teachers
        self.numbers: list[NDArray[np.int64]] = []
        self.cosines: list[NDArray[np.float64]] = []
        self.soft_cosines: list[NDArray[np.float64]] = []
        self.other_inputs: list[NDArray[np.int64]] = []
        self.other_targets: list[NDArray[np.int64]] = []

    def add(self, batch: RowBatch) -> None:
        """Run the teachers on a batch and record how it differs from the rows that the store has for its ids."""
        self._compare(batch, *self._stored_rows(batch), with_head=True)

    def add_numbered(self, batch: RowBatch) -> None:
        """Do the same by row number: ids and labels must be those of the rows, too; a head is not run."""
        facts = {"ids": batch.ids, "fingerprints": batch.fingerprints, "labels": batch.labels}
        kept = [name for name in facts if name in self._stored.manifest.arrays]
        stored = self._stored.fetch_rows(batch.numbers, (*self._stored.encoding.fields, *kept))
        other_R = np.zeros(batch.rows, dtype=np.bool_)
        for name in kept:
            fact = facts[name]
            now = np.full(batch.rows, UNLABELLED) if fact is None else fact
            other_R |= (stored[name] != now).reshape(batch.rows, -1).any(axis=1)
        self._compare(batch, stored, other_R, with_head=False)

    def _compare(
        self, batch: RowBatch, stored: dict[str, NDArray[Any]], other_R: NDArray[np.bool_], *, with_head: bool
    ) -> None:
        kind = self._stored.encoding.row_kind
        outputs = self._ensemble.run(batch, row_kind=kind)
        fresh = self._ensemble.rows_to_store(outputs, self._stored.manifest, row_kind=kind)
        pairs = [self._cosines(stored, fresh, batch, part) for part in self._parts(batch)]
        cosine_R, soft_R = (np.concatenate(each) for each in zip(*pairs, strict=True))
        if kind == "hidden_states" and with_head:
            cosine_R = np.minimum(cosine_R, self._head_cosines(fresh, batch))
        self.numbers.append(batch.numbers)
        self.cosines.append(cosine_R)
        self.soft_cosines.append(soft_R)
        self.other_inputs.append(batch.numbers[other_R])
        self.other_targets.append(batch.numbers[~(cosine_R >= LEAST_COSINE) & ~other_R])  # NaN is a fault too

    def faults(self) -> list[Fault]:
        """Return one fault for the inputs that differ and one for the targets, each with what helps."""
        total, lowest = sum(map(len, self.cosines)), min(float(part.min()) for part in self.cosines)
        inputs = (
            "their input is not the one that the teachers saw: the job's data, views or their libraries are not those "
            "of the store; give the job that the store was made with, and its data"
        )
        targets = (
            f"the teachers give another target now (lowest cosine {lowest:.6f}): {self.changed_teachers()}; give the "
            "teachers that the store was made with, or precompute another store with these"
        )
        found = []
        for numbers, message in ((self.other_inputs, inputs), (self.other_targets, targets)):
            rows = np.sort(np.concatenate(numbers))
            if len(rows):
                shown = ", ".join(map(str, rows[:_NAMED_ROWS].tolist())) + (" …" if len(rows) > _NAMED_ROWS else "")
                message = f"{len(rows)} of {total} rows compared ({shown}): {message}"
                found.append(Fault(kind="agreement", message=message, rows=(int(rows[0]), int(rows[-1]))))
        return found

    def changed_teachers(self) -> str:
        """Return what the manifest records of the teachers and these do not have."""
        pairs = enumerate(zip(self._stored.manifest.teachers, self._ensemble.teachers, strict=True))
        changed = [
            f"teacher {number} ({was.name}) has another {name}"
            for number, (was, teacher) in pairs
            for name in was.__struct_fields__
            if getattr(was, name) not in (None, getattr(teacher.spec, name))
        ]
        unchanged = "what the manifest records of them is the same, so compare library versions, device and precision"
        return ", ".join(changed) or unchanged

    def _stored_rows(self, batch: RowBatch) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_]]:
        """Return what these rows hold in the store, and which of them were made of another input."""
        fields, layout, table = (*self._stored.encoding.fields, "fingerprints"), self._rows.layout, self._rows.table
        if table is None:
            views = {"views": batch.numbers % layout.views} if layout.kind == "views" else {}
            stored = self._stored.fetch(batch.ids, fields, **views)
            assert batch.fingerprints is not None  # rows of such layouts have their own
            return stored, (batch.fingerprints != stored["fingerprints"]).any(axis=1)
        # Sequences are fetched whole, with one fingerprint each, their rows joined.
        starts = np.cumsum(table.lengths) - table.lengths
        position_R = np.searchsorted(starts, batch.numbers, side="right") - 1
        first = np.flatnonzero(np.diff(position_R, prepend=-1))
        stored = self._stored.fetch(batch.ids[first], fields)
        other = (table.fingerprints[position_R[first]] != stored["fingerprints"]).any(axis=1)
        if len(stored[fields[0]]) != batch.rows:
            raise JobError(
                f"samples of {self._stored.manifest.name!r} have other lengths than the transfer set's: the store was "
                "made for other data",
                ids=batch.ids[first][:5].tolist(),
            )
        return stored, np.repeat(other, np.diff(np.append(first, batch.rows)))

    def _cosines(
        self, stored: dict[str, NDArray[Any]], fresh: Tensor, batch: RowBatch, part: slice
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the cosines, plain and softened, of stored and fresh targets per row.

        Fresh rows pass the same encoding, with its error.
        """
        encoding, members = self._stored.encoding, self._stored.manifest.members
        several = members or 1
        keys = batch.keys[part] if members is None else None
        rows = fresh[part.start * several : part.stop * several]  # members of a row are side by side
        again = encoding.decode_torch(encoding.encode_torch(rows, keys_B=keys))
        axes = 1 if members is None else 2
        flat = {name: stored[name][part].reshape(-1, *stored[name].shape[axes:]) for name in encoding.fields}
        before = torch.from_numpy(encoding.decode(flat)).to(again.device)
        present = before.isfinite()
        mean = before.where(present, 0.0).sum(1, keepdim=True) / present.sum(1, keepdim=True)
        spread = (before - mean).where(present, 0.0).square().sum(1, keepdim=True) / present.sum(1, keepdim=True)
        width = spread.sqrt().clamp(min=1.0)
        plain, soft = (
            found.reshape(-1, several).amin(dim=1).cpu().numpy()
            for found in (_cosine(before, again), _cosine(before / width, again / width))
        )
        return plain, soft

    def _head_cosines(self, hidden_RD: Tensor, batch: RowBatch) -> NDArray[np.float64]:
        """Return the cosine of the distributions that the store's head and the teacher make of the hidden states."""
        (logits_RC,) = self._ensemble.run(batch)
        head, half = self._ensemble.teachers[0].head(), logits_RC.dtype != torch.float32
        encoding, pieces = self._stored.encoding, []
        if half:
            # In half precision a teacher rounds its logits, so the heads are compared, before any scale or cap.
            params = {**encoding.params, "scale": 1.0, "softcap": 0.0}
            classes, constants = encoding.classes, encoding.constants
            encoding = make_encoding(encoding.name, classes=classes, params=params, constants=constants)
        for part in self._parts(batch):
            live = head.logits(hidden_RD[part].to(head.weight_CD.dtype)).float() if half else logits_RC[part]
            pieces.append(_cosine(encoding.logits_of_torch(hidden_RD[part]), live))
        return torch.cat(pieces).cpu().numpy()

    def _parts(self, batch: RowBatch) -> list[slice]:
        manifest = self._stored.manifest
        step = max(1, _BLOCK_ENTRIES // (manifest.classes * (manifest.members or 1)))
        return [slice(start, min(start + step, batch.rows)) for start in range(0, batch.rows, step)]


def _draw_positions(rows: RowLoader, most: int, wanted: int | None, seed: int) -> NDArray[np.int64]:
    """Draw the positions of the samples to compare, ascending, from the first `most` that have rows."""
    positions = rows.positions()
    positions = positions[positions < most]
    count = max(_FEWEST_SAMPLES, SAMPLED_ROWS // int(rows.rows_per_sample)) if wanted is None else wanted
    drawn = np.random.default_rng(seed).choice(positions, min(count, len(positions)), replace=False)
    return np.sort(drawn).astype(np.int64)


def _cosine(logits_RC: Tensor, other_RC: Tensor) -> Tensor:
    """Return the cosine similarity of the distributions of each row."""
    p_RC, q_RC = (rows.double().softmax(dim=-1) for rows in (logits_RC, other_RC))
    return torch.nn.functional.cosine_similarity(p_RC, q_RC, dim=-1)


def _described(layout: RowLayout) -> str:
    what = {"single": "one row per sample", "views": f"{layout.views} views per sample", "sequences": "sequences"}
    return what[layout.kind]
