"""A million requests changed at random: the fast path answers as the application does, with no row to strangers."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path

import pytest

from tests.server.fast_path.mutated_requests import compare

REQUESTS = 1_000_000

SEED = 2026


@pytest.mark.slow
def test_a_million_mutated_requests(soak_stores: Path, tmp_path: Path) -> None:
    """Byte for byte, over all connections."""
    for name in ("dense", "halves"):
        shutil.copytree(soak_stores / "small", tmp_path / name)
    began = time.monotonic()
    found = asyncio.run(compare(tmp_path, seed=SEED, requests=REQUESTS))
    print(f"{found}, seed {SEED}, {time.monotonic() - began:.0f} s")
    assert found.requests >= REQUESTS
    assert found.from_plans > REQUESTS // 20
