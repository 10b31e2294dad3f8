"""The trainer's state machine at length: hundreds of orders of events."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.trainer_machine import run_machine


@pytest.mark.parametrize("kind", ["zarr", "hdf5-int"])
def test_any_order_of_events(kind: str, tmp_path: Path) -> None:
    """No wrong row, no lost one, and no refusal without a reason."""
    run_machine(kind, tmp_path, examples=60, steps=30)
