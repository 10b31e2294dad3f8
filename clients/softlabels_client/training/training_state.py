"""State of a training for exact resume: progress, student, optimizer, random generators and what the training is of."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np

from softlabels.errors import CheckpointMismatchError
from softlabels.extras import needs_extra
from softlabels_client.data.dataset import SoftTargetDataset, data_identity
from softlabels_client.training.settings import DistillSettings

with needs_extra("torch", "training a student"):
    import torch
    from torch import Tensor, nn

CHANGEABLE = ("device", "workers")
"""Settings that may change on resume; on another device the weights are no longer the same to the bit."""


@dataclass(kw_only=True)
class TrainingState:
    """Progress of a training; a checkpoint holds all of it.

    Attributes:
        cursor: samples of the current epoch that were trained on.
        sums: [4] over the epoch's rows so far, on the device; see `softlabels_client.training.step.batch_sums`.
        logged_sums: `sums` at the last row of the log, if that was in this epoch.
        logged_samples: samples trained on at the last row of the log, over all epochs.
        losses, divergences, accuracies: means over each finished epoch.
        errors: results of all evaluations; `test_samples`: how many the last one tested, if it counted errors.
        best_weights: the student's `state_dict` at the best evaluation, on the host; None unless they are to be kept.
        stale: evaluations since the best one.
        seconds: time spent by earlier processes.
    """

    sums: Tensor
    logged_sums: Tensor
    step: int = 0
    epoch: int = 0
    cursor: int = 0
    logged_samples: int = 0
    losses: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    accuracies: list[float | None] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    test_samples: int | None = None
    best_errors: float | None = None
    best_weights: dict[str, Any] | None = None
    stale: int = 0
    stopped: bool = False
    seconds: float = 0.0

    @classmethod
    def initial(cls, device: torch.device) -> TrainingState:
        """Return the state before the first step."""
        # On a CPU float64 costs nothing; some accelerators have none.
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        zeros = torch.zeros(4, dtype=dtype, device=device)
        return cls(sums=zeros, logged_sums=zeros.clone())

    def add_evaluation(self, errors: float, settings: DistillSettings) -> bool:
        """Record an evaluation and decide on early stopping; return whether it is the best so far."""
        self.errors.append(errors)
        if self.best_errors is None or errors < self.best_errors - settings.min_delta:
            self.best_errors, self.stale = errors, 0
            return True
        self.stale += 1
        self.stopped = settings.patience is not None and self.stale >= settings.patience
        return False

    def means_since_last_row(self, samples: int) -> tuple[float, float, float | None]:
        """Return mean loss, KL and accuracy since the last row of the log, after `samples` samples in all."""
        means = _means(self.sums - self.logged_sums, samples - self.logged_samples)
        self.logged_sums.copy_(self.sums)
        self.logged_samples = samples
        return means

    def end_epoch(self, samples: int) -> None:
        """Record the means of an epoch of `samples` samples and begin the next one."""
        loss, divergence, accuracy = _means(self.sums, samples)
        self.losses.append(loss)
        self.divergences.append(divergence)
        self.accuracies.append(accuracy)
        self.epoch, self.cursor = self.epoch + 1, 0
        self.sums.zero_()
        self.logged_sums.zero_()

    @classmethod
    def from_tree(cls, tree: dict[str, Any], device: torch.device) -> TrainingState:
        """Return the state whose fields a checkpoint of format 1 or 2 holds."""
        state = cls.initial(device)
        for name in ("sums", "logged_sums"):
            # Format 1 has the sums of loss and KL alone, and no accuracies.
            getattr(state, name)[: len(tree[name])] = tree[name].to(state.sums)
        accuracies = tree.get("accuracies", [None] * len(tree["losses"]))
        return cls(**{**tree, "accuracies": accuracies, "sums": state.sums, "logged_sums": state.logged_sums})


def _means(sums: Tensor, samples: int) -> tuple[float, float, float | None]:
    """Return mean loss, mean KL, and the accuracy in percent; None without labelled samples."""
    loss, divergence = (sums[:2] / samples).tolist()
    correct, labelled = sums[2:].tolist()
    return loss, divergence, 100.0 * correct / labelled if labelled else None


def student_tree(student: nn.Module) -> dict[str, Any]:
    """Return the student's weights and its non-persistent buffers: a forward pass may change those too."""
    weights = student.state_dict()
    hidden = {name: buffer for name, buffer in student.named_buffers() if name not in weights}
    return {"student": weights, "hidden_buffers": hidden}


@torch.no_grad()
def load_student(student: nn.Module, tree: dict[str, Any]) -> None:
    """Load what `student_tree` returned."""
    student.load_state_dict(tree["student"])
    for name, buffer in student.named_buffers():
        if name in tree["hidden_buffers"]:
            buffer.copy_(tree["hidden_buffers"][name])


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load an optimizer's state, each tensor in the type that it had."""
    optimizer.load_state_dict(saved)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, entries in saved["state"].items():
        loaded = optimizer.state[parameters[number]]
        for name, value in entries.items():
            # torch casts state to the parameter's type, which for a half-precision one would round what was exact.
            if isinstance(value, Tensor) and loaded[name].dtype != value.dtype:
                loaded[name] = value.to(loaded[name].device)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch inside the context and restore them afterwards."""
    before = rng_states(device)
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)  # it takes no larger seed
        torch.manual_seed(seed)
        yield
    finally:
        set_rng_states(before, device)


def rng_states(device: torch.device) -> dict[str, Any]:
    """Return the states of all global generators as a tree that a checkpoint can hold."""
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


def set_rng_states(states: dict[str, Any], device: torch.device) -> None:
    """Restore what `rng_states` returned; a generator of another kind of device keeps its state."""
    random.setstate(states["python"])
    numpys = states["numpy"]
    np.random.set_state({**numpys, "state": {**numpys["state"], "key": np.array(numpys["state"]["key"], np.uint32)}})
    torch.set_rng_state(states["torch"])
    if device.type in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type], device)


def training_identity(student: nn.Module, dataset: SoftTargetDataset, settings: DistillSettings) -> dict[str, Any]:
    """Return what identifies a training; a checkpoint with another identity is refused."""
    chosen = {name: value for name, value in dataclasses.asdict(settings).items() if name not in CHANGEABLE}
    weights = {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in student.state_dict().items()}
    return {
        "store": dataset.store.digest,
        "temperature": dataset.temperature,
        "inputs": f"{dataset.samples.name} with ids {data_identity(dataset.samples)}",
        "samples": len(dataset),
        **chosen,
        # A module's text tells its dropout rate and the like; memory addresses in it differ from run to run.
        "modules": re.sub(r" at 0x[0-9a-f]+", "", repr(student)).splitlines(),
        **{f"weights {name!r}": text for name, text in weights.items()},
    }


def check_same_training(saved: dict[str, Any], current: dict[str, Any], *, where: str) -> None:
    """Raise CheckpointMismatchError, naming what differs, unless a checkpoint's identity is the current one."""
    differing = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
    if not differing:
        return
    told = [_difference(name, saved.get(name), current.get(name)) for name in differing[:5]]
    more = f", and {len(differing) - 5} more" if len(differing) > 5 else ""
    raise CheckpointMismatchError(
        f"the checkpoints in {where} belong to another training: {'; '.join(told)}{more}. Resuming from them would "
        "train a student of neither: pass the same arguments as before, or choose another folder",
        differing=differing,
    )


def _difference(name: str, saved: Any, current: Any) -> str:
    if name == "modules":
        lines = zip_longest(saved or [], current or [], fillvalue="nothing")
        saved, current = next((a.strip(), b.strip()) for a, b in lines if a != b)
        name = "the student"
    return f"{name} is {saved} there and {current} here"
