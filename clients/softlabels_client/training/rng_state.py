"""Which random numbers does a training draw? Those of all global generators, seeded, kept, and given back after it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from softlabels.errors import MissingExtraError

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
    """Where every global generator stands, as a tree that `softlabels_client.training.tensor_trees` keeps."""
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
