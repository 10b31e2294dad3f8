"""How is a student to be trained? The choices, checked, in one frozen object that needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from softlabels.errors import RequestError

Optimizer: TypeAlias = Literal["sgd", "adamw", "adam"]
Schedule: TypeAlias = Literal["one_cycle", "cosine", "step", "constant"]
Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]

OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """How a student is trained. The temperature is not here: the data set's targets carry it.

    Attributes:
        epochs: passes over the data.
        batch_size: rows a forward pass, and so a request.
        accumulate: batches whose gradients are averaged, by rows, before the optimiser's step.
        learning_rate: the peak of the schedule.
        loss: a name that `softlabels.losses.make_loss` knows.
        loss_args: that loss's own options.
        hard_weight: of the cross-entropy with the labels at T = 1; the soft term, times T², has weight 1. None takes
            the loss's own, 0.5 for "kd".
        optimizer: "sgd" with Nesterov momentum, "adamw", "adam", or a reference `module:name` to what makes one of the
            parameters and `lr`.
        optimizer_args: further keyword arguments of the optimiser.
        momentum: of SGD; the others keep their own.
        weight_decay: of any.
        max_gradient_norm: gradients of a larger L2 norm are scaled down to it: the soft term's are large while the
            student is far from a confident teacher. None leaves them.
        schedule: "one_cycle" rises for a fifth of all steps, then falls to 0 as a cosine; "cosine" falls from the
            start; "step" is multiplied by `step_factor` at the `step_epochs`; "constant".
        warm_up: share of all steps in which the rate rises linearly from 0; None for the schedule's own.
        step_epochs: after how many epochs "step" takes its steps.
        step_factor: what each multiplies the rate with.
        precision: "bfloat16" and "float16" run the student's forward pass in mixed precision; "float16" scales the
            loss, so that small gradients are not lost.
        evaluate_every: steps between evaluations; None for one after each epoch.
        patience: evaluations in a row without improvement after which the training ends. None goes on to the end.
        min_delta: by how much the figure must fall to be an improvement.
        keep_best: give the student the weights of its best evaluation at the end, as `patience` always does.
        log_every: steps between rows of the log; None for one after each epoch and each evaluation.
        seed: of the order of samples and of dropout. The student's first weights are the caller's affair.
        device: "auto" takes an accelerator where there is one.
        workers: processes that fetch; 0 fetches ahead in a thread.
    Raises:
        RequestError: a value that cannot be.
    """

    epochs: int = 20
    batch_size: int = 128
    accumulate: int = 1
    learning_rate: float = 0.1
    loss: str = "kd"
    loss_args: Mapping[str, Any] = field(default_factory=dict)
    hard_weight: float | None = None
    optimizer: str = "sgd"
    optimizer_args: Mapping[str, Any] = field(default_factory=dict)
    momentum: float = 0.9
    weight_decay: float = 0.0
    max_gradient_norm: float | None = None
    schedule: Schedule = "one_cycle"
    warm_up: float | None = None
    step_epochs: tuple[int, ...] = ()
    step_factor: float = 0.1
    precision: Precision = "float32"
    evaluate_every: int | None = None
    patience: int | None = None
    min_delta: float = 0.0
    keep_best: bool = False
    log_every: int | None = None
    seed: int = 0
    device: str = "auto"
    workers: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("workers", 0), ("seed", 0)):
            _refuse_other_than_whole(name, getattr(self, name), least)
        for name in ("evaluate_every", "patience", "log_every"):
            if getattr(self, name) is not None:
                _refuse_other_than_whole(name, getattr(self, name), 1)
        for name in ("learning_rate", "momentum", "weight_decay", "min_delta", "step_factor"):
            _refuse_negative(name, getattr(self, name))
        for name in ("hard_weight", "max_gradient_norm"):
            if getattr(self, name) is not None:
                _refuse_negative(name, getattr(self, name))
        if self.max_gradient_norm == 0:
            raise RequestError("max_gradient_norm is 0: the student would stay as it is; leave it out for no bound")
        if self.learning_rate == 0:
            raise RequestError("learning_rate is 0: the student would stay as it is")
        if self.momentum >= 1:
            raise RequestError(f"momentum is {self.momentum!r}; it is below 1, for instance 0.9")
        if not _is_reference(self.optimizer):
            _refuse_unknown("optimizer", self.optimizer, (*OPTIMIZERS, "module:name"))
        _refuse_unknown("schedule", self.schedule, SCHEDULES)
        _refuse_unknown("precision", self.precision, PRECISIONS)
        self._refuse_odd_schedule()

    def _refuse_odd_schedule(self) -> None:
        object.__setattr__(self, "step_epochs", tuple(self.step_epochs))
        for epoch in self.step_epochs:
            _refuse_other_than_whole("step_epochs", epoch, 1)
        if (self.schedule == "step") != bool(self.step_epochs):
            raise RequestError(
                f"schedule is {self.schedule!r} and step_epochs {list(self.step_epochs)}: the schedule 'step', and no "
                "other, needs to know after which epochs the rate falls, for instance (10, 15)"
            )
        if self.warm_up is not None:
            _refuse_negative("warm_up", self.warm_up)
            if self.warm_up >= 1:
                raise RequestError(
                    f"warm_up is {self.warm_up!r}; it is a share of all steps below 1, for instance 0.05"
                )


def _is_reference(name: object) -> bool:
    return isinstance(name, str) and ":" in name


def _refuse_other_than_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RequestError(f"{name} is {value!r}; it is a whole number of {least} or more")


def _refuse_negative(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise RequestError(f"{name} is {value!r}; it is a finite number of 0 or more")


def _refuse_unknown(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RequestError(f"{name} is {value!r}; choose {' or '.join(map(repr, choices))}")
