"""How a job becomes a store: plan, claim, compute, commit, shard by shard, and the manifest last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from softlabels.encodings import Encoding
from softlabels.encodings.requested import parse_encoding
from softlabels.errors import JobError, TeacherError, UnknownStoreError
from softlabels.ids import utf8
from softlabels.manifest import IdSpec, Manifest, MeanKind, TemperatureSpec, TransferSetSpec
from softlabels.precompute.answers import ask, averaged, pilot_rows
from softlabels.precompute.device_pass import DevicePass
from softlabels.precompute.job import Job, job_from_json
from softlabels.precompute.lanes import Lanes
from softlabels.precompute.pipeline import compute_shards
from softlabels.precompute.rows import RowMaker, SingleRows
from softlabels.precompute.teachers import Teacher, load_teacher
from softlabels.progress import Progress, track
from softlabels.references import load_reference
from softlabels.sealing import unseal
from softlabels.softmath import check_temperature
from softlabels.store.beginning import load_plan
from softlabels.store.constants import load_encoding
from softlabels.store.geometry import shard_rows
from softlabels.store.planning import plan_store
from softlabels.store.rows import JOB, PLAN
from softlabels.store.writer import StoreWriter
from softlabels.transfer import ArrayTransferSet, TransferSet

PILOT_ROWS = 4096
"""Rows that an encoding is learnt or chosen from; half of them measure what the other half taught."""

ShowProgress = Callable[..., AbstractContextManager[Progress]]


def precompute(
    job: Job,
    *,
    transfer_set: TransferSet | None = None,
    teachers: Sequence[Teacher] | None = None,
    show: ShowProgress = track,
) -> Manifest:
    """Run the teachers once over the transfer set and keep what they say.

    Goes on where an earlier run of the same job stopped: committed shards are kept, all others are computed.

    Args:
        job: what to do.
        transfer_set, teachers: given where they live in this process already; else the job's references are loaded.
        show: how progress is shown.
    Returns:
        The manifest of the finished store; its plan, where other processes still work on shards of it.
    Raises:
        JobError, TeacherError, EncodingError: nothing of the shard in work is kept, all committed ones are.
        StoreExistsError: a store of another job stands there.
    """
    device = choose_device(job.run.device)
    data = transfer_set if transfer_set is not None else load_transfer_set(job)
    members = teachers if teachers is not None else load_teachers(job, device)
    maker = row_maker(job, data)
    plan, encoding = plan_job(job, data, members, device, encoding=_kept_encoding(job), maker=maker)
    writer = StoreWriter.create(job.store_path, plan, table=maker.table, encoding=encoding)
    writer.keep_job(job.to_json())
    device_pass = DevicePass(plan, maker, members, encoding=encoding, lanes=Lanes(device))
    missing = writer.missing_shards()
    done = plan.rows - sum(len(shard_rows(plan, shard)) for shard in missing)
    unit = "samples" if plan.layout.kind == "single" else "rows"
    with show(plan.rows, f"precompute {plan.name}", unit, done=done) as progress:
        compute_shards(
            writer,
            maker,
            device_pass,
            missing,
            batch_size=job.run.batch_size,
            progress=progress,
            committed=lambda work, audit: None,
            halved=lambda size: None,
        )
    return writer.finish() if not writer.missing_shards() else plan


def resume(where: Path, *, show: ShowProgress = track) -> Manifest:
    """Go on with the store that an earlier `precompute` began at `where`.

    Raises:
        UnknownStoreError: nothing was begun there; and all that `precompute` raises.
    """
    path = Path(where) / JOB
    if not path.is_file():
        raise UnknownStoreError(f"nothing to resume at {where}: it has no {JOB}; start with `softlabels precompute`")
    document = unseal(path.read_bytes(), what=str(path))
    base = Path(document.pop("base"))
    job = job_from_json(document, base=base, what=str(path))
    return precompute(_at(job, Path(where)), show=show)


def load_transfer_set(job: Job) -> TransferSet:
    """The transfer set that a job names.

    Raises:
        JobError: the reference leads nowhere or gives something else.
    """
    make = load_reference(job.transfer_set.source, base=job.base)
    try:
        found = make(**job.transfer_set.arguments) if callable(make) else make
    except TypeError as error:
        raise JobError(
            f"transfer set {job.transfer_set.source} does not take {dict(job.transfer_set.arguments)}: {error}"
        ) from error
    if not all(hasattr(found, name) for name in ("name", "take", "__len__")):
        raise JobError(
            f"transfer set {job.transfer_set.source} gives a {type(found).__name__}, not a TransferSet (name, "
            "__len__, take)"
        )
    return found  # type: ignore[no-any-return]


def row_maker(job: Job, data: TransferSet) -> RowMaker:
    """How the rows of a job's store follow from the samples of its transfer set."""
    return SingleRows(data, store=store_name(job))


def store_name(job: Job) -> str:
    """What the job's store calls itself."""
    return job.store.name or job.store_path.name


def load_teachers(job: Job, device: torch.device) -> list[Teacher]:
    """The ensemble that a job names, in its order."""
    return [load_teacher(t, number=n, base=job.base, device=device) for n, t in enumerate(job.teachers)]


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
        JobError, TeacherError: also when a teacher answers the same batch twice differently.
    """
    temperature = check_temperature(job.targets.temperature)
    if len(data) == 0:
        raise JobError(f"transfer set {data.name!r} is empty: there is nothing to compute targets for")
    maker = maker or row_maker(job, data)
    first = next(maker.samples(np.arange(min(len(data), 16), dtype=np.int64), min(16, job.run.batch_size)))
    mean: MeanKind = "none" if len(teachers) == 1 else job.targets.mean
    answers = ask(teachers, first, maker, device)
    combined = averaged(answers, teachers, mean, temperature)
    for teacher, once, again in zip(teachers, answers, ask(teachers, first, maker, device), strict=True):
        if not torch.allclose(once, again, rtol=1e-3, atol=1e-3):
            raise TeacherError(
                f"teacher {teacher.spec.name!r} answers the same batch twice differently: something random is still on "
                "(dropout by hand, sampling, noise), so its targets could never be verified"
            )
    classes = combined.logits_BC.shape[1]
    requested = parse_encoding(job.targets.encoding, classes=classes)
    keep_members = job.targets.keep == "members"
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
        ids=id_spec_of(data),
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
    )
    return plan, encoding


def pilot(
    job: Job,
    data: TransferSet,
    maker: RowMaker,
    teachers: Sequence[Teacher],
    mean: MeanKind,
    spec: TemperatureSpec,
    device: torch.device,
    *,
    rows: int = PILOT_ROWS,
) -> NDArray[np.float32]:
    """Rows from all over the transfer set, tempered as they will be captured: what an encoding is learnt from."""
    rows_a_sample = max(1.0, maker.layout.rows / max(1, maker.layout.samples))
    positions = np.unique(np.linspace(0, len(data) - 1, max(1, int(rows / rows_a_sample))).astype(np.int64))
    return pilot_rows(
        maker.samples(positions, job.run.batch_size),
        maker,
        teachers,
        mean,
        temperature=spec.default,
        captured=spec.captured,
        most_rows=rows,
        device=device,
    )


def _kept_encoding(job: Job) -> Encoding | None:
    """The encoding of the store that this very job began, so that a resumed run learns nothing anew; else None."""
    path = job.store_path / JOB
    if not path.is_file() or not (job.store_path / PLAN).is_file():
        return None
    before = unseal(path.read_bytes(), what=str(path))["targets"]
    return load_encoding(job.store_path, load_plan(job.store_path)) if before == job.to_json()["targets"] else None


def id_spec_of(data: TransferSet) -> IdSpec:
    """How a store keeps the ids of this transfer set: dense where they count up by one, else looked up."""
    ids = data.ids if isinstance(data, ArrayTransferSet) else data.take(np.zeros(1, dtype=np.int64)).ids
    if ids.dtype.kind == "U":
        known = isinstance(data, ArrayTransferSet)
        return IdSpec(kind="str", width_bytes=utf8(ids).dtype.itemsize if known else 255)
    if isinstance(data, ArrayTransferSet) and bool((np.diff(ids) == 1).all()):
        return IdSpec(kind="int", dense_start=int(ids[0]))
    return IdSpec(kind="int")


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


def _at(job: Job, where: Path) -> Job:
    resolved = str(where.resolve())
    return replace(job, store=replace(job.store, path=resolved, name=store_name(job)))

