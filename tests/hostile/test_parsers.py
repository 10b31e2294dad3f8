"""Parsers of outside bytes: thousands of changed inputs, and never another error than ours."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("hostile_parsers", Path(__file__).with_name("parsers.py"))
assert SPEC is not None
assert SPEC.loader is not None
parsers = importlib.util.module_from_spec(SPEC)
sys.modules["hostile_parsers"] = parsers
SPEC.loader.exec_module(parsers)

QUICK = 1000
SLOW = 100
"""Inputs for parsers that read a file, which takes milliseconds."""


@pytest.mark.parametrize("name", list(parsers.PARSERS))
def test_changed_inputs(name: str) -> None:
    """The seeds are accepted, and each changed input is accepted or refused by an error of this package."""
    parser = parsers.PARSERS[name]
    assert all(parsers.accepts(parser, seed) for seed in parsers.seeds(name))
    count = SLOW if name in ("sorted_ids", "positions", "checkpoint", "cache_table", "job_file") else QUICK
    for raw in parsers.mutations(name, count=count, seed=0):
        try:
            parsers.accepts(parser, raw)
        except Exception as error:  # noqa: BLE001 - whatever it is, the input must be shown
            pytest.fail(f"{name} raised {error!r} for {raw!r}")
