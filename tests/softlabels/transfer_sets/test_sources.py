"""The registry of sources: short names, references, and arguments that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from softlabels.errors import JobError, ReferenceLoadError
from softlabels.transfer_sets import check_source, load_transfer_set

PARTS = """
import numpy as np
from softlabels.transfer_set import ArrayTransferSet

READY = ArrayTransferSet("ready", np.zeros((2, 3)))


def made(count, *, seed=0):
    return ArrayTransferSet("made", np.full((count, 2), seed))


def anything(**words):
    return ArrayTransferSet("any", np.zeros((len(words), 1)))


def number():
    return 3
"""


class TestLoading:
    @pytest.fixture
    def load(self, tmp_path: Path) -> Any:
        """Loads from a file of the user's."""
        (tmp_path / "parts.py").write_text(PARTS)
        return lambda source, **arguments: load_transfer_set(source, arguments, base=tmp_path)

    def test_functions_and_ready_sets(self, load: Any) -> None:
        """A callable gets the arguments; anything else is taken as it is."""
        assert len(load("parts.py:made", count=4, seed=1)) == 4
        assert load("parts.py:READY").name == "ready"
        assert len(load("parts.py:anything", a=1, b=2)) == 2

    @pytest.mark.parametrize(
        ("source", "arguments", "words"),
        [
            ("parts.py:made", {"cuont": 3}, "no argument `cuont`; did you mean `count`"),
            ("parts.py:made", {"count": 3, "zzz": 1}, "no argument `zzz`; it takes .count, .*seed=0"),
            ("parts.py:made", {}, "missing a required argument:.*count"),
            ("parts.py:number", {}, "returns a int, not a TransferSet"),
        ],
    )
    def test_functions_that_do_not_fit(self, load: Any, source: str, arguments: Any, words: str) -> None:
        """The argument is named, with the nearest that there is."""
        with pytest.raises(JobError, match=words):
            load(source, **arguments)

    def test_references_that_lead_nowhere(self, load: Any) -> None:
        """As everywhere."""
        with pytest.raises(ReferenceLoadError, match="nothing"):
            load("parts.py:nothing")

    @pytest.mark.parametrize(
        ("source", "words"),
        [
            ("imagefolder", "did you mean `image_folder`"),
            ("h5", "`hdf5`"),
            ("lmdb", "use one of image_folder"),
            ("zar", "`zarr`"),
            ("", "use one of image_folder"),
        ],
    )
    def test_a_kind_that_is_unknown(self, source: str, words: str) -> None:
        """With the nearest one, and all."""
        with pytest.raises(JobError, match=words):
            check_source(source)
