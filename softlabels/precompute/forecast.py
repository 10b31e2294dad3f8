"""What will a job cost? Bytes, hours and the error of every encoding, measured on a pilot of real rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from softlabels.encodings.auto import Tried, choose_encoding
from softlabels.manifest import MeanKind, TemperatureSpec
from softlabels.precompute.job import Job
from softlabels.precompute.planning import choose_device, load_teachers, load_transfer_set, pilot, plan_job, row_maker
from softlabels.softmath import check_temperature

MOST_PILOT_ENTRIES = 1 << 24
"""Rows × classes of the pilot: encoding it every way takes a minute or so."""

MOST_PILOT_ROWS = 2048
FACT_BYTES = 28
"""Kept beside a row's targets: id, label and fingerprint."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a job will cost.

    Attributes:
        samples, classes: of the whole job.
        members: rows kept a sample, where every teacher's own is kept; else 1.
        pilot_rows: rows that were measured.
        samples_per_s: through all teachers on this machine.
        temperatures: at which errors were measured.
        options: every encoding that was tried, smallest first.
        encoding: what the job itself asks for, and its bytes a row.
        input_bytes: of a sample that is kept beside its targets; 0 where none is.
    """

    samples: int
    classes: int
    members: int
    pilot_rows: int
    samples_per_s: float
    temperatures: tuple[float, ...]
    options: Sequence[Tried]
    encoding: tuple[str, int]
    input_bytes: int = 0

    @property
    def hours(self) -> float:
        """How long the teachers take on this machine."""
        return self.samples / self.samples_per_s / 3600

    def store_bytes(self, row_bytes: int) -> int:
        """Size of the store with targets of this many bytes a row."""
        return self.samples * (row_bytes * self.members + FACT_BYTES + self.input_bytes)


def forecast(job: Job, *, samples: int | None = None) -> Forecast:
    """Run a pilot and reckon the whole job from it.

    Args:
        job: what is to be run; its store is neither read nor made.
        samples: of the whole job, where the transfer set at hand is only a part of it.
    Raises:
        JobError, TeacherError: as `precompute` would.
    """
    device = choose_device(job.run.device)
    data, teachers = load_transfer_set(job), load_teachers(job, device)
    temperature = check_temperature(job.targets.temperature)
    plain, _ = plan_job(replace(job, targets=replace(job.targets, encoding="f32")), data, teachers, device)
    spec: TemperatureSpec = plain.temperature
    mean: MeanKind = plain.mean
    wanted = max(64, min(MOST_PILOT_ROWS, MOST_PILOT_ENTRIES // plain.classes, len(data)))
    started_s = time.perf_counter()
    pilot_BC = pilot(job, data, row_maker(job, data), teachers, mean, spec, device, rows=wanted)
    samples_per_s = len(pilot_BC) / (time.perf_counter() - started_s)
    temperatures = (temperature,) if spec.locked else tuple(sorted({1.0, temperature}))
    relative = tuple(t / spec.captured for t in temperatures)
    choice = choose_encoding(pilot_BC, budget_kl=np.inf, temperatures=relative, locked=spec.locked)
    plan, encoding = plan_job(job, data, teachers, device)
    return Forecast(
        samples=len(data) if samples is None else samples,
        classes=plan.classes,
        members=plan.members or 1,
        pilot_rows=len(pilot_BC),
        samples_per_s=samples_per_s,
        temperatures=temperatures,
        options=tuple(
            replace(tried, kl={t * spec.captured: kl for t, kl in tried.kl.items()}) for tried in choice.table
        ),
        encoding=(encoding.name, sum(field.row_bytes for field in encoding.fields.values())),
        input_bytes=plan.arrays["inputs"].row_bytes if "inputs" in plan.arrays else 0,
    )
