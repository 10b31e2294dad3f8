"""Teacher inference: precision and kernels, rows of a batch, their checks, and the ensemble's mean; on the device.

Legend: R rows of a batch, C classes, D width of hidden states, M teachers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from softlabels.encodings import RowKind
from softlabels.ensemble import Combined, combine
from softlabels.errors import NonFiniteLogitsError, TeacherError, TeacherShapeError
from softlabels.ids import IdArray
from softlabels.manifest import Manifest
from softlabels.precompute.job import RunTable
from softlabels.precompute.row_batches import RowBatch, RowLoader
from softlabels.precompute.teachers import Teacher
from softlabels.softmath import Mean

_MOST_IDS = 5
"""Sample ids that a message spells out."""

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_DETERMINISTIC = ":4096:8"
"""What cuBLAS needs for a fixed order of addition; read when its first handle is created (cuBLAS manual, § 2.1.4)."""

_RECOMPILE_LIMIT = 64
"""Batch shapes that one model is compiled for before torch goes back to eager mode: an ensemble of equal models, each
with full batches, those at a shard's end and those after a halving, needs more than torch's 8."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherEnsemble:
    """The teachers of a job on their device, with the loader of the rows that they are run on.

    Attributes:
        teachers: members, in the job's order.
        rows: loader of the store's rows.
        device: where the teachers are.
    """

    teachers: Sequence[Teacher]
    rows: RowLoader
    device: torch.device

    def forward(self, inputs: Tensor, batch: RowBatch, *, row_kind: RowKind = "logits") -> list[Tensor]:
        """Queue the forward passes of a batch and return each teacher's rows; does not wait for the device.

        Args:
            inputs: `batch.inputs` on the device.
            batch: rows to select from the outputs.
            row_kind: `hidden_states` runs the teachers without their last layer.
        Returns:
            [R, C] per teacher, or [R, D].
        Raises:
            TeacherError: a teacher fails or returns another number of rows.
            TeacherShapeError: the rows are not [rows, classes].
        """
        found = []
        for teacher in self.teachers:
            output = teacher.logits(inputs) if row_kind == "logits" else teacher.hidden(inputs).float()
            selected = self.rows.select_rows(output, batch)
            _check_shape(selected, teacher, batch)
            found.append(selected)
        return found

    def run(self, batch: RowBatch, *, row_kind: RowKind = "logits") -> list[Tensor]:
        """Return each teacher's rows of a batch, checked for NaN and Inf. Raises as `forward` and `check_finite` do."""
        rows = self.forward(as_tensor(batch.inputs).to(self.device), batch, row_kind=row_kind)
        self.check_finite(rows, batch.ids)
        return rows

    def check_finite(self, rows: Sequence[Tensor], ids: IdArray) -> None:
        """Raise unless every value of the teachers' rows is finite; waits for the device, once for all teachers.

        Raises:
            NonFiniteLogitsError: names the first teacher at fault and the sample ids.
        """
        finite_MR = [teacher_rows.isfinite().flatten(1).all(dim=1) for teacher_rows in rows]
        # One number for all teachers: every `bool()` of a CUDA tensor is a wait.
        if bool(torch.stack([finite_R.all() for finite_R in finite_MR]).all()):
            return
        for teacher, finite_R in zip(self.teachers, finite_MR, strict=True):
            finite = finite_R.cpu().numpy()
            if not finite.all():
                blamed = list(dict.fromkeys(ids[~finite].tolist()))
                raise NonFiniteLogitsError(
                    f"teacher {teacher.spec.name!r} returns NaN or Inf for {len(blamed)} samples (sample ids "
                    f"{format_ids(blamed)}): the shard is refused and nothing of it is kept; check these inputs, or "
                    "run the teacher in float32",
                    teacher=teacher.spec.name,
                    ids=blamed,
                )

    def mean(self, logits: Sequence[Tensor], kind: Mean, temperature: float) -> Combined:
        """Return the mean of the members' logits. Raises TeacherShapeError: the members' shapes differ."""
        return combine(
            logits,
            mean=kind,
            temperature=temperature,
            weights=[teacher.spec.weight for teacher in self.teachers],
            names=[teacher.spec.name for teacher in self.teachers],
        )

    def rows_to_store(self, rows: Sequence[Tensor], plan: Manifest, *, row_kind: RowKind = "logits") -> Tensor:
        """Return what a plan's encoding is given of the teachers' rows.

        Returns:
            [R, C] mean logits, tempered as the plan captures them, each row's largest 0; [R · M, C] with a row's
            members side by side, where members are kept; [R, D], the only teacher's hidden states as they are.
        """
        spec = plan.temperature
        if row_kind == "hidden_states":
            return rows[0]
        if plan.members is not None:
            each = [combine([logits], mean="none", temperature=1.0).logits_BC for logits in rows]
            return torch.stack(each, dim=1).flatten(0, 1)
        combined = self.mean(rows, plan.mean, spec.default)
        # Truncated and sampled rows are locked to the job's temperature, so they are taken of rows tempered with it.
        return combined.logits_BC * (combined.captured_temperature / spec.captured)


def with_numerics(teachers: Sequence[Teacher], run: RunTable) -> list[Teacher]:
    """Return the teachers with the precision, memory format and kernels of [run]; their specs stay as they are."""
    if run.precision == "float32" and not (run.channels_last or run.deterministic):
        return list(teachers)
    return [replace(teacher, model=_WithNumerics(teacher.model, run)) for teacher in teachers]


def with_compile(teachers: Sequence[Teacher]) -> list[Teacher]:
    """Return the teachers through `torch.compile`; they compile on their first batch."""
    return [replace(teacher, model=_Compiled(teacher.model)) for teacher in teachers]


def as_tensor(inputs: NDArray[Any]) -> Tensor:
    """Return a tensor over the same memory; a copy where that is read-only, which tensors cannot express."""
    return torch.from_numpy(inputs if inputs.flags.writeable else inputs.copy())


def audit_temperatures(plan: Manifest) -> tuple[float, ...]:
    """Return the temperatures at which an encoding's error is measured: the likeliest ones to be asked for."""
    spec = plan.temperature
    return (spec.captured,) if spec.locked else tuple(sorted({1.0, spec.default}))


def format_ids(ids: list[Any]) -> str:
    """Return the first few ids, and how many more there are."""
    more = f" and {len(ids) - _MOST_IDS} more" if len(ids) > _MOST_IDS else ""
    return ", ".join(map(repr, ids[:_MOST_IDS])) + more


def _check_shape(rows: Tensor, teacher: Teacher, batch: RowBatch) -> None:
    if rows.ndim != 2:
        raise TeacherShapeError(
            f"teacher {teacher.spec.name!r} returns shape {list(rows.shape)}: logits are [rows, classes]; have the "
            "model return one row of logits per input, or add a [sequences] table to the job where it returns one at "
            "every position"
        )
    if len(rows) != batch.rows:
        raise TeacherError(
            f"teacher {teacher.spec.name!r} returns {len(rows)} rows for {batch.rows} samples: it must return one row "
            "of logits for each"
        )


class _WithNumerics(nn.Module):
    """A model under autocast, with channels last and deterministic kernels, as asked."""

    def __init__(self, model: nn.Module, run: RunTable) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last) if run.channels_last else model  # type: ignore[call-overload]
        self._dtype = _AUTOCAST.get(run.precision)
        self._channels_last, self._deterministic = run.channels_last, run.deterministic
        self.train(model.training)

    def forward(self, inputs: Tensor) -> Any:
        """Return the model's output."""
        if self._channels_last and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with (
            torch.autocast(inputs.device.type, dtype=self._dtype, enabled=self._dtype is not None),
            _deterministic_kernels(self._deterministic),
        ):
            return self.model(inputs)


class _Compiled(nn.Module):
    """A compiled model whose own modules stay visible, so that their mode is checked and hooks find them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # Static shapes: code for any shape would round by which shapes came before. In a list, since as a module of
        # its own the compiled model would be registered twice.
        self._run = [torch.compile(model, dynamic=False)]
        self.train(model.training)

    def forward(self, inputs: Tensor) -> Any:
        """Return the model's output."""
        with torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT):
            return self._run[0](inputs)


@contextmanager
def _deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Refuse nondeterministic kernels inside; torch's global setting is restored, since it is not ours alone."""
    if not wanted:
        yield
        return
    os.environ.setdefault(_CUBLAS, _CUBLAS_DETERMINISTIC)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    # Benchmarking chooses kernels by their speed, which can differ from run to run.
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
