"""Settings of a student's training: one frozen, checked object that does not need torch.

`softlabels distill` derives its options, their types, defaults and help texts from `DistillSettings`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Annotated, Any, Literal, TypeAlias, get_type_hints

import msgspec

from softlabels.documents import parse_document
from softlabels.errors import RequestError

Schedule: TypeAlias = Literal["one_cycle", "cosine", "step", "constant"]
Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]

OPTIMIZERS = ("sgd", "adamw", "adam")

AtLeastOne: TypeAlias = Annotated[int, msgspec.Meta(ge=1)]
NotNegativeInt: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
Positive: TypeAlias = Annotated[float, msgspec.Meta(gt=0)]
NotNegative: TypeAlias = Annotated[float, msgspec.Meta(ge=0)]
Fraction: TypeAlias = Annotated[float, msgspec.Meta(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """How a student is trained. The temperature is not a setting: it comes with the data set's targets.

    Attributes:
        epochs: passes over the training samples.
        batch_size: samples per forward pass.
        accumulate: batches per optimizer step; their gradients are averaged over all of their samples.
        learning_rate: peak learning rate of the schedule.
        loss: name of the distillation loss, "kd", "dkd" or "dist"; see `softlabels.losses.make_loss`.
        loss_args: further options of the loss.
        hard_weight: weight of the cross-entropy with the hard labels at T = 1; the soft term, times T², has weight 1.
            None takes the loss's default: 0.5 for "kd", 1 for the others.
        optimizer: "sgd" (with Nesterov momentum), "adamw", "adam", or a reference `module:name` to a function of the
            parameters and `lr` that returns a torch optimizer.
        optimizer_args: further keyword arguments of the optimizer.
        momentum: momentum of SGD; other optimizers keep their own default.
        weight_decay: weight decay of any optimizer.
        max_gradient_norm: gradients with a larger L2 norm are scaled down to it. The soft term's gradients are large
            while the student is far from a confident teacher. None disables clipping.
        schedule: "one_cycle" rises linearly for the first fifth of all steps, then decays to 0 as a cosine; "cosine"
            decays from the start; "step" multiplies by `step_factor` after each of `step_epochs`; "constant".
        warm_up: fraction of all steps in which the rate rises linearly from 0; None takes the schedule's default.
        step_epochs: epochs after which "step" lowers the rate.
        step_factor: factor by which "step" multiplies the rate.
        precision: "bfloat16" and "float16" run the student's forward pass in mixed precision; "float16" also scales
            the loss, so that small gradients do not underflow.
        evaluate_every: optimizer steps between evaluations; None evaluates after each epoch.
        patience: number of consecutive evaluations without improvement after which training stops early. None
            disables early stopping.
        min_delta: smallest decrease of the evaluation's figure that counts as an improvement.
        keep_best: end with the weights of the best evaluation, as `patience` always does.
        log_every: optimizer steps between rows of the log; None logs after each epoch and each evaluation.
        seed: seed of the sample order, dropout and other random draws. The student's initial weights are the
            caller's responsibility.
        device: device to train on; "auto" takes an accelerator if there is one.
        workers: processes that fetch batches; 0 prefetches in a thread.
    Raises:
        RequestError: a value has the wrong type or is out of bounds, or two settings contradict each other.
    """

    epochs: AtLeastOne = 20
    batch_size: AtLeastOne = 128
    accumulate: AtLeastOne = 1
    learning_rate: Positive = 0.1
    loss: str = "kd"
    loss_args: Mapping[str, Any] = field(default_factory=dict)
    hard_weight: NotNegative | None = None
    optimizer: str = "sgd"
    optimizer_args: Mapping[str, Any] = field(default_factory=dict)
    momentum: Fraction = 0.9
    weight_decay: NotNegative = 0.0
    max_gradient_norm: Positive | None = None
    schedule: Schedule = "one_cycle"
    warm_up: Fraction | None = None
    step_epochs: tuple[AtLeastOne, ...] = ()
    step_factor: NotNegative = 0.1
    precision: Precision = "float32"
    evaluate_every: AtLeastOne | None = None
    patience: AtLeastOne | None = None
    min_delta: NotNegative = 0.0
    keep_best: bool = False
    log_every: AtLeastOne | None = None
    seed: NotNegativeInt = 0
    device: str = "auto"
    workers: NotNegativeInt = 0

    def __post_init__(self) -> None:
        given = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        checked = parse_document(given, _checked_type(), what="training settings", error=RequestError)
        object.__setattr__(self, "step_epochs", checked.step_epochs)  # a list, as JSON has it, becomes a tuple
        for name, value in given.items():
            # msgspec's bounds let infinity pass, and NaN past an upper one alone.
            if isinstance(value, float) and not math.isfinite(value):
                raise RequestError(f"{name} is {value!r}; it must be a finite number")
        if self.optimizer not in OPTIMIZERS and ":" not in self.optimizer:
            choices = ", ".join(map(repr, OPTIMIZERS))
            raise RequestError(f"optimizer is {self.optimizer!r}; choose {choices} or a reference 'module:name'")
        if (self.schedule == "step") != bool(self.step_epochs):
            raise RequestError(
                f"schedule is {self.schedule!r} and step_epochs is {list(self.step_epochs)}: the schedule 'step', and "
                "no other, needs the epochs after which the rate falls, for example (10, 15)"
            )


@cache
def _checked_type() -> Any:
    """Return a struct with the fields of `DistillSettings`; converting to the dataclass itself would recurse."""
    return msgspec.defstruct(
        "DistillSettings", list(get_type_hints(DistillSettings, include_extras=True).items()), kw_only=True
    )
