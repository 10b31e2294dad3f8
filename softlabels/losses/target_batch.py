"""One batch of soft targets as tensors, with the temperature that they carry: what a loss takes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabels.errors import ShapeMismatchError
from softlabels.softmath import check_labels, check_temperature
from softlabels.targets import SoftTargets, check_unlocked


@dataclass(frozen=True, kw_only=True, eq=False)
class SoftTargetBatch:
    """One batch of targets as tensors.

    Attributes:
        logits_BC: rows tempered with `captured_temperature`, floating point, up to a row constant.
        temperature: T of the loss.
        captured_temperature: T that the rows are tempered with; softmax(logits_BC captured/T) is the target at T.
        locked: whether the targets exist only at the captured temperature.
        labels_B: int64 classes, -1 for unlabelled; None if no row has a label.
    Raises:
        ShapeMismatchError, RequestError: malformed rows or labels, for example labels outside [-1, C).
        TemperatureError, TemperatureLockedError: a bad temperature, or locked targets at another than the captured one.
    """

    logits_BC: Tensor
    temperature: float
    captured_temperature: float
    locked: bool
    labels_B: Tensor | None = None

    def __post_init__(self) -> None:
        if self.logits_BC.ndim != 2 or self.logits_BC.shape[1] == 0 or not self.logits_BC.is_floating_point():
            raise ShapeMismatchError(
                f"targets are floating-point [rows, classes]; these are {self.logits_BC.dtype} of shape "
                f"{list(self.logits_BC.shape)}",
                shape=list(self.logits_BC.shape),
            )
        object.__setattr__(self, "temperature", check_temperature(self.temperature))
        object.__setattr__(self, "captured_temperature", check_temperature(self.captured_temperature))
        check_unlocked(self.temperature, captured=self.captured_temperature, locked=self.locked)
        if self.labels_B is not None:
            rows, classes = self.logits_BC.shape
            # Checked here and not in the loss, where the host would wait for the accelerator at every step.
            labels_B = check_labels(self.labels_B.detach().cpu().numpy(), rows=rows, classes=classes)
            if self.labels_B.dtype != torch.int64:
                object.__setattr__(self, "labels_B", torch.from_numpy(labels_B).to(self.labels_B.device))

    @classmethod
    def from_soft_targets(cls, targets: SoftTargets, *, device: torch.device | str | None = None) -> SoftTargetBatch:
        """Return a store's batch as tensors, at the temperature it carries.

        Args:
            targets: targets as a store returned them.
            device: device on which rows are decoded; their encoded bytes are copied there, through pinned memory if it
                is an accelerator. None decodes with NumPy on the host.
        """
        logits_BC = torch.from_numpy(_writable(targets.logits())) if device is None else _decoded_on(device, targets)
        made = cls(
            logits_BC=logits_BC,
            temperature=targets.temperature,
            captured_temperature=targets.captured_temperature,
            locked=targets.locked,
            labels_B=None if targets.labels is None else torch.from_numpy(_writable(targets.labels.astype(np.int64))),
        )
        return made if device is None else made.to(device, non_blocking=True)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SoftTargetBatch:
        """Return the same batch on another device."""
        return self.with_fields(
            logits_BC=self.logits_BC.to(device, non_blocking=non_blocking),
            labels_B=None if self.labels_B is None else self.labels_B.to(device, non_blocking=non_blocking),
        )

    def with_fields(self, **changes: Any) -> SoftTargetBatch:
        """Return a copy with other attributes, not checked again: the host would wait for the accelerator."""
        made = copy.copy(self)
        made.__dict__.update(changes)
        return made

    def tempered(self) -> Tensor:
        """Return logits_BC whose softmax is the target at `temperature`; float32, or float64 if the rows are."""
        wide_BC = widened(self.logits_BC)
        if self.captured_temperature == self.temperature:
            return wide_BC
        return wide_BC * (self.captured_temperature / self.temperature)

    def log_p(self) -> Tensor:
        """Return logp_BC of the target at `temperature`."""
        return torch.log_softmax(self.tempered(), dim=-1)


def widened(values: Tensor) -> Tensor:
    """Return the values in the dtype that losses compute in: float32, or float64 if they are float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _decoded_on(device: torch.device | str, targets: SoftTargets) -> Tensor:
    """Return logits_BC, decoded on the device from their encoded bytes."""
    where = torch.device(device)
    if targets.members is not None:
        # Members are first averaged at the temperature, by the reference implementation on the host.
        return torch.from_numpy(_writable(targets.logits())).to(where)
    moved = {name: _moved(array, where) for name, array in targets.encoded.items()}
    return targets.encoding.decode_torch(moved)


def _moved(array: NDArray[Any], device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.from_numpy(_writable(array)).to(device)
    pinned = torch.empty(array.shape, dtype=torch.from_numpy(np.empty(0, array.dtype)).dtype, pin_memory=True)
    np.copyto(pinned.numpy(), array)
    return pinned.to(device, non_blocking=True)


def _writable(array: NDArray[Any]) -> NDArray[Any]:
    """Return the array, copied if it is a read-only view of a reply: torch has no read-only tensors."""
    return array if array.flags.writeable else array.copy()
