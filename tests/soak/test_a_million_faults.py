"""A million generated faults: the long form of `tests/faults/test_generated_faults.py`."""

from __future__ import annotations

import os
import time

import pytest

from tests.faults.generator.judging import WRONG
from tests.faults.generator.run import report, run, untried

COUNT = 1_000_000


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(28_800)
def test_a_million_faults() -> None:
    """Not one wrong row; `SOFTLABELS_FAULT_COUNT` and `SOFTLABELS_FAULT_SEED` set another count and repeat a run."""
    seed = int(os.environ.get("SOFTLABELS_FAULT_SEED", time.time_ns() % 2**32))
    count = int(os.environ.get("SOFTLABELS_FAULT_COUNT", COUNT))
    began = time.monotonic()
    results = run(count, seed, processes=os.cpu_count() or 2)
    print(report(results, seed, time.monotonic() - began))
    assert [result for result in results if result.outcome == WRONG] == []
    assert untried(results) == []
