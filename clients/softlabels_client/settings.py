"""How is a student to be trained? The choices, checked, in one frozen object that needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from softlabels.errors import RequestError

Optimizer: TypeAlias = Literal["sgd", "adamw"]
Schedule: TypeAlias = Literal["one_cycle", "constant"]
Precision: TypeAlias = Literal["float32", "bfloat16"]

OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """How a student is trained. The temperature is not here: the data set's targets carry it.

    Attributes:
        epochs: passes over the data.
        batch_size: rows a step, and so a request.
        learning_rate: the peak of the schedule.
        hard_weight: of the cross-entropy with the labels at T = 1; the soft term, times T², has weight 1.
        optimizer: SGD with Nesterov momentum, or AdamW.
        momentum: of SGD; AdamW keeps its own.
        weight_decay: of either.
        max_gradient_norm: gradients of a larger L2 norm are scaled down to it: the soft term's are large while the
            student is far from a confident teacher. None leaves them.
        schedule: "one_cycle" rises for a fifth of all steps, then falls to 0 as a cosine; or "constant".
        seed: of the order of samples and of dropout. The student's first weights are the caller's affair.
        device: "auto" takes an accelerator where there is one.
        precision: "bfloat16" runs the student's forward pass in mixed precision.
        workers: processes that fetch; 0 fetches one batch ahead in a thread.
    Raises:
        RequestError: a value that cannot be.
    """

    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 0.1
    hard_weight: float = 0.5
    optimizer: Optimizer = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    max_gradient_norm: float | None = None
    schedule: Schedule = "one_cycle"
    seed: int = 0
    device: str = "auto"
    precision: Precision = "float32"
    workers: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("workers", 0), ("seed", 0)):
            _refuse_other_than_whole(name, getattr(self, name), least)
        for name in ("learning_rate", "hard_weight", "momentum", "weight_decay"):
            _refuse_negative(name, getattr(self, name))
        if self.max_gradient_norm is not None:
            _refuse_negative("max_gradient_norm", self.max_gradient_norm)
        if self.max_gradient_norm == 0:
            raise RequestError("max_gradient_norm is 0: the student would stay as it is; leave it out for no bound")
        if self.learning_rate == 0:
            raise RequestError("learning_rate is 0: the student would stay as it is")
        if self.momentum >= 1:
            raise RequestError(f"momentum is {self.momentum!r}; it is below 1, for instance 0.9")
        _refuse_unknown("optimizer", self.optimizer, OPTIMIZERS)
        _refuse_unknown("schedule", self.schedule, SCHEDULES)
        _refuse_unknown("precision", self.precision, PRECISIONS)


def _refuse_other_than_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RequestError(f"{name} is {value!r}; it is a whole number of {least} or more")


def _refuse_negative(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise RequestError(f"{name} is {value!r}; it is a finite number of 0 or more")


def _refuse_unknown(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RequestError(f"{name} is {value!r}; choose {' or '.join(map(repr, choices))}")
