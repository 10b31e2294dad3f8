"""How a job becomes a store: plan, claim, compute, commit, shard by shard, and the manifest last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from softlabels.documents import open_sealed
from softlabels.encodings import Encoding
from softlabels.errors import UnknownStoreError
from softlabels.manifest import Manifest
from softlabels.precompute.checks.data_snapshot import note_files, refuse_changed
from softlabels.precompute.job import Job, job_from_json
from softlabels.precompute.pipeline.device import Lanes
from softlabels.precompute.pipeline.device_step import DevicePass
from softlabels.precompute.pipeline.inference import compiled, computing
from softlabels.precompute.pipeline.run_metrics import Metrics
from softlabels.precompute.pipeline.shard_pipeline import compute_shards
from softlabels.precompute.planning.batch_size import find_batch_size
from softlabels.precompute.planning.prepared_job import (
    choose_device,
    load_teachers,
    load_transfer_set,
    plan_job,
    row_maker,
    store_name,
)
from softlabels.precompute.row_batches import RowMaker
from softlabels.precompute.teachers import Teacher
from softlabels.progress import Progress, track
from softlabels.store.chunks import shard_rows
from softlabels.store.encoding_files import load_encoding
from softlabels.store.store_documents import JOB, MANIFEST, PLAN, load_plan
from softlabels.store.writer import StoreWriter
from softlabels.transfer_set import TransferSet

FOUND = "found"
"""What a run found out that its job file does not say, kept with the job: `batch_size`."""

ShowProgress = Callable[..., AbstractContextManager[Progress]]


def precompute(
    job: Job,
    *,
    transfer_set: TransferSet | None = None,
    teachers: Sequence[Teacher] | None = None,
    show: ShowProgress = track,
    metrics: Path | None = None,
) -> Manifest:
    """Run the teachers once over the transfer set and keep what they say.

    Goes on where an earlier run of the same job stopped: committed shards are kept, all others are computed.

    Args:
        job: what to do.
        transfer_set, teachers: given where they live in this process already; else the job's references are loaded.
        show: how progress is shown.
        metrics: a file that a line of figures is added to whenever a shard is committed, see `Metrics`.
    Returns:
        The manifest of the finished store; its plan, where other processes still work on shards of it.
    Raises:
        JobError, TeacherError, EncodingError: nothing of the shard in work is kept, all committed ones are.
        StoreExistsError: a store of another job stands there.
    """
    device = choose_device(job.run.device)
    data = transfer_set if transfer_set is not None else load_transfer_set(job)
    kept = _KeptJob(job)
    if kept.goes_on_with_its_data():
        refuse_changed(job.store_path, data)
    members = load_teachers(job, device) if teachers is None else computing(teachers, job.run)
    maker = row_maker(job, data)
    plan, encoding = plan_job(job, data, members, device, encoding=kept.encoding(), maker=maker)
    writer = StoreWriter.create(job.store_path, plan, table=maker.table, encoding=encoding)
    note_files(job.store_path, data)
    kept.write(writer)
    if writer.missing_shards():
        plain_pass = DevicePass(plan, maker, members, encoding=encoding, lanes=Lanes(device))
        _compute(job, writer, maker, plain_pass, kept, show=show, metrics=metrics)
    if writer.missing_shards():
        return plan
    if not writer.finished:
        refuse_changed(job.store_path, data)
    return writer.finish()


def resume(where: Path, *, show: ShowProgress = track, metrics: Path | None = None) -> Manifest:
    """Go on with the store that an earlier `precompute` began at `where`.

    Raises:
        UnknownStoreError: nothing was begun there; and all that `precompute` raises.
    """
    path = Path(where) / JOB
    if not path.is_file():
        raise UnknownStoreError(f"nothing to resume at {where}: it has no {JOB}; start with `softlabels precompute`")
    document = open_sealed(path.read_bytes(), what=str(path))
    document.pop(FOUND, None)
    base = Path(document.pop("base"))
    job = job_from_json(document, base=base, what=str(path))
    return precompute(_at(job, Path(where)), show=show, metrics=metrics)


def _compute(
    job: Job,
    writer: StoreWriter,
    maker: RowMaker,
    plain_pass: DevicePass,
    kept: _KeptJob,
    *,
    show: ShowProgress,
    metrics: Path | None,
) -> None:
    """Compute the shards that are missing, with the batch size that the job or an earlier run of it says."""
    plan, missing = writer.plan, writer.missing_shards()
    done = plan.rows - sum(len(shard_rows(plan, shard)) for shard in missing)
    unit = "samples" if plan.layout.kind == "single" else "rows"
    with ExitStack() as stack:
        told = (
            None if metrics is None else stack.enter_context(Metrics(metrics, plan, done=done, lanes=plain_pass.lanes))
        )
        progress = stack.enter_context(show(plan.rows, f"precompute {plan.name}", unit, done=done))

        def keep_batch_size(size: int) -> None:
            kept.batch_size = size
            kept.write(writer)

        if kept.batch_size is None:
            keep_batch_size(find_batch_size(plain_pass, maker, limit_gib=job.run.memory_limit_gib))
            progress.note(f"batches of {kept.batch_size}")
        assert kept.batch_size is not None
        compute_shards(
            writer,
            maker,
            plain_pass.by(compiled(plain_pass.teachers, job.run)),
            missing,
            batch_size=kept.batch_size,
            loaders=job.run.loaders,
            progress=progress,
            committed=None if told is None else told.committed,
            halved=keep_batch_size,
        )


class _KeptJob:
    """The job as it is kept in its store, and what earlier runs of it found out.

    Attributes:
        batch_size: of the run; None where the job asks for the best one and no run has found it yet.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        path = job.store_path / JOB
        begun = path.is_file() and (job.store_path / PLAN).is_file()
        self._before: dict[str, Any] = open_sealed(path.read_bytes(), what=str(path)) if begun else {}
        asked = job.run.batch_size
        self.batch_size = asked if isinstance(asked, int) else None
        if self._before.get("run", {}).get("batch_size") == asked:
            # The same batches as before: kernels round differently for another size.
            self.batch_size = self._before.get(FOUND, {}).get("batch_size", self.batch_size)

    def goes_on_with_its_data(self) -> bool:
        """Whether the job was begun before, with this transfer set, and is not finished: then that may not change."""
        same = self._before.get("transfer_set") == self._job.to_json()["transfer_set"]
        return same and not (self._job.store_path / MANIFEST).exists()

    def encoding(self) -> Encoding | None:
        """The encoding of the store that this very job began, so that a resumed run learns nothing anew; else None."""
        if self._before.get("targets") != self._job.to_json()["targets"]:
            return None
        return load_encoding(self._job.store_path, load_plan(self._job.store_path))

    def write(self, writer: StoreWriter) -> None:
        """Keep the job, and what was found out, beside the plan."""
        found = {} if self.batch_size in (None, self._job.run.batch_size) else {"batch_size": self.batch_size}
        writer.keep_job({**self._job.to_json(), **({FOUND: found} if found else {})})


def _at(job: Job, where: Path) -> Job:
    resolved = str(where.resolve())
    return replace(job, store=replace(job.store, path=resolved, name=store_name(job)))
