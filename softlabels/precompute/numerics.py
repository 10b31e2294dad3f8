"""In which precision, memory layout and kind of kernel do the teachers compute? As the job's [run] table says."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from softlabels.precompute.job import RunTable
from softlabels.precompute.teachers import Teacher

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
