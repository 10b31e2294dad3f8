"""What does a loss have to know of its targets? One batch of them as tensors, with the temperature that they carry."""

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
    """One batch of targets as tensors, with all that a loss needs to know of them.

    Attributes:
        logits_BC: rows tempered with `captured_temperature`, floating point, free up to a row constant.
        temperature: the T that the loss works at.
        captured_temperature: the T that the rows are tempered with; softmax(logits_BC captured/T) is the target at T.
        locked: whether the targets exist at the captured temperature only.
        labels_B: int64 classes, -1 for unlabelled; None where no row has one.
    Raises:
        ShapeMismatchError, RequestError: rows or labels that cannot be; labels outside [-1, C) are named.
        TemperatureError, TemperatureLockedError: a bad temperature, or another than the captured one of locked targets.
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
            # Once, here: in the loss it would make the host wait for the accelerator at every step.
            labels_B = check_labels(self.labels_B.detach().cpu().numpy(), rows=rows, classes=classes)
            if self.labels_B.dtype != torch.int64:
                object.__setattr__(self, "labels_B", torch.from_numpy(labels_B).to(self.labels_B.device))

    @classmethod
    def from_soft_targets(cls, targets: SoftTargets, *, device: torch.device | str | None = None) -> SoftTargetBatch:
        """What a store's batch becomes for torch, at the temperature it carries.

        Args:
            targets: as a store gave them.
            device: where rows are decoded: their encoded bytes go there, a fraction of what decoded ones would be, from
                pinned memory where it is an accelerator. None decodes with NumPy on the host.
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
        """The same batch on another device."""
        moved = copy.copy(self)  # already checked, and checking on an accelerator would wait for it
        object.__setattr__(moved, "logits_BC", self.logits_BC.to(device, non_blocking=non_blocking))
        if self.labels_B is not None:
            object.__setattr__(moved, "labels_B", self.labels_B.to(device, non_blocking=non_blocking))
        return moved

    def tempered(self) -> Tensor:
        """logits_BC whose softmax is the target at `temperature`; float32, or float64 where the rows are."""
        wide_BC = widened(self.logits_BC)
        if self.captured_temperature == self.temperature:
            return wide_BC
        return wide_BC * (self.captured_temperature / self.temperature)

    def log_p(self) -> Tensor:
        """logp_BC of the target at `temperature`."""
        return torch.log_softmax(self.tempered(), dim=-1)


def widened(values: Tensor) -> Tensor:
    """The same values in the dtype that losses work in: float32, or float64 where they are float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _decoded_on(device: torch.device | str, targets: SoftTargets) -> Tensor:
    """logits_BC as kept, decoded on a device from its encoded bytes."""
    where = torch.device(device)
    if targets.members is not None:
        # Members are averaged at the temperature first, which the reference does on the host.
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
    """The array, copied where it is a view on a reply: torch has no read-only tensors."""
    return array if array.flags.writeable else array.copy()
