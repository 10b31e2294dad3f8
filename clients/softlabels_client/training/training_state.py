"""How far is a training, and what does it take to go on from there as if nothing had happened?"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from softlabels.errors import CheckpointMismatchError, MissingExtraError

try:
    import torch
    from torch import Tensor, nn
except ImportError as error:
    raise MissingExtraError(
        "training a student needs torch, which is not installed: `pip install softlabels[torch]`", extra="torch"
    ) from error

import contextlib
import random
from collections.abc import Iterator

import numpy as np

from softlabels.errors import MissingExtraError
from softlabels_client.data.dataset import SoftTargetDataset
from softlabels_client.data.sampler import data_identity
from softlabels_client.training.settings import DistillSettings

FREE = ("device", "workers")
"""Settings that a resumed training may change; with another device its weights are no longer the same to the bit."""


@dataclass(kw_only=True)
class TrainingState:
    """How far a training is; all of it is in a checkpoint.

    Attributes:
        step: optimiser's steps done.
        epoch: which is being learnt, from 0.
        cursor: samples of it that were learnt.
        sums: [2] over the epoch's rows so far, of the loss and of the divergence; on the device.
        logged_sums: what they were at the log's last row, if that was in this epoch.
        logged_samples: learnt then, in all epochs together.
        losses, divergences: of the epochs that are over.
        errors: of every evaluation.
        best_errors: the lowest of them.
        best_weights: the student's then, in the host's memory; None where they are not to be kept.
        stale: evaluations since.
        stopped: whether it ended early.
        seconds: spent before this process took it up.
    """

    sums: Tensor
    logged_sums: Tensor
    step: int = 0
    epoch: int = 0
    cursor: int = 0
    logged_samples: int = 0
    losses: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    best_errors: float | None = None
    best_weights: dict[str, Any] | None = None
    stale: int = 0
    stopped: bool = False
    seconds: float = 0.0

    @classmethod
    def beginning(cls, device: torch.device) -> TrainingState:
        """Nothing is done yet."""
        # On a CPU float64 costs nothing; some accelerators have none.
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        zeros = torch.zeros(2, dtype=dtype, device=device)
        return cls(sums=zeros, logged_sums=zeros.clone())

    def judge(self, errors: float, settings: DistillSettings) -> bool:
        """Remember an evaluation, and whether the training stops for it; True where it is the best so far."""
        self.errors.append(errors)
        if self.best_errors is None or errors < self.best_errors - settings.min_delta:
            self.best_errors, self.stale = errors, 0
            return True
        self.stale += 1
        self.stopped = settings.patience is not None and self.stale >= settings.patience
        return False

    def means_since_last_row(self, samples: int) -> tuple[float, float]:
        """Loss and divergence over the rows since the log's last row, given how many samples were learnt in all."""
        loss, divergence = ((self.sums - self.logged_sums) / (samples - self.logged_samples)).tolist()
        self.logged_sums.copy_(self.sums)
        self.logged_samples = samples
        return loss, divergence

    def end_epoch(self, samples: int) -> tuple[float, float]:
        """Begin the next epoch; the mean loss and divergence of the one that is over, which had so many samples."""
        loss, divergence = (self.sums / samples).tolist()
        self.losses.append(loss)
        self.divergences.append(divergence)
        self.epoch, self.cursor = self.epoch + 1, 0
        self.sums.zero_()
        self.logged_sums.zero_()
        return loss, divergence

    def tree(self) -> dict[str, Any]:
        """As `softlabels_client.training.checkpoint` keeps it."""
        return {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}

    @classmethod
    def from_tree(cls, tree: dict[str, Any], device: torch.device) -> TrainingState:
        """What `tree` gave."""
        fresh = cls.beginning(device)
        sums = {name: tree[name].to(fresh.sums) for name in ("sums", "logged_sums")}
        return cls(**{**tree, **sums})


def student_tree(student: nn.Module) -> dict[str, Any]:
    """The student's weights, and buffers that its `state_dict` leaves out: a forward pass may change those, too."""
    weights = student.state_dict()
    hidden = {name: buffer for name, buffer in student.named_buffers() if name not in weights}
    return {"student": weights, "hidden_buffers": hidden}


@torch.no_grad()
def load_student(student: nn.Module, tree: dict[str, Any]) -> None:
    """Give the student what `student_tree` found."""
    student.load_state_dict(tree["student"])
    for name, buffer in student.named_buffers():
        if name in tree["hidden_buffers"]:
            buffer.copy_(tree["hidden_buffers"][name])


def copied_weights(student: nn.Module) -> dict[str, Any]:
    """The student's `state_dict`, copied to the host's memory."""
    return {
        name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        for name, value in student.state_dict().items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, kept: dict[str, Any]) -> None:
    """Give the optimiser its state, each tensor in the type that it had."""
    optimizer.load_state_dict(kept)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, entries in kept["state"].items():
        loaded = optimizer.state[parameters[number]]
        for name, value in entries.items():
            # torch casts state to the parameter's type, which for a half-precision one would round what was exact.
            if isinstance(value, Tensor) and loaded[name].dtype != value.dtype:
                loaded[name] = value.to(loaded[name].device)


def training_identity(student: nn.Module, dataset: SoftTargetDataset, settings: DistillSettings) -> dict[str, Any]:
    """What a training is of: a checkpoint of another one is refused."""
    chosen = {name: value for name, value in dataclasses.asdict(settings).items() if name not in FREE}
    weights = {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in student.state_dict().items()}
    return {
        "store": dataset.store.digest,
        "temperature": dataset.temperature,
        "inputs": f"{dataset.samples.name} with ids {data_identity(dataset.samples)}",
        "samples": len(dataset),
        **chosen,
        # Rates of dropout and the like stand in a module's own words; addresses in them mean nothing.
        "modules": re.sub(r" at 0x[0-9a-f]+", "", repr(student)).splitlines(),
        **{f"weights {name!r}": text for name, text in weights.items()},
    }


def refuse_other_training(kept: dict[str, Any], here: dict[str, Any], *, where: str) -> None:
    """Let a checkpoint pass that is of this very training.

    Raises:
        CheckpointMismatchError: it is of another; the message names what differs.
    """
    differing = [name for name in {**kept, **here} if kept.get(name) != here.get(name)]
    if not differing:
        return
    told = [_difference(name, kept.get(name), here.get(name)) for name in differing[:5]]
    more = f", and {len(differing) - 5} more" if len(differing) > 5 else ""
    raise CheckpointMismatchError(
        f"the checkpoints in {where} are of another training: {'; '.join(told)}{more}. Going on from them would give a "
        "student of neither: pass the same arguments as then, or choose another folder",
        differing=differing,
    )


def _difference(name: str, kept: Any, here: Any) -> str:
    if name == "modules":
        lines = zip_longest(kept or [], here or [], fillvalue="nothing")
        kept, here = next((a.strip(), b.strip()) for a, b in lines if a != b)
        name = "the student"
    return f"{name} is {kept} there and {here} here"


try:
    import torch
except ImportError as error:
    raise MissingExtraError(
        "training a student needs torch, which is not installed: `pip install softlabels[torch]`", extra="torch"
    ) from error

_NUMPY_SEEDS = 2**32
"""What `numpy.random.seed` takes is below this."""


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed every global generator, which dropout and the like draw from, and give their states back afterwards."""
    before = draw_states(device)
    try:
        random.seed(seed)
        np.random.seed(seed % _NUMPY_SEEDS)
        torch.manual_seed(seed)
        yield
    finally:
        set_draw_states(before, device)


def draw_states(device: torch.device) -> dict[str, Any]:
    """Where every global generator stands, as a tree that `softlabels_client.training.checkpoint` keeps."""
    numpys = np.random.get_state(legacy=False)
    assert isinstance(numpys, dict)
    key = numpys["state"]["key"].tolist()
    states = {
        "python": random.getstate(),
        "numpy": {**numpys, "state": {**numpys["state"], "key": key, "pos": int(numpys["state"]["pos"])}},
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_draw_states(states: dict[str, Any], device: torch.device) -> None:
    """Put every generator where it stood; that of another kind of device than then is left alone."""
    random.setstate(states["python"])
    numpys = states["numpy"]
    np.random.set_state({**numpys, "state": {**numpys["state"], "key": np.array(numpys["state"]["key"], np.uint32)}})
    torch.set_rng_state(states["torch"])
    if device.type in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type], device)
