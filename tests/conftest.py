"""What tests of several rooms share: the data folder, one small finished store, and a real server over it."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]

# Two cores shared with servers and training: a slow example says nothing about the code, so no deadline.
hypothesis.settings.register_profile("softlabels", deadline=None, print_blob=True)
hypothesis.settings.load_profile("softlabels")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets: `SOFTLABELS_DATA`, else `shared/data` beside the repository; skips without one."""
    named = os.environ.get("SOFTLABELS_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is no folder; set SOFTLABELS_DATA to one that holds mnist/ and the like")
    return folder
