"""How large is the learning rate at each step? Schedules as factors on the peak rate; nothing here needs torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

Schedule: TypeAlias = Callable[[float], float]
"""The factor on the peak rate after a share of all steps."""

ONE_CYCLE_WARM_UP = 0.2
"""Share of all steps in which a one-cycle schedule rises to its peak."""


def one_cycle(done_share: float) -> float:
    """The factor after `done_share` of all steps: a linear rise for a fifth of them, then a cosine's fall to 0."""
    return warmed_up(done_share, ONE_CYCLE_WARM_UP, cosine)


def cosine(done_share: float) -> float:
    """The factor after `done_share` of all steps: from 1 to 0 along half a cosine."""
    return 0.5 * (1.0 + math.cos(math.pi * done_share))


def constant(done_share: float) -> float:
    """The factor is 1 all along."""
    return 1.0


def warmed_up(done_share: float, warm_up: float, rest: Schedule) -> float:
    """The factor of a schedule that begins after a linear rise from 0, for a share `warm_up` of all steps."""
    if done_share < warm_up:
        return done_share / warm_up
    return rest((done_share - warm_up) / (1.0 - warm_up))


def stepped(done_epochs: int, at_epochs: Sequence[int], factor: float) -> float:
    """The factor after so many whole epochs: one multiplication by `factor` for each of `at_epochs` that is reached."""
    return math.prod(factor for epoch in at_epochs if done_epochs >= epoch)
