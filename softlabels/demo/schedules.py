"""How long is everything in the demo trained? Chosen on held-out training data, for two cores and five minutes."""

from __future__ import annotations

from dataclasses import dataclass

from softlabels.demo.teachers import TeacherSchedule


@dataclass(frozen=True, kw_only=True)
class StudentSchedule:
    """How a student is trained, alone and distilled: the same epochs and batches, each at the rate that suits it.

    Attributes:
        learning_rate: of the distilled student. The soft term of a confident teacher at T = 20 diverges at rates that
            hard labels bear.
        hard_learning_rate: of the student alone.
        hard_weight: of the labels beside the soft targets; plays no part for the student alone.
    """

    epochs: int
    batch_size: int = 256
    learning_rate: float = 0.1
    hard_learning_rate: float = 0.2
    hard_weight: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """How many teachers there are, and how long everybody is trained."""

    teachers: int
    teacher: TeacherSchedule
    student: StudentSchedule


DEMO = Schedules(teachers=2, teacher=TeacherSchedule(epochs=10), student=StudentSchedule(epochs=12))
"""MNIST, within the five minutes of the demo."""

QUICK = Schedules(teachers=1, teacher=TeacherSchedule(epochs=30), student=StudentSchedule(epochs=30))
"""MNIST, three seeds in a quarter of an hour. On 10,000 held-out training digits, 50,000 trained on: this teacher makes
90 errors (138 with the dropout of the paper and a max-norm: that needs many more epochs); the student alone 143 and 160
at rate 0.2 (two seeds, 20 epochs), 155 and 175 at 0.1; distilled 106 at rate 0.1. Rates of 0.15 and 0.2 let the
distilled student of some teachers diverge."""

SMALL = Schedules(
    teachers=2,
    teacher=TeacherSchedule(epochs=20, batch_size=64, learning_rate=0.1, jitter_pixels=1),
    student=StudentSchedule(epochs=15, batch_size=64, hard_learning_rate=0.1),
)
"""scikit-learn's digits, where an epoch is 1,438 samples."""
