"""How long is everything in the demo trained? Chosen on held-out training data, for two cores and five minutes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from softlabels.demo.teachers import TeacherSchedule


@dataclass(frozen=True, kw_only=True)
class StudentSchedule:
    """How a student is trained, alone and distilled alike.

    Attributes:
        hard_weight: of the labels beside the soft targets; plays no part for the student alone.
    """

    epochs: int
    batch_size: int = 128
    learning_rate: float = 0.1
    hard_weight: float = 0.5
    precision: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """How many teachers there are, and how long everybody is trained."""

    teachers: int
    teacher: TeacherSchedule
    student: StudentSchedule


DEMO = Schedules(teachers=2, teacher=TeacherSchedule(epochs=6), student=StudentSchedule(epochs=8))
"""MNIST."""

SMALL = Schedules(
    teachers=2,
    teacher=TeacherSchedule(epochs=30, batch_size=64, jitter_pixels=1),
    student=StudentSchedule(epochs=30, batch_size=64),
)
"""scikit-learn's digits, where an epoch is 1,438 samples."""
