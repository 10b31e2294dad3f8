"""What will a job cost? Bytes, hours and the error of every encoding, measured on a pilot of real rows.

Hours are what loading, teachers, mean, encoding and audit took on the pilot, a row, one after the other, times the
rows: where a device encodes beside its next forward pass, a run takes less.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray

from softlabels.audit import Audit
from softlabels.encodings import Encoding, RowKind, TopK, rng_keys, row_bytes
from softlabels.encodings.sampled import sampled_within
from softlabels.encodings.selection import EncodingTrial, choose_encoding
from softlabels.errors import EncodingError, TeacherError
from softlabels.manifest import SAMPLE_ARRAYS, Manifest
from softlabels.precompute.hidden_states import encoding_of_head
from softlabels.precompute.job import Job
from softlabels.precompute.pipeline.device_step import audited, pack_figures
from softlabels.precompute.pipeline.inference import ask, audit_temperatures, averaged
from softlabels.precompute.planning.prepared_job import (
    choose_device,
    load_teachers,
    load_transfer_set,
    pilot,
    plan_job,
    row_maker,
)
from softlabels.precompute.row_batches import RowMaker
from softlabels.precompute.teachers import Teacher
from softlabels.softmath import soften
from softlabels.store.chunks import choose_rows_per_chunk
from softlabels.transfer_set import FINGERPRINT_BYTES

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
        fact_bytes=sum(spec.row_bytes for name, spec in own_plan.arrays.items() if name in SAMPLE_ARRAYS),
        sample_bytes=_sample_bytes(own_plan),
        input_bytes=own_plan.arrays["inputs"].row_bytes if "inputs" in own_plan.arrays else 0,
        rows_per_chunk=job.store.rows_per_chunk,
    )


def _sample_bytes(plan: Manifest) -> int:
    """Kept once a sample: the id index where ids do not count up, and what sequences keep in place of a row's facts."""
    ids = 0 if plan.ids.dense_start is not None else _OFFSET_BYTES + (plan.ids.width_bytes or _OFFSET_BYTES)
    return ids + (_OFFSET_BYTES + FINGERPRINT_BYTES if plan.layout.kind == "sequences" else 0)


# MERGED from softlabels.precompute.planning.forecast: How much time and error is there in an encoding, on a few real rows? What `softlabels plan` reckons with.
#
# Legend: R rows of the pilot, C classes, D width of hidden states.


MANY_CLASSES = 1 << 12
"""From here on `topk` and `sampled` of a few small sizes are tried: rows of all classes are too large for most."""

_SMALL_SIZES = (64, 128, 256, 512)
"""Bytes a row at which they are tried."""

_FEW_ROWS = 48
"""Rows that are then encoded in the thirty or so ways that keep all classes: too few to learn a basis from, which at so
many classes would take minutes."""

_BLOCK_ENTRIES = 1 << 22
"""Rows x classes that are audited at once."""

_TEACHERS_S = 1.0
"""The teachers are asked for so long, after a first batch that warms up."""

_ENCODING_S = 0.03
_ENCODED_ROWS = 64
"""Rows that the time of an encoding is measured on, and the error of those that `choose_encoding` does not try."""

_SHOWN = ("head", "k", "tail", "residual_bits", "draws", "kept_as")


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to keep the rows.

    Attributes:
        label: the encoding and its parameters, short.
        row_bytes: bytes a row and member. constant_bytes: what is kept once for the store.
        kl: figures (mean, p99, max; nats) by temperature; none at temperatures that it cannot be had at.
        top1_agreement: share of rows whose largest class stayed the largest.
        rms_error: root of the mean squared error of a gradient, at the temperature that is captured.
        row_s: seconds a row, teachers, mean, encoding and audit one after the other.
    """

    label: str
    row_bytes: int
    constant_bytes: int
    kl: Mapping[float, Mapping[str, float]]
    top1_agreement: float
    rms_error: float
    row_s: float


class Measuring:
    """Measures what a job's teachers and encodings take and lose.

    Args:
        job: which is planned.
        plan: of the same job with rows kept as float32, or what its arithmetic mean is kept as.
        maker, teachers: of the job. device: that it runs on.
    Attributes:
        temperatures: at which errors are measured.
        teachers_s: seconds a row takes to load, to be answered by all teachers, and to be averaged.
    """

    def __init__(
        self, job: Job, plan: Manifest, maker: RowMaker, teachers: Sequence[Teacher], device: torch.device
    ) -> None:
        self._job, self._plan, self._maker, self._device = job, plan, maker, device
        self._teachers, self._members = list(teachers), plan.members or 1
        self.temperatures = audit_temperatures(plan)
        self.teachers_s = self._asking_s(row_kind="logits")
        self._states_s: float | None = None

    def options(self, rows_RC: NDArray[np.float32]) -> Iterator[Option]:
        """Every way to keep these rows, tempered as the plan captures them."""
        captured, classes = self._plan.temperature.captured, rows_RC.shape[1]
        few = rows_RC[:_FEW_ROWS] if classes >= MANY_CLASSES else rows_RC
        relative = tuple(t / captured for t in self.temperatures)
        choice = choose_encoding(few, budget_kl=np.inf, temperatures=relative, locked=self._plan.temperature.locked)
        yield from (self._tried(tried, rows_RC) for tried in choice.table)
        if classes >= MANY_CLASSES:
            known = {_label(tried.encoding) for tried in choice.table}
            yield from (self.option(each, rows_RC) for each in self._small(rows_RC) if _label(each) not in known)
        for kept_as in ("f16", "q8"):
            encoding = self._of_hidden_states(kept_as)
            if encoding is not None:
                yield self.option(encoding, rows_RC)

    def _tried(self, tried: EncodingTrial, rows_RC: NDArray[np.float32]) -> Option:
        """What has its errors already, with its time."""
        captured = self._plan.temperature.captured
        encoding_s = self._encoding_s(tried.encoding, rows_RC[:_ENCODED_ROWS], self.temperatures, captured)
        return Option(
            label=_label(tried.encoding),
            row_bytes=tried.row_bytes,
            constant_bytes=_constant_bytes(tried.encoding),
            kl={t * captured: figures for t, figures in tried.kl.items()},
            top1_agreement=tried.top1_agreement,
            rms_error=tried.rms_error,
            row_s=self.teachers_s + encoding_s * self._members,
        )

    def option(self, encoding: Encoding, rows_RC: NDArray[np.float32], *, as_in_a_run: bool = False) -> Option:
        """What an encoding takes and loses; `as_in_a_run` times it on as many rows as a forward pass gives.

        Large arrays take longer a row than small ones, which stay in a processor's caches.
        """
        spec = self._plan.temperature
        degree = spec.captured if encoding.retemperable else spec.default
        temperatures = self.temperatures if encoding.retemperable else (degree,)
        if encoding.row_kind == "hidden_states":
            given, asking_s = self._hidden_rows(encoding.classes), self._asking_states_s()
        else:
            given, asking_s = rows_RC * np.float32(spec.captured / degree), self.teachers_s
        exact_RC = encoding.logits_of(given)
        summary = _audited(encoding, given[:_ENCODED_ROWS], exact_RC[:_ENCODED_ROWS], temperatures, degree)
        timed = given[: self._rows_of_a_pass(encoding.classes) if as_in_a_run else _ENCODED_ROWS]
        encoding_s = self._encoding_s(encoding, timed, temperatures, degree)
        without_bound: dict[str, float] = dict.fromkeys(("mean", "p99", "max"), np.inf)
        infinite = {float(t): without_bound for t in summary["infinite_kl_rows"]}
        return Option(
            label=_label(encoding),
            row_bytes=row_bytes(encoding),
            constant_bytes=_constant_bytes(encoding),
            kl={float(t): figures for t, figures in summary["kl_nats"].items()} | infinite,
            top1_agreement=summary["top1_agreement"],
            rms_error=summary["gradient"]["rms_error"],
            row_s=asking_s + encoding_s * self._members,
        )

    def _rows_of_a_pass(self, classes: int) -> int:
        sequences = self._job.sequences
        rows = self._job.run.pilot_batch_size if sequences is None else sequences.positions_per_pass
        return max(_ENCODED_ROWS, min(rows, 2 * _BLOCK_ENTRIES // classes))

    def _small(self, rows_RC: NDArray[np.float32]) -> Iterator[Encoding]:
        """What keeps few of many classes, at the temperature of the job."""
        spec, classes = self._plan.temperature, rows_RC.shape[1]
        logits_RC = rows_RC[:_ENCODED_ROWS].astype(np.float64)
        p_RC = soften(logits_RC, temperature=spec.default / spec.captured).astype(np.float64)
        for size in _SMALL_SIZES:
            k = min(classes, (size - 4) // (4 if classes <= 1 << 16 else 6))
            yield TopK(classes=classes, k=k)
            yield sampled_within(size, classes=classes, p_BC=p_RC)

    def _of_hidden_states(self, kept_as: str) -> Encoding | None:
        """Hidden states of the only teacher, where its head is known and makes its logits."""
        if len(self._teachers) > 1:
            return None
        batch = next(self._batches())
        try:
            (hidden_RD,) = ask(self._teachers, batch, self._maker, self._device, row_kind="hidden_states")
            (logits_RC,) = ask(self._teachers, batch, self._maker, self._device)
            return encoding_of_head(self._teachers[0], {"kept_as": kept_as}, logits_RC=logits_RC, hidden_RD=hidden_RD)
        except TeacherError:
            return None  # no head, or something behind it: then it is no option

    def _hidden_rows(self, classes: int) -> NDArray[np.float32]:
        """Hidden states of a batch."""
        batch = next(self._batches())
        (hidden_RD,) = ask(self._teachers, batch, self._maker, self._device, row_kind="hidden_states")
        hidden: NDArray[np.float32] = hidden_RD[: self._rows_of_a_pass(classes)].cpu().numpy()
        return hidden

    def _asking_states_s(self) -> float:
        if self._states_s is None:
            self._states_s = self._asking_s(row_kind="hidden_states")
        return self._states_s

    def _asking_s(self, *, row_kind: RowKind) -> float:
        """Seconds a row, of batches as the run has them."""
        rows, began_s, spent_s, first = 0, time.perf_counter(), 0.0, 0.0
        for number, batch in enumerate(self._batches()):
            answers = ask(self._teachers, batch, self._maker, self._device, row_kind=row_kind)
            if row_kind == "logits":
                averaged(answers, self._teachers, self._plan.mean, self._plan.temperature.default)
            _wait(self._device)
            now_s = time.perf_counter()
            if number == 0:  # it warms up; it counts where there is no other
                first, began_s = (now_s - began_s) / batch.rows, now_s
                continue
            rows, spent_s = rows + batch.rows, now_s - began_s
            if spent_s > _TEACHERS_S:
                break
        return spent_s / rows if rows else first

    def _encoding_s(
        self, encoding: Encoding, given: NDArray[np.float32], temperatures: tuple[float, ...], captured: float
    ) -> float:
        """Seconds a row of encoding and audit, on the job's device."""
        rows = torch.from_numpy(np.ascontiguousarray(given)).to(self._device)
        keys = rng_keys("plan", np.arange(len(given)))
        chosen = audited(0, len(given), encoding.classes)

        def once() -> None:
            encoded = encoding.encode_torch(rows, keys_B=keys)
            exact = encoding.logits_of_torch(rows[chosen])
            some = {name: array[chosen].contiguous() for name, array in encoded.items()}
            pack_figures(exact, encoding.decode_torch(some), temperatures=temperatures, captured=captured).cpu()

        try:
            return _repeated_s(once) / len(given)
        except EncodingError:
            return 0.0  # refused, as its error says

    def _batches(self) -> Iterator[Any]:
        """Of samples from all over the set."""
        samples = self._maker.layout.samples
        table = self._maker.table
        there = np.arange(samples) if table is None else np.flatnonzero(table.lengths)
        spread = np.unique(np.linspace(0, len(there) - 1, min(len(there), 1 << 14)).astype(np.int64))
        return self._maker.samples(there[spread], self._job.run.pilot_batch_size)


def _label(encoding: Encoding) -> str:
    """Name and parameters, short."""
    return " ".join([encoding.name, *(f"{key}={value}" for key, value in encoding.params.items() if key in _SHOWN)])


def _constant_bytes(encoding: Encoding) -> int:
    return sum(array.nbytes for array in encoding.constants.values())


def _audited(
    encoding: Encoding,
    given: NDArray[np.float32],
    exact_RC: NDArray[np.floating[Any]],
    temperatures: tuple[float, ...],
    captured: float,
) -> dict[str, Any]:
    """The audit's figures of these rows; infinite everywhere where the encoding refuses one of them."""
    audit = Audit(temperatures)
    step = max(1, _BLOCK_ENTRIES // exact_RC.shape[1])
    try:
        for start in range(0, len(given), step):
            part = slice(start, start + step)
            encoded = encoding.encode(given[part], keys_B=rng_keys("plan", np.arange(len(given[part])) + start))
            audit.add(
                exact_RC[part], encoding.decode(encoded), captured=captured, dropped_mass_B=encoded.get("tail_mass")
            )
    except EncodingError:
        return {**Audit().summary(), "infinite_kl_rows": {f"{t:g}": len(given) for t in temperatures}}
    return audit.summary()


def _repeated_s(work: Callable[[], None]) -> float:
    work()
    began_s, times = time.perf_counter(), 0
    while (spent_s := time.perf_counter() - began_s) < _ENCODING_S:
        work()
        times += 1
    return spent_s / max(1, times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
