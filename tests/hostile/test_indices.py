"""The index of ids is a NumPy file: no pickle is loaded from it, and no position in it leads to a wrong row."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softlabels
from softlabels.errors import ManifestError


class Exploit:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (os.environ["SOFTLABELS_TEST_EXPLOIT"],))


def npy(array: Any) -> bytes:
    """An array as a `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def npz(array: Any) -> bytes:
    """An archive of arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, x=array)
    return buffer.getvalue()


@pytest.fixture
def looked_up(make_store: Callable[..., Path]) -> Path:
    """A store whose ids are looked up: 0, 3, 6, … in no order."""
    return make_store("zarr", looked_up=True)


class TestFiles:
    @pytest.mark.parametrize("name", ["sorted_ids.npy", "positions.npy"])
    def test_what_is_no_plain_array(
        self, looked_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        """Pickles, archives, objects, other types and shapes, headers that lie: refused when the store is opened."""
        exploited = tmp_path / "exploited"
        monkeypatch.setenv("SOFTLABELS_TEST_EXPLOIT", str(exploited))
        objects = np.empty(100, dtype=object)
        objects[:] = [Exploit()] * 100
        whole = np.arange(100, dtype="<i8")
        huge = npy(whole).replace(b"(100,)", b"(1<<60,)".ljust(8))
        contents = {
            "an array of objects": npy(objects),
            "a pickle": pickle.dumps([Exploit()]),
            "an archive": npz(whole),
            "floats": npy(whole.astype(np.float64)),
            "unsigned": npy(whole.astype(np.uint64)),
            "big-endian": npy(whole.astype(">i8")),
            "strings": npy(whole.astype("<U3")),
            "times": npy(whole.astype("<M8[s]")),
            "records": npy(np.zeros(100, dtype=[("a", "<i8")])),
            "another length": npy(whole[:99]),
            "two axes": npy(whole.reshape(10, 10)),
            "an endless shape": huge,
            "cut short": npy(whole)[:-1],
            "nothing": b"",
            "a header without end": b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535,
        }
        for what, raw in contents.items():
            (looked_up / "index" / name).write_bytes(raw)
            with pytest.raises(ManifestError):
                softlabels.open(looked_up)
            assert not exploited.exists(), what

    def test_a_link(self, looked_up: Path) -> None:
        """An index that is a link is refused."""
        path = looked_up / "index" / "positions.npy"
        path.rename(looked_up.parent / "moved")
        path.symlink_to(looked_up.parent / "moved")
        with pytest.raises(ManifestError, match="not a plain file"):
            softlabels.open(looked_up)


class TestPositions:
    @pytest.mark.parametrize("value", [-1, 100, 1 << 40, -(1 << 63), (1 << 63) - 1])
    def test_one_that_leads_outside(self, looked_up: Path, value: int) -> None:
        """A position that the store does not have is an error, not the last row, and not another process's memory."""
        positions = np.load(looked_up / "index" / "positions.npy")
        positions[7] = value
        (looked_up / "index" / "positions.npy").write_bytes(npy(positions))
        with pytest.raises(ManifestError):
            softlabels.open(looked_up).batch([7 * 3])

    def test_one_that_leads_to_another_sample(self, looked_up: Path) -> None:
        """An index that swaps two samples is noticed, because rows carry their own ids."""
        positions = np.load(looked_up / "index" / "positions.npy")
        positions[[7, 8]] = positions[[8, 7]]
        (looked_up / "index" / "positions.npy").write_bytes(npy(positions))
        with pytest.raises(ManifestError, match="other samples"):
            softlabels.open(looked_up).batch([7 * 3])

    def test_ids_that_are_hidden(self, looked_up: Path) -> None:
        """Before an id is called unknown the index itself is verified."""
        ids = np.load(looked_up / "index" / "sorted_ids.npy")
        ids[7] += 1
        (looked_up / "index" / "sorted_ids.npy").write_bytes(npy(ids))
        with pytest.raises(ManifestError, match="damaged"):
            softlabels.open(looked_up).batch([7 * 3])
