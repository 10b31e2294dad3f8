"""What will a job's store look like? Its transfer set, teachers, rows and encoding, settled before the first shard."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray

from softlabels.encodings import Encoding
from softlabels.encodings.selection import parse_encoding
from softlabels.errors import JobError
from softlabels.manifest import IdSpec, Manifest, TemperatureSpec, TransferSetSpec
from softlabels.precompute.checks.teacher_checks import steady_answers
from softlabels.precompute.hidden_states import encoding_of_head, refuse_ensembles
from softlabels.precompute.job import Job
from softlabels.precompute.pipeline.inference import ask, averaged, computing, pilot_rows
from softlabels.precompute.row_batches import RowBatch, RowMaker, SingleRows, ViewRows
from softlabels.precompute.sequence_rows import SequenceRows
from softlabels.precompute.teachers import Teacher, align_classes, class_list_of_store, load_teacher
from softlabels.softmath import Mean, check_temperature
from softlabels.store.store_plan import kept_inputs, plan_store
from softlabels.transfer_set import ArrayTransferSet, TransferSet
from softlabels.transfer_sets import SupportsIdSpec, examine_ids
from softlabels.transfer_sets import load_transfer_set as load_source
from softlabels.views import load_view_transform

PILOT_ROWS = 4096
"""Rows that an encoding is learnt or chosen from; half of them measure what the other half taught."""


_FIRST = 8
"""Samples that every teacher is asked about twice before a job begins: enough to see shapes, classes and dropout."""

_FIRST_SEQUENCES = 2
"""Of sequences, whose rows are many."""


def load_transfer_set(job: Job) -> TransferSet:
    """The transfer set that a job names.

    Raises:
        JobError: its source is unknown, leads nowhere, or gives something else; and what the source itself raises.
    """
    return load_source(job.transfer_set.source, job.transfer_set.arguments, base=job.base)


def row_maker(job: Job, data: TransferSet) -> RowMaker:
    """How the rows of a job's store follow from the samples of its transfer set."""
    if job.sequences is not None:
        return SequenceRows(data, job.sequences, store=store_name(job))
    if job.views is None:
        return SingleRows(data, store=store_name(job))
    transform = load_view_transform(job.views.transform, arguments=job.views.arguments, base=job.base)
    return ViewRows(data, job.views, transform, store=store_name(job))


def store_name(job: Job) -> str:
    """What the job's store calls itself."""
    return job.store.name or job.store_path.name


def load_teachers(job: Job, device: torch.device) -> list[Teacher]:
    """The ensemble that a job names, in its order, each member with the store's order of classes, but not compiled."""
    loaded = [load_teacher(t, number=n, base=job.base, device=device) for n, t in enumerate(job.teachers)]
    return computing(align_classes(job, loaded), job.run)


def plan_job(
    job: Job,
    data: TransferSet,
    teachers: Sequence[Teacher],
    device: torch.device,
    *,
    encoding: Encoding | None = None,
    maker: RowMaker | None = None,
) -> tuple[Manifest, Encoding]:
    """The plan of a job and the encoding of its rows.

    The teachers are asked about a first few samples, so that their class count is known; and about a pilot of samples
    from all over the set where the encoding is learnt or chosen from real rows.

    Args:
        encoding: of an earlier run of this job; made or learnt when None.
        maker: how rows follow from samples; the job's own when None.
    Raises:
        JobError, TeacherError: also where a teacher's answers are not to be relied on, see `steadiness`.
    """
    temperature = check_temperature(job.targets.temperature)
    if len(data) == 0:
        raise JobError(f"transfer set {data.name!r} is empty: there is nothing to compute targets for")
    maker = maker or row_maker(job, data)
    first = _first_batch(maker, len(data), job.run.pilot_batch_size)
    mean: Mean = "none" if len(teachers) == 1 else job.targets.mean
    answers = steady_answers(teachers, first, maker, device)
    combined = averaged(answers, teachers, mean, temperature)
    classes = combined.logits_BC.shape[1]
    requested = parse_encoding(job.targets.encoding, classes=classes)
    keep_members = job.targets.keep == "members"
    if requested.row_kind == "hidden_states":
        refuse_ensembles(teachers, job.targets.keep)
        (hidden_RD,) = ask(teachers, first, maker, device, row_kind="hidden_states")
        made = encoding_of_head(teachers[0], requested.params, logits_RC=answers[0], hidden_RD=hidden_RD)
        encoding = encoding or made
    locked = (combined.locked and not keep_members) or requested.locked
    if keep_members and requested.locked:
        raise JobError(
            f"keep = 'members' needs an encoding that re-tempers, which {requested.name!r} does not: a mean of "
            "truncated rows is no mean of the members"
        )
    spec = TemperatureSpec(default=temperature, captured=temperature if locked else 1.0, locked=locked)
    encoding = encoding or requested.make(
        classes=classes,
        pilot_BC=pilot(job, data, maker, teachers, mean, spec, device) if requested.needs_pilot else None,
        temperatures=(1.0,) if locked else tuple(sorted({1.0, temperature})),
    )
    if not encoding.retemperable:  # `auto` may have taken truncated rows, where T = 1 is all that was asked for
        spec = replace(spec, locked=True)
    plan = plan_store(
        name=store_name(job),
        samples=len(data),
        ids=id_spec_of(data) if maker.table is None else examine_ids([maker.table.ids], len(data), data.name),
        encoding=encoding,
        temperature=spec,
        mean=mean,
        teachers=tuple(teacher.spec for teacher in teachers),
        transfer_set=TransferSetSpec(
            name=data.name,
            source=job.transfer_set.source,
            arguments=dict(job.transfer_set.arguments),
            labelled=first.labels is not None,
        ),
        container=job.store.format,
        rows_per_shard=job.store.rows_per_shard,
        rows_per_chunk=job.store.rows_per_chunk,
        members=len(teachers) if keep_members else None,
        layout=maker.layout,
        views=maker.views,
        table=maker.table,
        inputs=kept_inputs(first.inputs if first.kept_inputs is None else first.kept_inputs)
        if job.store.inputs
        else None,
    )
    precision = None if job.run.precision == "float32" else job.run.precision
    class_list = class_list_of_store(job, teachers, classes=classes)
    return replace(plan, class_list=class_list, precision=precision), encoding


def pilot(
    job: Job,
    data: TransferSet,
    maker: RowMaker,
    teachers: Sequence[Teacher],
    mean: Mean,
    spec: TemperatureSpec,
    device: torch.device,
    *,
    rows: int = PILOT_ROWS,
) -> NDArray[np.float32]:
    """Rows from all over the transfer set, tempered as they will be captured: what an encoding is learnt from."""
    rows_a_sample = max(1.0, maker.layout.rows / max(1, maker.layout.samples))
    there = np.arange(len(data)) if maker.table is None else np.flatnonzero(maker.table.lengths)
    positions = there[np.unique(np.linspace(0, len(there) - 1, max(1, int(rows / rows_a_sample))).astype(np.int64))]
    return pilot_rows(
        maker.samples(positions, job.run.pilot_batch_size),
        maker,
        teachers,
        mean,
        temperature=spec.default,
        captured=spec.captured,
        most_rows=rows,
        device=device,
    )


def _first_batch(maker: RowMaker, samples: int, batch_size: int) -> RowBatch:
    """A few samples that have rows."""
    if maker.table is None:
        return next(maker.samples(np.arange(min(samples, _FIRST), dtype=np.int64), min(_FIRST, batch_size)))
    positions = np.flatnonzero(maker.table.lengths)[:_FIRST_SEQUENCES]
    return next(maker.samples(positions, min(_FIRST_SEQUENCES, batch_size)))


def id_spec_of(data: TransferSet) -> IdSpec:
    """How a store keeps the ids of this transfer set: dense where they count up by one, else looked up."""
    if isinstance(data, SupportsIdSpec):
        return data.id_spec()
    if isinstance(data, ArrayTransferSet):
        return examine_ids([data.ids], len(data), data.name)
    ids = data.take(np.zeros(1, dtype=np.int64)).ids
    return IdSpec(kind="str", width_bytes=255) if ids.dtype.kind == "U" else IdSpec(kind="int")


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` takes an accelerator where there is one.

    Raises:
        JobError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise JobError(f"device {name!r} cannot be used here: {error}") from error
    return device
