"""The forecast of a job: bytes, hours and error of every encoding, measured on a pilot of real rows.

Hours are the time of loading, teachers, mean, encoding and audit per row of the pilot, one after the other, times the
rows; a device that encodes beside its next forward pass takes less.

Legend: R rows of the pilot, C classes, D width of hidden states.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from softlabels.audit import Audit
from softlabels.encodings import Encoding, RowKind, TopK, encoding_label, rng_keys, row_bytes
from softlabels.encodings.sampled import sampled_within
from softlabels.encodings.selection import EncodingTrial, choose_encoding
from softlabels.errors import EncodingError, TeacherError
from softlabels.manifest import SAMPLE_ARRAYS
from softlabels.precompute.checks.teacher_checks import encoding_of_head
from softlabels.precompute.job import Job
from softlabels.precompute.pipeline.device_step import audited_rows, pack_figures
from softlabels.precompute.pipeline.inference import audit_temperatures
from softlabels.precompute.planning.prepared_job import PlannedJob, plan_job, prepare_job
from softlabels.precompute.row_batches import RowBatch
from softlabels.softmath import soften
from softlabels.store.chunks import choose_rows_per_chunk
from softlabels.transfer_set import FINGERPRINT_BYTES

MOST_PILOT_ENTRIES = 1 << 24
"""Rows × classes of the pilot: encoding it in every way takes about a minute."""

MOST_PILOT_ROWS = 2048
_OFFSET_BYTES = 8

MANY_CLASSES = 1 << 12
"""From here on `topk` and `sampled` are tried at `_SMALL_SIZES` too: rows of all classes are too large for most."""

_SMALL_SIZES = (64, 128, 256, 512)
"""Bytes per row."""

_FEW_ROWS = 48
"""Rows of many classes that are encoded in the thirty or so ways that keep all classes: too few to learn a basis from,
which would take minutes."""

_BLOCK_ENTRIES = 1 << 22
"""Rows × classes that are audited at once."""

_TEACHERS_S = 1.0
"""How long the teachers are timed, after a first batch as a warm-up."""

_ENCODING_S = 0.03
"""How long an encoding is timed, after a first call as a warm-up."""

_ENCODED_ROWS = 64
"""Rows on which an encoding is timed, and audited where `choose_encoding` has not done that."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to encode the rows, and its cost.

    Attributes:
        row_bytes: bytes per row and member. constant_bytes: bytes stored once.
        kl: mean, p99 and max in nats by temperature; none at temperatures that the encoding does not serve.
        rms_error: root mean square error of a gradient entry, at the captured temperature.
        row_s: seconds per row: teachers, mean, encoding and audit one after the other.
    """

    label: str
    row_bytes: int
    constant_bytes: int
    kl: Mapping[float, Mapping[str, float]]
    top1_agreement: float
    rms_error: float
    row_s: float


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The cost of a job.

    Attributes:
        samples, rows: sizes of the whole job.
        members: rows stored per row, where every teacher's own is kept; else 1.
        pilot_rows: rows that were measured.
        rows_per_s: rate of loading, all teachers and their mean, on this machine.
        options: every encoding that was tried, smallest first, with errors at `temperatures`.
        own: name and cost of the job's own encoding.
        fact_bytes: bytes per row beside its targets. sample_bytes: bytes per sample in files of their own.
        input_bytes: bytes per sample of stored inputs; 0 where none are.
        rows_per_chunk: as the job says; None where it follows from the rows' size.
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
        """Return the hours of loading and teachers on this machine."""
        return self.rows / self.rows_per_s / 3600

    def hours(self, option: Option) -> float:
        """Return the hours of the whole job on this machine."""
        return self.rows * option.row_s / 3600

    def store_bytes(self, option: Option) -> int:
        """Return the size of the store; its last chunk is as long as the others."""
        row_bytes = option.row_bytes * self.members
        per_chunk = self.rows_per_chunk or choose_rows_per_chunk(row_bytes)
        rows = -(-self.rows // per_chunk) * per_chunk
        return rows * (row_bytes + self.fact_bytes) + self.samples * self.sample_bytes + option.constant_bytes


def forecast(job: Job, *, samples: int | None = None, rows: int | None = None) -> Forecast:
    """Run a pilot and estimate the whole job from it.

    Args:
        job: job to estimate; its store is neither read nor written.
        samples, rows: size of the whole job, where the transfer set at hand is only a part; at most one of them.
    Raises:
        JobError, TeacherError: as `precompute` would.
    """
    prepared = prepare_job(job)
    own, exact = plan_job(prepared), plan_job(prepared, requested="f32")
    layout, plan = prepared.rows.layout, own.plan
    measuring = EncodingBenchmark(exact)
    wanted = max(64, min(MOST_PILOT_ROWS, MOST_PILOT_ENTRIES // plan.classes, layout.rows))
    rows_RC = prepared.pilot(exact.plan.temperature, rows=wanted)
    rows_per_sample = layout.rows / layout.samples
    if rows is not None:
        samples = max(1, round(rows / rows_per_sample))
    whole = layout.samples if samples is None else samples
    ids = 0 if plan.ids.dense_start is not None else _OFFSET_BYTES + (plan.ids.width_bytes or _OFFSET_BYTES)
    return Forecast(
        samples=whole,
        rows=round(whole * rows_per_sample) if rows is None else rows,
        classes=plan.classes,
        members=plan.members or 1,
        pilot_rows=len(rows_RC),
        rows_per_s=1 / measuring.teachers_s,
        temperatures=measuring.temperatures,
        options=tuple(sorted(measuring.options(rows_RC), key=lambda option: (option.row_bytes, option.rms_error))),
        own=(own.encoding.name, measuring.option(own.encoding, rows_RC, as_in_a_run=True)),
        fact_bytes=sum(spec.row_bytes for name, spec in plan.arrays.items() if name in SAMPLE_ARRAYS),
        sample_bytes=ids + (_OFFSET_BYTES + FINGERPRINT_BYTES if plan.layout.kind == "sequences" else 0),
        input_bytes=plan.arrays["inputs"].row_bytes if "inputs" in plan.arrays else 0,
        rows_per_chunk=job.store.rows_per_chunk,
    )


class EncodingBenchmark:
    """Measures the time and error of a job's teachers and encodings.

    Args:
        exact: the job, planned with rows as float32.
    Attributes:
        temperatures: temperatures at which errors are measured.
        teachers_s: seconds per row to load, run all teachers, and average.
    """

    def __init__(self, exact: PlannedJob) -> None:
        self._job, self._plan = exact.prepared.job, exact.plan
        self._ensemble, self._members = exact.prepared.ensemble, exact.plan.members or 1
        self.temperatures = audit_temperatures(exact.plan)
        self.teachers_s = self._time_teachers("logits")

    @cached_property
    def _hidden_s(self) -> float:
        return self._time_teachers("hidden_states")

    def options(self, rows_RC: NDArray[np.float32]) -> Iterator[Option]:
        """Yield every way to encode these rows, tempered as the plan captures them."""
        captured, classes = self._plan.temperature.captured, rows_RC.shape[1]
        few = rows_RC[:_FEW_ROWS] if classes >= MANY_CLASSES else rows_RC
        relative = tuple(t / captured for t in self.temperatures)
        choice = choose_encoding(few, budget_kl=np.inf, temperatures=relative, locked=self._plan.temperature.locked)
        yield from (self._from_trial(trial, rows_RC) for trial in choice.table)
        if classes >= MANY_CLASSES:
            known = {encoding_label(trial.encoding) for trial in choice.table}
            small = self._small_encodings(rows_RC)
            yield from (self.option(encoding, rows_RC) for encoding in small if encoding_label(encoding) not in known)
        for kept_as in ("f16", "q8"):
            encoding = self._hidden_encoding(kept_as)
            if encoding is not None:
                yield self.option(encoding, rows_RC)

    def option(self, encoding: Encoding, rows_RC: NDArray[np.float32], *, as_in_a_run: bool = False) -> Option:
        """Return the cost of an encoding of these rows, tempered as the plan captures them.

        Args:
            as_in_a_run: time it on as many rows as a forward pass gives: large arrays take longer per row than small
                ones, which stay in a processor's caches.
        """
        spec = self._plan.temperature
        captured = spec.captured if encoding.retemperable else spec.default
        temperatures = self.temperatures if encoding.retemperable else (captured,)
        if encoding.row_kind == "hidden_states":
            (hidden_RD,) = self._ensemble.run(next(self._batches()), row_kind="hidden_states")
            given, teachers_s = hidden_RD.cpu().numpy(), self._hidden_s
        else:
            given, teachers_s = rows_RC * np.float32(spec.captured / captured), self.teachers_s
        summary = _audit(encoding, given[:_ENCODED_ROWS], temperatures, captured)
        timed = given[: self._rows_per_pass(encoding.classes) if as_in_a_run else _ENCODED_ROWS]
        encoding_s = self._time_encoding(encoding, timed, temperatures, captured)
        infinite: dict[str, float] = dict.fromkeys(("mean", "p99", "max"), np.inf)
        unbounded = {float(t): infinite for t in summary["infinite_kl_rows"]}
        return _option(
            encoding,
            kl={float(t): figures for t, figures in summary["kl_nats"].items()} | unbounded,
            top1_agreement=summary["top1_agreement"],
            rms_error=summary["gradient"]["rms_error"],
            row_s=teachers_s + encoding_s * self._members,
        )

    def _from_trial(self, trial: EncodingTrial, rows_RC: NDArray[np.float32]) -> Option:
        """Return the cost of an encoding whose error `choose_encoding` has measured."""
        captured = self._plan.temperature.captured
        encoding_s = self._time_encoding(trial.encoding, rows_RC[:_ENCODED_ROWS], self.temperatures, captured)
        return _option(
            trial.encoding,
            kl={t * captured: figures for t, figures in trial.kl.items()},
            top1_agreement=trial.top1_agreement,
            rms_error=trial.rms_error,
            row_s=self.teachers_s + encoding_s * self._members,
        )

    def _rows_per_pass(self, classes: int) -> int:
        sequences = self._job.sequences
        rows = self._job.run.pilot_batch_size if sequences is None else sequences.positions_per_pass
        return max(_ENCODED_ROWS, min(rows, 2 * _BLOCK_ENTRIES // classes))

    def _small_encodings(self, rows_RC: NDArray[np.float32]) -> Iterator[Encoding]:
        """Yield encodings that keep few of many classes, at the temperature of the job."""
        spec, classes = self._plan.temperature, rows_RC.shape[1]
        logits_RC = rows_RC[:_ENCODED_ROWS].astype(np.float64)
        p_RC = soften(logits_RC, temperature=spec.default / spec.captured).astype(np.float64)
        for size in _SMALL_SIZES:
            k = min(classes, (size - 4) // (4 if classes <= 1 << 16 else 6))
            yield TopK(classes=classes, k=k)
            yield sampled_within(size, classes=classes, p_BC=p_RC)

    def _hidden_encoding(self, kept_as: str) -> Encoding | None:
        """Return the hidden-states encoding of the only teacher, or None where its head does not give its logits."""
        if len(self._ensemble.teachers) > 1:
            return None
        batch, teacher = next(self._batches()), self._ensemble.teachers[0]
        try:
            (hidden_RD,) = self._ensemble.run(batch, row_kind="hidden_states")
            (logits_RC,) = self._ensemble.run(batch)
            return encoding_of_head(teacher, {"kept_as": kept_as}, logits_RC=logits_RC, hidden_RD=hidden_RD)
        except TeacherError:
            return None

    def _time_teachers(self, row_kind: RowKind) -> float:
        """Return seconds per row, in batches as the run has them."""
        rows, began_s, spent_s, first_s = 0, time.perf_counter(), 0.0, 0.0
        for number, batch in enumerate(self._batches()):
            outputs = self._ensemble.run(batch, row_kind=row_kind)
            if row_kind == "logits":
                self._ensemble.mean(outputs, self._plan.mean, self._plan.temperature.default)
            if self._ensemble.device.type == "cuda":
                torch.cuda.synchronize(self._ensemble.device)
            now_s = time.perf_counter()
            if number == 0:  # the warm-up counts only where there is no other batch
                first_s, began_s = (now_s - began_s) / batch.rows, now_s
                continue
            rows, spent_s = rows + batch.rows, now_s - began_s
            if spent_s > _TEACHERS_S:
                break
        return spent_s / rows if rows else first_s

    def _time_encoding(
        self, encoding: Encoding, given: NDArray[np.float32], temperatures: tuple[float, ...], captured: float
    ) -> float:
        """Return seconds per row of encoding and audit, on the job's device; 0 where the encoding refuses a row."""
        rows = torch.from_numpy(np.ascontiguousarray(given)).to(self._ensemble.device)
        keys = rng_keys("plan", np.arange(len(given)))
        chosen = audited_rows(0, len(given), encoding.classes)

        def once() -> None:
            encoded = encoding.encode_torch(rows, keys_B=keys)
            exact = encoding.logits_of_torch(rows[chosen])
            some = {name: array[chosen].contiguous() for name, array in encoded.items()}
            pack_figures(exact, encoding.decode_torch(some), temperatures=temperatures, captured=captured).cpu()

        try:
            once()
            began_s, times = time.perf_counter(), 0
            while (spent_s := time.perf_counter() - began_s) < _ENCODING_S:
                once()
                times += 1
        except EncodingError:
            return 0.0
        return spent_s / max(1, times) / len(given)

    def _batches(self) -> Iterator[RowBatch]:
        positions = self._ensemble.rows.spread_positions(1 << 14)
        return self._ensemble.rows.samples(positions, self._job.run.pilot_batch_size)


def _option(encoding: Encoding, **cost: Any) -> Option:
    constant_bytes = sum(array.nbytes for array in encoding.constants.values())
    return Option(label=encoding_label(encoding), row_bytes=row_bytes(encoding), constant_bytes=constant_bytes, **cost)


def _audit(
    encoding: Encoding, given: NDArray[np.float32], temperatures: tuple[float, ...], captured: float
) -> dict[str, Any]:
    """Return the audit's figures of these rows; infinite everywhere where the encoding refuses one of them."""
    audit = Audit(temperatures)
    keys, step = rng_keys("plan", np.arange(len(given))), max(1, _BLOCK_ENTRIES // encoding.classes)
    try:
        for start in range(0, len(given), step):
            part = slice(start, start + step)
            exact_RC, encoded = encoding.logits_of(given[part]), encoding.encode(given[part], keys_B=keys[part])
            decoded_RC, dropped = encoding.decode(encoded), encoded.get("tail_mass")
            audit.add(exact_RC, decoded_RC, captured=captured, dropped_mass_B=dropped)
    except EncodingError:
        return {**Audit().summary(), "infinite_kl_rows": {f"{t:g}": len(given) for t in temperatures}}
    return audit.summary()
