"""The trainer's state machine in short; tests/faults runs it at length."""

from __future__ import annotations

from pathlib import Path

from tests.faults.trainer_machine import run_machine


def test_any_order_of_events(tmp_path: Path) -> None:
    """Servers killed, stores replaced and damaged, caches, resumed epochs and trainings: rows are right or refused."""
    run_machine("zarr", tmp_path, examples=3, steps=12)
