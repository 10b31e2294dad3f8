"""What do the teachers say of a batch, is it sound, and what of it is kept? All on the device.

Legend: R rows of a batch, C classes, M teachers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from softlabels.encodings import RowKind
from softlabels.ensemble import Combined, combine
from softlabels.errors import NonFiniteLogitsError, TeacherError, TeacherShapeError
from softlabels.ids import IdArray
from softlabels.manifest import Manifest
from softlabels.precompute.job import RunTable
from softlabels.precompute.row_batches import RowBatch, RowMaker
from softlabels.precompute.teachers import Teacher
from softlabels.softmath import Mean

_SHOWN = 5
"""How many sample ids a message spells out."""


def answers_of(
    teachers: Sequence[Teacher], inputs: Tensor, batch: RowBatch, maker: RowMaker, *, row_kind: RowKind = "logits"
) -> list[Tensor]:
    """Every teacher's rows of a batch whose inputs are on the device, [R, C] each; the device is not waited for.

    Raises:
        TeacherError: a teacher fails, or answers another number of rows. TeacherShapeError: no [rows, classes].
    """
    prepared = maker.prepare(inputs, batch)
    answers = [maker.pick(_rows_of(teacher, prepared, row_kind), batch) for teacher in teachers]
    for teacher, answer in zip(teachers, answers, strict=True):
        if answer.ndim != 2:
            raise TeacherShapeError(
                f"teacher {teacher.spec.name!r} gives shape {list(answer.shape)}: logits are [rows, classes]; have the "
                "model return one row of logits for each input, or add a [sequences] table to the job where it answers "
                "at every position"
            )
        if len(answer) != batch.rows:
            raise TeacherError(
                f"teacher {teacher.spec.name!r} answers {len(answer)} rows for {batch.rows} samples: it must give one "
                "row of logits for each"
            )
    return answers


def _rows_of(teacher: Teacher, inputs: Tensor, row_kind: RowKind) -> Tensor:
    return teacher.logits(inputs) if row_kind == "logits" else teacher.hidden(inputs).float()


def refuse_non_finite(answers: Sequence[Tensor], teachers: Sequence[Teacher], ids: IdArray) -> None:
    """Let answers without NaN and Inf pass; waits for the device, once for all teachers.

    Raises:
        NonFiniteLogitsError: with the ids of the samples, the first teacher at fault.
    """
    sound_MR = [answer.isfinite().flatten(1).all(dim=1) for answer in answers]
    if bool(torch.stack([sound_R.all() for sound_R in sound_MR]).all()):
        return
    for teacher, sound_R in zip(teachers, sound_MR, strict=True):
        sound = sound_R.cpu().numpy()
        if not sound.all():
            blamed = list(dict.fromkeys(ids[~sound].tolist()))
            raise NonFiniteLogitsError(
                f"teacher {teacher.spec.name!r} gives NaN or Inf for {len(blamed)} samples (sample ids "
                f"{listed(blamed)}): the shard is refused and nothing of it is kept; look at these inputs, or run the "
                "teacher in f32",
                teacher=teacher.spec.name,
                ids=blamed,
            )


def ask(
    teachers: Sequence[Teacher],
    batch: RowBatch,
    maker: RowMaker,
    device: torch.device,
    *,
    row_kind: RowKind = "logits",
) -> list[Tensor]:
    """Every teacher's sound rows of a batch, [R, C] each.

    Raises:
        NonFiniteLogitsError, TeacherError: as `refuse_non_finite` and `answers_of`.
    """
    inputs = host_tensor(batch.inputs).to(device)
    answers = answers_of(teachers, inputs, batch, maker, row_kind=row_kind)
    refuse_non_finite(answers, teachers, batch.ids)
    return answers


def host_tensor(inputs: NDArray[Any]) -> Tensor:
    """An array as a tensor over the same memory; copied where that may only be read, which tensors cannot express."""
    return torch.from_numpy(inputs if inputs.flags.writeable else inputs.copy())


def averaged(answers: Sequence[Tensor], teachers: Sequence[Teacher], mean: Mean, temperature: float) -> Combined:
    """The ensemble's mean of its members' answers. Raises TeacherShapeError: the members' shapes differ."""
    return combine(
        answers,
        mean=mean,
        temperature=temperature,
        weights=[teacher.spec.weight for teacher in teachers],
        names=[teacher.spec.name for teacher in teachers],
    )


def rows_to_keep(
    answers: Sequence[Tensor], teachers: Sequence[Teacher], plan: Manifest, *, row_kind: RowKind = "logits"
) -> Tensor:
    """logits tempered as the plan captures them, each row's largest 0.

    Returns:
        [R, C] of the members' mean; where every member is kept, [R · M, C] with a row's members side by side; the one
        teacher's answers as they are, [R, width], where they are hidden states.
    """
    spec = plan.temperature
    if row_kind == "hidden_states":
        return answers[0]
    if plan.members is not None:
        each = [combine([answer], mean="none", temperature=1.0).logits_BC for answer in answers]
        return torch.stack(each, dim=1).flatten(0, 1)
    combined = averaged(answers, teachers, plan.mean, spec.default)
    # Truncated and sampled rows are locked to the job's temperature, so they are taken of rows tempered with it.
    return combined.logits_BC * (combined.captured_temperature / spec.captured)


def pilot_rows(
    batches: Iterator[RowBatch],
    maker: RowMaker,
    teachers: Sequence[Teacher],
    mean: Mean,
    *,
    temperature: float,
    captured: float,
    most_rows: int,
    device: torch.device,
) -> NDArray[np.float32]:
    """Up to `most_rows` rows of these batches, averaged and tempered at `captured`: what an encoding is learnt from."""
    pieces: list[NDArray[np.float32]] = []
    wanted = most_rows
    for batch in batches:
        combined = averaged(ask(teachers, batch, maker, device), teachers, mean, temperature)
        rows = combined.logits_BC[:wanted] * (combined.captured_temperature / captured)
        pieces.append(rows.cpu().numpy())
        wanted -= len(rows)
        if wanted <= 0:
            break
    return np.concatenate(pieces)


def audit_temperatures(plan: Manifest) -> tuple[float, ...]:
    """The temperatures at which an encoding's error is measured: those that the store can be asked for most."""
    spec = plan.temperature
    return (spec.captured,) if spec.locked else tuple(sorted({1.0, spec.default}))


def listed(ids: list[Any]) -> str:
    """The first few ids, and how many more there are."""
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return ", ".join(map(repr, ids[:_SHOWN])) + more


# MERGED from softlabels.precompute.pipeline.inference: In which precision, memory layout and kind of kernel do the teachers compute? As the job's [run] table says.


_PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_DETERMINISTIC = ":4096:8"
"""What cuBLAS needs in order to add in one order; read when its first handle is made (cuBLAS manual, § 2.1.4)."""

_MOST_SHAPES = 64
"""Batch shapes that one model is compiled for before torch goes back to eager mode: an ensemble of equal models, each
with full batches, those at a shard's end and those after a halving, needs more than the usual 8."""


def computing(teachers: Sequence[Teacher], run: RunTable) -> list[Teacher]:
    """The teachers, computing as the job says; their specs, and what is asked of them, stay as they are.

    Compiled ones come from `compiled`, once the batch size is found: trying many sizes would compile for each.
    """
    if run.precision == "float32" and not (run.channels_last or run.deterministic):
        return list(teachers)
    return [replace(teacher, model=_Computing(teacher.model, run)) for teacher in teachers]


def compiled(teachers: Sequence[Teacher], run: RunTable) -> list[Teacher]:
    """The teachers, through `torch.compile` where the job asks for it; they compile when they are first asked.

    Each shape is compiled for itself: code for any shape would round by which shapes came before.
    """
    if not run.compile:
        return list(teachers)
    return [replace(teacher, model=_Compiled(teacher.model)) for teacher in teachers]


class _Computing(nn.Module):
    """A model under autocast, with channels last, with deterministic kernels, as asked."""

    def __init__(self, model: nn.Module, run: RunTable) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last) if run.channels_last else model  # type: ignore[call-overload]
        self._dtype = _PRECISIONS.get(run.precision)
        self._channels_last, self._deterministic = run.channels_last, run.deterministic
        self.train(model.training)

    def forward(self, inputs: Tensor) -> Any:
        """What the model makes of the inputs."""
        if self._channels_last and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with (
            torch.autocast(inputs.device.type, dtype=self._dtype, enabled=self._dtype is not None),
            _deterministic_kernels(self._deterministic),
        ):
            return self.model(inputs)


class _Compiled(nn.Module):
    """A model that runs compiled; its own modules stay in sight, so that their mode is seen and hooks find them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._run = [torch.compile(model, dynamic=False)]  # in a list: as a module of its own it would stand twice
        self.train(model.training)

    def forward(self, inputs: Tensor) -> Any:
        """What the model makes of the inputs."""
        with torch._dynamo.config.patch(recompile_limit=_MOST_SHAPES):
            return self._run[0](inputs)


@contextmanager
def _deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Refuse kernels whose result hangs on the order in which threads come; only for the teachers' own kernels."""
    if not wanted:
        yield
        return
    os.environ.setdefault(_CUBLAS, _CUBLAS_DETERMINISTIC)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
