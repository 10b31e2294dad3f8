"""Running a job: prepare, plan, compute shard by shard, and publish the manifest last; also resuming one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from msgspec import structs

from softlabels.documents import open_sealed
from softlabels.encodings import Encoding
from softlabels.errors import UnknownStoreError
from softlabels.manifest import Manifest
from softlabels.precompute.checks.committed_rows import ask_teachers_again, check_origin
from softlabels.precompute.checks.data_snapshot import (
    PlannedSamples,
    check_planned,
    check_unchanged,
    planned_sha256,
    write_snapshot,
)
from softlabels.precompute.job import FOUND, Job, load_kept_job
from softlabels.precompute.pipeline.device import DeviceStreams
from softlabels.precompute.pipeline.device_step import DeviceStep
from softlabels.precompute.pipeline.inference import with_compile
from softlabels.precompute.pipeline.shard_pipeline import RunMetrics, compute_shards
from softlabels.precompute.planning.batch_size import find_batch_size
from softlabels.precompute.planning.prepared_job import PlannedJob, load_transfer_set, plan_job, prepare_job
from softlabels.precompute.teachers import Teacher
from softlabels.progress import Progress, track
from softlabels.store.chunks import shard_rows
from softlabels.store.store_documents import JOB, MANIFEST, PLAN, load_encoding, load_plan
from softlabels.store.writer import StoreWriter
from softlabels.transfer_set import TransferSet

ShowProgress = Callable[..., AbstractContextManager[Progress]]


def precompute(
    job: Job,
    *,
    transfer_set: TransferSet | None = None,
    teachers: Sequence[Teacher] | None = None,
    show: ShowProgress = track,
    metrics: Path | None = None,
) -> Manifest:
    """Run the teachers once over the transfer set and store their targets.

    Continues an earlier run of the same job: committed shards are kept, all others are computed.

    Args:
        transfer_set, teachers: given where they live in this process already; else the job's references are loaded.
        metrics: file to append a JSON line to whenever a shard is committed, see `RunMetrics`.
    Returns:
        The manifest of the finished store; its plan where other processes still work on shards of it.
    Raises:
        JobError, TeacherError, EncodingError: nothing of the shard in work is kept, all committed ones are.
        StoreExistsError: a store of another job is there.
    """
    data = load_transfer_set(job) if transfer_set is None else transfer_set
    kept, root = _KeptJob(job), job.store_path
    if kept.continues_with_its_data():
        check_unchanged(root, data)
    prepared = prepare_job(job, transfer_set=data, teachers=teachers)
    planned = kept.continued(plan_job(prepared, encoding=kept.encoding()))
    writer = StoreWriter.create(root, planned.plan, table=prepared.rows.table, encoding=planned.encoding)
    write_snapshot(root, data)
    kept.write(writer)
    batch_size = kept.batch_size or job.run.pilot_batch_size
    if writer.missing_shards():
        ask_teachers_again(root, prepared.ensemble, batch_size=batch_size)
        _compute(planned, writer, kept, show=show, metrics=metrics)
    if writer.missing_shards():
        return planned.plan
    if not writer.finished:
        # Again, because data and teachers may have changed while the shards were computed, here or elsewhere.
        check_unchanged(root, data)
        check_planned(
            planned.plan.transfer_set, planned_sha256(data, prepared.ids, prepared.rows.table or PlannedSamples(data))
        )
        ask_teachers_again(root, prepared.ensemble, batch_size=kept.batch_size or batch_size)
    return writer.finish()


def resume(where: Path, *, show: ShowProgress = track, metrics: Path | None = None) -> Manifest:
    """Continue the store that an earlier `precompute` began at `where`.

    Raises:
        UnknownStoreError: no job was begun there; and all that `precompute` raises.
    """
    where = Path(where)
    if not (where / JOB).is_file():
        raise UnknownStoreError(f"nothing to resume at {where}: it has no {JOB}; start with `softlabels precompute`")
    return precompute(load_kept_job(where), show=show, metrics=metrics)


def _compute(
    planned: PlannedJob, writer: StoreWriter, kept: _KeptJob, *, show: ShowProgress, metrics: Path | None
) -> None:
    """Compute the missing shards, with the batch size that the job or an earlier run of it says."""
    plan, run, missing = writer.plan, planned.prepared.job.run, writer.missing_shards()
    ensemble, streams = planned.prepared.ensemble, DeviceStreams(planned.prepared.ensemble.device)
    done = plan.rows - sum(len(shard_rows(plan, shard)) for shard in missing)
    unit = "samples" if plan.layout.kind == "single" else "rows"
    lines = None if metrics is None else RunMetrics(metrics, plan, done=done, streams=streams)

    def keep_batch_size(size: int) -> None:
        kept.batch_size = size
        kept.write(writer)

    with show(plan.rows, f"precompute {plan.name}", unit, done=done) as progress:
        step = DeviceStep(plan, ensemble, encoding=planned.encoding, streams=streams)
        if kept.batch_size is None:
            # Written before the first shard, so that a resumed run computes in batches of the same size.
            keep_batch_size(find_batch_size(step, limit_gib=run.memory_limit_gib))
            progress.note(f"batches of {kept.batch_size}")
        assert kept.batch_size is not None
        if run.compile:  # after the search for a batch size, which would compile for each size
            ensemble = replace(ensemble, teachers=with_compile(ensemble.teachers))
            step = DeviceStep(plan, ensemble, encoding=planned.encoding, streams=streams)
        compute_shards(
            writer,
            step,
            missing,
            batch_size=kept.batch_size,
            loaders=run.loaders,
            progress=progress,
            on_commit=None if lines is None else lines.add,
            on_halved=keep_batch_size,
        )


class _KeptJob:
    """The job document in the store, and what earlier runs found out.

    Attributes:
        batch_size: batch size of the run; None where the job says `auto` and no run has found it yet.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        path = job.store_path / JOB
        self._begun = load_plan(job.store_path) if (job.store_path / PLAN).is_file() else None
        kept = path.is_file() and self._begun is not None
        self._before: dict[str, Any] = open_sealed(path.read_bytes(), what=str(path)) if kept else {}
        asked = job.run.batch_size
        self.batch_size = asked if isinstance(asked, int) else None
        if self._before.get("run", {}).get("batch_size") == asked:
            # The same batches as before: kernels round differently for another size.
            self.batch_size = self._before.get(FOUND, {}).get("batch_size", self.batch_size)

    def continues_with_its_data(self) -> bool:
        """Return whether this job was begun with this transfer set and is unfinished: then the data must not change."""
        same = self._before.get("transfer_set") == self._job.to_json()["transfer_set"]
        return same and not (self._job.store_path / MANIFEST).exists()

    def encoding(self) -> Encoding | None:
        """Return the encoding of the store that this very job began, so that nothing is learnt again; else None."""
        if self._begun is None or self._before.get("targets") != self._job.to_json()["targets"]:
            return None
        return load_encoding(self._job.store_path, self._begun)

    def continued(self, planned: PlannedJob) -> PlannedJob:
        """Return the plan in the format version of the store that was begun; raise as `check_origin` if it differs.

        Once a store is published its data may change: running its job again changes nothing.
        """
        if self._begun is None:
            return planned
        plan = planned.plan.as_version(self._begun.format_version)
        if (self._job.store_path / MANIFEST).exists():
            data = structs.replace(plan.transfer_set, planned_sha256=self._begun.transfer_set.planned_sha256)
            plan = structs.replace(plan, transfer_set=data)
        else:
            check_origin(self._begun, plan)
        return replace(planned, plan=plan)

    def write(self, writer: StoreWriter) -> None:
        """Write the job and what was found out beside the plan."""
        found = {} if self.batch_size in (None, self._job.run.batch_size) else {"batch_size": self.batch_size}
        writer.keep_job({**self._job.to_json(), **({FOUND: found} if found else {})})
