"""What will a job cost? Bytes, hours and the error of every encoding, measured on a pilot of real rows.

Hours are what loading, teachers, mean, encoding and audit took on the pilot, a row, one after the other, times the
rows: where a device encodes beside its next forward pass, a run takes less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from softlabels.manifest import ROW_FACTS, Manifest
from softlabels.precompute.job import Job
from softlabels.precompute.measuring import Measuring, Option
from softlabels.precompute.planning import choose_device, load_teachers, load_transfer_set, pilot, plan_job, row_maker
from softlabels.store.geometry import choose_rows_per_chunk
from softlabels.transfer import FINGERPRINT_BYTES

MOST_PILOT_ENTRIES = 1 << 24
"""Rows × classes of the pilot: encoding it every way takes a minute or so."""

MOST_PILOT_ROWS = 2048
_OFFSET_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a job will cost.

    Attributes:
        samples, rows, classes: of the whole job.
        members: rows kept a row, where every teacher's own is kept; else 1.
        pilot_rows: rows that were measured.
        rows_per_s: through loading, all teachers and their mean, on this machine.
        temperatures: at which errors were measured.
        options: every encoding that was tried, smallest first.
        own: the name of what the job itself asks for, and what it costs.
        fact_bytes: kept a row beside its targets. sample_bytes: kept a sample in files of their own.
        input_bytes: of a sample that is kept beside its targets; 0 where none is.
        rows_per_chunk: as the job says; None where that follows from the rows' size.
    """

    samples: int
    rows: int
    classes: int
    members: int
    pilot_rows: int
    rows_per_s: float
    temperatures: tuple[float, ...]
    options: Sequence[Option]
    own: tuple[str, Option]
    fact_bytes: int
    sample_bytes: int
    input_bytes: int = 0
    rows_per_chunk: int | None = None

    @property
    def teacher_hours(self) -> float:
        """How long loading and teachers take on this machine."""
        return self.rows / self.rows_per_s / 3600

    def hours(self, option: Option) -> float:
        """How long the whole job takes on this machine."""
        return self.rows * option.row_s / 3600

    def store_bytes(self, option: Option) -> int:
        """Size of the store; its last chunk is as long as the others."""
        row_bytes = option.row_bytes * self.members
        a_chunk = self.rows_per_chunk or choose_rows_per_chunk(row_bytes)
        rows = -(-self.rows // a_chunk) * a_chunk
        return rows * (row_bytes + self.fact_bytes) + self.samples * self.sample_bytes + option.constant_bytes


def forecast(job: Job, *, samples: int | None = None, rows: int | None = None) -> Forecast:
    """Run a pilot and reckon the whole job from it.

    Args:
        job: what is to be run; its store is neither read nor made.
        samples, rows: of the whole job, where the transfer set at hand is only a part of it; one of them at most.
    Raises:
        JobError, TeacherError: as `precompute` would.
    """
    device = choose_device(job.run.device)
    data, teachers = load_transfer_set(job), load_teachers(job, device)
    maker = row_maker(job, data)
    own_plan, own = plan_job(job, data, teachers, device, maker=maker)
    plain = replace(job, targets=replace(job.targets, encoding="f32"))
    plan, _ = plan_job(plain, data, teachers, device, maker=maker)
    measuring = Measuring(job, plan, maker, teachers, device)
    wanted = max(64, min(MOST_PILOT_ROWS, MOST_PILOT_ENTRIES // plan.classes, maker.layout.rows))
    rows_RC = pilot(plain, data, maker, teachers, plan.mean, plan.temperature, device, rows=wanted)
    rows_a_sample = maker.layout.rows / maker.layout.samples
    if rows is not None:
        samples = max(1, round(rows / rows_a_sample))
    whole = maker.layout.samples if samples is None else samples
    return Forecast(
        samples=whole,
        rows=round(whole * rows_a_sample) if rows is None else rows,
        classes=plan.classes,
        members=own_plan.members or 1,
        pilot_rows=len(rows_RC),
        rows_per_s=1 / measuring.teachers_s,
        temperatures=measuring.temperatures,
        options=tuple(sorted(measuring.options(rows_RC), key=lambda option: (option.row_bytes, option.rms_error))),
        own=(own.name, measuring.option(own, rows_RC, as_in_a_run=True)),
        fact_bytes=sum(spec.row_bytes for name, spec in own_plan.arrays.items() if name in ROW_FACTS),
        sample_bytes=_sample_bytes(own_plan),
        input_bytes=own_plan.arrays["inputs"].row_bytes if "inputs" in own_plan.arrays else 0,
        rows_per_chunk=job.store.rows_per_chunk,
    )


def _sample_bytes(plan: Manifest) -> int:
    """Kept once a sample: the id index where ids do not count up, and what sequences keep in place of a row's facts."""
    ids = 0 if plan.ids.dense_start is not None else _OFFSET_BYTES + (plan.ids.width_bytes or _OFFSET_BYTES)
    return ids + (_OFFSET_BYTES + FINGERPRINT_BYTES if plan.layout.kind == "sequences" else 0)
