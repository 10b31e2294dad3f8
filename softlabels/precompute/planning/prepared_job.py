"""From a job to its plan: transfer set, teachers and rows, each loaded once, then the encoding and the store's plan.

`prepare_job` returns a `PreparedJob`, `plan_job` adds the plan; the run, the forecast and verify share these objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray
from torch import Tensor

from softlabels.encodings import Encoding
from softlabels.encodings.selection import EncodingRequest, parse_encoding
from softlabels.errors import JobError
from softlabels.manifest import IdSpec, Manifest, TemperatureSpec, TransferSetSpec
from softlabels.precompute.checks.data_snapshot import PlannedSamples, planned_sha256
from softlabels.precompute.checks.teacher_checks import checked_logits, encoding_of_head
from softlabels.precompute.job import Job
from softlabels.precompute.pipeline.device import choose_device
from softlabels.precompute.pipeline.inference import TeacherEnsemble, with_numerics
from softlabels.precompute.row_batches import RowBatch, RowLoader, SingleRows, ViewRows
from softlabels.precompute.sequence_rows import SequenceRows
from softlabels.precompute.teachers import Teacher, align_classes, class_list_of_store, load_teacher
from softlabels.softmath import Mean, check_temperature
from softlabels.store.sample_index import SampleTable
from softlabels.store.store_plan import kept_inputs, plan_store
from softlabels.transfer_set import ArrayTransferSet, TransferSet
from softlabels.transfer_sets import SupportsIdSpec, examine_ids
from softlabels.transfer_sets import load_transfer_set as load_source
from softlabels.views import load_view_transform

PILOT_ROWS = 4096
"""Rows that an encoding is learnt or chosen from; one half measures what the other half taught."""

_FIRST_SAMPLES = 8
"""Samples that every teacher is run on twice before a job: enough to see shapes, classes and dropout."""

_FIRST_SEQUENCES = 2
"""The same for sequences, which have many rows each."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedJob:
    """A job with everything that it names loaded: its transfer set, and its teachers on their device."""

    job: Job
    data: TransferSet
    ensemble: TeacherEnsemble

    @property
    def rows(self) -> RowLoader:
        """Return the loader of the store's rows."""
        return self.ensemble.rows

    @property
    def mean(self) -> Mean:
        """Return the mean over the members; `none` where there is one teacher."""
        return "none" if len(self.ensemble.teachers) == 1 else self.job.targets.mean

    @cached_property
    def first_batch(self) -> RowBatch:
        """The first few samples that have rows."""
        most = _FIRST_SAMPLES if self.rows.table is None else _FIRST_SEQUENCES
        return next(self.rows.samples(self.rows.positions()[:most], min(most, self.job.run.pilot_batch_size)))

    @cached_property
    def first_logits(self) -> list[Tensor]:
        """Each teacher's logits of the first batch, [R, C], checked. Raises as `checked_logits` does."""
        return checked_logits(self.ensemble, self.first_batch)

    @cached_property
    def ids(self) -> IdSpec:
        """How the store keeps the ids: dense where they count up by one, else through an index."""
        data, table = self.data, self.rows.table
        if table is not None:
            return examine_ids([table.ids], len(data), data.name)
        if isinstance(data, SupportsIdSpec):
            return data.id_spec()
        if isinstance(data, ArrayTransferSet):
            return examine_ids([data.ids], len(data), data.name)
        first = data.take(np.zeros(1, dtype=np.int64)).ids
        return IdSpec(kind="str", width_bytes=255) if first.dtype.kind == "U" else IdSpec(kind="int")

    @cached_property
    def planned(self) -> SampleTable | PlannedSamples:
        """Samples as they are now, whose digest the plan holds: from here on, they must be the same at every read."""
        if self.rows.table is not None:
            return self.rows.table
        self.rows.planned = PlannedSamples(self.data)
        return self.rows.planned

    @cached_property
    def transfer_set(self) -> TransferSetSpec:
        """What the plan says of the transfer set as it is now."""
        source = self.job.transfer_set
        return TransferSetSpec(
            name=self.data.name,
            source=source.source,
            arguments=dict(source.arguments),
            labelled=self.first_batch.labels is not None,
            planned_sha256=planned_sha256(self.data, self.ids, self.planned),
        )

    def pilot(self, spec: TemperatureSpec, *, rows: int = PILOT_ROWS) -> NDArray[np.float32]:
        """Return mean logits from all over the transfer set, [at most `rows`, C], tempered as they will be captured."""
        pieces: list[NDArray[np.float32]] = []
        positions = self.rows.spread_positions(int(rows / self.rows.rows_per_sample))
        for batch in self.rows.samples(positions, self.job.run.pilot_batch_size):
            combined = self.ensemble.mean(self.ensemble.run(batch), self.mean, spec.default)
            tempered = combined.logits_BC[:rows] * (combined.captured_temperature / spec.captured)
            pieces.append(tempered.cpu().numpy())
            rows -= len(tempered)
            if rows <= 0:
                break
        return np.concatenate(pieces)


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedJob:
    """A prepared job, the plan of its store, and the encoding of its rows, with what that learnt."""

    prepared: PreparedJob
    plan: Manifest
    encoding: Encoding


def load_transfer_set(job: Job) -> TransferSet:
    """Load the transfer set that a job names. Raises JobError where that fails, and what its source raises."""
    return load_source(job.transfer_set.source, job.transfer_set.arguments, base=job.base)


def load_teachers(job: Job, device: torch.device) -> list[Teacher]:
    """Load the teachers that a job names, in its order, each with the store's order of classes; not compiled."""
    loaded = [load_teacher(t, number=n, base=job.base, device=device) for n, t in enumerate(job.teachers)]
    return with_numerics(align_classes(job, loaded), job.run)


def prepare_job(
    job: Job, *, transfer_set: TransferSet | None = None, teachers: Sequence[Teacher] | None = None
) -> PreparedJob:
    """Load what a job names, except a transfer set and teachers that are given.

    Raises:
        JobError, TeacherError: something cannot be loaded, or the transfer set is empty.
    """
    device = choose_device(job.run.device)
    data = load_transfer_set(job) if transfer_set is None else transfer_set
    if len(data) == 0:
        raise JobError(f"transfer set {data.name!r} is empty: there is nothing to compute targets for")
    members = load_teachers(job, device) if teachers is None else with_numerics(teachers, job.run)
    ensemble = TeacherEnsemble(teachers=members, rows=_row_loader(job, data), device=device)
    return PreparedJob(job=job, data=data, ensemble=ensemble)


def plan_job(
    prepared: PreparedJob, *, encoding: Encoding | None = None, requested: str | Mapping[str, Any] | None = None
) -> PlannedJob:
    """Plan a job's store and make the encoding of its rows.

    The teachers run on the first few samples, which gives the class count; and on a pilot of samples from all over the
    set where the encoding is learnt or chosen from real rows.

    Args:
        prepared: job to plan.
        encoding: encoding of an earlier run of this job; made or learnt when None.
        requested: encoding to plan for, by name or table; the job's own when None.
    Raises:
        JobError, TeacherError: also where a teacher fails a check, see `teacher_checks`.
    """
    job, ensemble = prepared.job, prepared.ensemble
    temperature = check_temperature(job.targets.temperature)
    combined = ensemble.mean(prepared.first_logits, prepared.mean, temperature)
    classes = combined.logits_BC.shape[1]
    request = parse_encoding(requested or job.targets.encoding, classes=classes)
    keep_members = job.targets.keep == "members"
    if keep_members and request.locked:
        raise JobError(
            f"keep = 'members' needs an encoding that re-tempers, which {request.name!r} does not: a mean of "
            "truncated rows is not a mean of the members"
        )
    locked = (combined.locked and not keep_members) or request.locked
    spec = TemperatureSpec(default=temperature, captured=temperature if locked else 1.0, locked=locked)
    if request.row_kind == "hidden_states":
        made = _hidden_encoding(prepared, request)  # also on resuming: the teacher is checked again
        encoding = encoding or made
    encoding = encoding or request.make(
        classes=classes,
        pilot_BC=prepared.pilot(spec) if request.needs_pilot else None,
        temperatures=(1.0,) if locked else tuple(sorted({1.0, temperature})),
    )
    if not encoding.retemperable:  # `auto` may choose truncated rows where T = 1 is all that was asked for
        spec = replace(spec, locked=True)
    return PlannedJob(prepared=prepared, plan=_plan_of(prepared, encoding, spec), encoding=encoding)


def _plan_of(prepared: PreparedJob, encoding: Encoding, temperature: TemperatureSpec) -> Manifest:
    job, rows, first = prepared.job, prepared.rows, prepared.first_batch
    teachers = prepared.ensemble.teachers
    inputs = first.inputs if first.kept_inputs is None else first.kept_inputs
    plan = plan_store(
        name=job.store_name,
        samples=len(prepared.data),
        ids=prepared.ids,
        encoding=encoding,
        temperature=temperature,
        mean=prepared.mean,
        teachers=tuple(teacher.spec for teacher in teachers),
        transfer_set=prepared.transfer_set,
        container=job.store.format,
        rows_per_shard=job.store.rows_per_shard,
        rows_per_chunk=job.store.rows_per_chunk,
        members=len(teachers) if job.targets.keep == "members" else None,
        layout=rows.layout,
        views=rows.views,
        table=rows.table,
        inputs=kept_inputs(inputs) if job.store.inputs else None,
    )
    precision = None if job.run.precision == "float32" else job.run.precision
    class_list = class_list_of_store(job, teachers, classes=encoding.classes)
    return replace(plan, class_list=class_list, precision=precision)


def _row_loader(job: Job, data: TransferSet) -> RowLoader:
    if job.sequences is not None:
        return SequenceRows(data, job.sequences, store=job.store_name)
    if job.views is None:
        return SingleRows(data, store=job.store_name)
    transform = load_view_transform(job.views.transform, arguments=job.views.arguments, base=job.base)
    return ViewRows(data, job.views, transform, store=job.store_name)


def _hidden_encoding(prepared: PreparedJob, request: EncodingRequest) -> Encoding:
    if len(prepared.ensemble.teachers) > 1 or prepared.job.targets.keep == "members":
        raise JobError(
            "hidden states come from one teacher: those of several cannot be averaged, since each belongs to a head of "
            "its own. Make a store for each teacher, or keep logits"
        )
    (hidden_RD,) = prepared.ensemble.run(prepared.first_batch, row_kind="hidden_states")
    (teacher,), (logits_RC,) = prepared.ensemble.teachers, prepared.first_logits
    return encoding_of_head(teacher, request.params, logits_RC=logits_RC, hidden_RD=hidden_RD)
