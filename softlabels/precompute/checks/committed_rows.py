"""Committed rows against data and teachers as they are now, before a store is continued, merged or published.

Digests in the plan tell one data set and one teacher from another as far as a digest reaches. Whatever it misses (a
file that the model reads by itself, a library, a kernel, one sample of many) shows when the teachers are asked again
about rows that are committed: inputs must have the stored ids, labels and fingerprints, and the teachers must give the
stored targets again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from softlabels.errors import JobError, SoftLabelsError, TeacherChangedError, TransferSetChangedError
from softlabels.manifest import Manifest, TeacherSpec
from softlabels.precompute.checks.data_snapshot import check_planned
from softlabels.precompute.checks.verify_teachers import LEAST_COSINE, Comparison
from softlabels.precompute.job import load_kept_job
from softlabels.precompute.pipeline.inference import TeacherEnsemble, format_ids
from softlabels.precompute.planning.prepared_job import PreparedJob, prepare_job
from softlabels.store.chunks import shard_rows
from softlabels.store.ledger import Ledger
from softlabels.store.store_documents import JOB, load_manifest
from softlabels.store.store_reader import LocalRows

ASKED_ROWS = 64
MOST_SHARDS = 16
"""Rows and shards to ask about: a second or two of a teacher, and every shard of a store of few."""

LEAST_SOFT_COSINE = 0.999
"""As `LEAST_COSINE`, of distributions softened until no class dominates: two teachers that are both sure of one class
agree at T = 1. Lower, since rounding in half precision reaches 3e-4 there; of a shard's rows, the median counts, since
a tie at the edge of a truncated row may fall either way."""

_IDENTIFYING = ("weights_sha256", "state_sha256", "code_sha256", "preprocess_sha256", "revision")


def check_origin(begun: Manifest, now: Manifest) -> None:
    """Raise unless data and teachers have the digests of the plan that an unfinished store was begun with.

    Differences in what a job file says are left to the comparison of the plans.

    Raises:
        TransferSetChangedError, TeacherChangedError: the same names stand for other data, or another model.
    """
    if _named(begun) == _named(now):
        check_planned(begun.transfer_set, now.transfer_set.planned_sha256)
    check_teachers(begun.teachers, now.teachers)


def check_teachers(begun: Sequence[TeacherSpec], now: Sequence[TeacherSpec]) -> None:
    """Raise TeacherChangedError if teachers of the same names have other digests than when the store was begun."""
    for was, found in zip(begun, now, strict=False):
        changed = [name for name in _IDENTIFYING if getattr(was, name) not in (None, getattr(found, name))]
        if changed and (was.model, was.arguments, was.weights) == (found.model, found.arguments, found.weights):
            raise TeacherChangedError(
                f"teacher {was.name!r} is not the one that the store was begun with (another {', '.join(changed)}): "
                "rows computed so far are of another model than those still to compute. Restore its weights, code and "
                "files, or begin another store",
                teacher=was.name,
                differs=changed,
            )


def ask_teachers_again(root: Path, ensemble: TeacherEnsemble, *, batch_size: int) -> None:
    """Run the teachers again on a few committed rows of every shard, or of some of many, and compare.

    Raises:
        TransferSetChangedError: committed rows are of other samples, inputs or labels than these.
        TeacherChangedError: the teachers give other targets than those committed.
        DamageError: a committed row cannot be read.
    """
    stored = LocalRows(root)
    plan, rng = stored.manifest, np.random.default_rng()
    shards = np.array(Ledger(root, plan).committed(), dtype=np.int64)
    if len(shards) > MOST_SHARDS:
        shards = np.sort(rng.choice(shards, MOST_SHARDS, replace=False))
    try:
        for shard in shards.tolist():
            comparison, rows = Comparison(stored, ensemble), shard_rows(plan, shard)
            count = min(len(rows), -(-ASKED_ROWS // len(shards)))
            # Drawn anew each time: what one look misses, the next may find.
            start = int(rng.integers(rows.start, rows.stop - count, endpoint=True))
            for batch in ensemble.rows.batches(range(start, start + count), batch_size):
                comparison.add_numbered(batch)
            _refuse_differences(comparison, root, shard)
    finally:
        stored.close()


def ask_about_stores(stores: Sequence[Path]) -> None:
    """Ask data and teachers of the job that these stores keep about each of them, before they are united.

    Stores that keep no job were not made by one: there is nobody to ask.

    Raises:
        JobError: data or teachers cannot be loaded on this machine. TransferSetChangedError, TeacherChangedError.
    """
    prepared = _prepared_from(stores)
    if prepared is None:
        return
    for store in stores:
        plan = load_manifest(store)
        check_planned(plan.transfer_set, prepared.transfer_set.planned_sha256)
        check_teachers(plan.teachers, [teacher.spec for teacher in prepared.ensemble.teachers])
        ask_teachers_again(store, prepared.ensemble, batch_size=prepared.job.run.pilot_batch_size)


def _prepared_from(stores: Sequence[Path]) -> PreparedJob | None:
    """Return the first store's job whose data and teachers can be loaded here; None where no store keeps one."""
    error: Exception | None = None
    for store in stores:
        try:
            if (store / JOB).is_file():
                return prepare_job(load_kept_job(store))
        except (SoftLabelsError, OSError) as raised:
            error = error or raised
    if error is None:
        return None
    raise JobError(
        f"the teachers cannot be asked about the rows to unite, since their job cannot be loaded here ({error}): merge "
        "where data and teachers are, or verify each source there by `softlabels verify --against-teacher` and pass "
        "--without-teachers"
    ) from error


def _refuse_differences(comparison: Comparison, root: Path, shard: int) -> None:
    others = np.concatenate(comparison.other_inputs)
    if len(others):
        raise TransferSetChangedError(
            f"rows {format_ids(others.tolist())} of shard {shard} of {root} were computed from other samples, inputs "
            "or labels than the transfer set has now: put the data back as they were, or begin another store",
            rows=others.tolist(),
        )
    lost = np.concatenate(comparison.other_targets)
    soft = float(np.median(np.concatenate(comparison.soft_cosines)))
    if len(lost) or not soft >= LEAST_SOFT_COSINE:
        lost = lost if len(lost) else np.concatenate(comparison.numbers)
        raise TeacherChangedError(
            f"asked again about rows {format_ids(lost.tolist())} of shard {shard} of {root}, the teachers "
            f"({', '.join(teacher.spec.name for teacher in comparison.teachers)}) give other targets than those "
            f"committed (cosine below {LEAST_COSINE}, or {soft:.4f} when softened): {comparison.changed_teachers()}. "
            "Restore them, or begin another store",
            rows=lost.tolist(),
        )


def _named(plan: Manifest) -> tuple[object, ...]:
    return plan.transfer_set.name, plan.transfer_set.source, plan.transfer_set.arguments
