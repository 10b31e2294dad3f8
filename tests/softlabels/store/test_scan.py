"""`LocalRows.scan`: every row in order, a chunk at a time, without a copy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.errors import ChecksumError, RowsNotCommittedError, UnknownFieldError
from softlabels.store import LocalRows


class TestScan:
    def test_it_gives_every_row_once(self, store: Path, source: Any) -> None:
        """In order, the padding of the last chunk left out, all fields side by side."""
        pieces = list(LocalRows(store).scan(("targets", "labels")))
        assert [row for rows, _ in pieces for row in rows] == list(range(200))
        joined = {name: np.concatenate([found[name] for _, found in pieces]) for name in ("targets", "labels")}
        np.testing.assert_array_equal(joined["targets"], source.logits())
        np.testing.assert_array_equal(joined["labels"], source.labels())

    @pytest.mark.parametrize("start", [0, 15, 16, 70, 199, 200])
    def test_from_any_row_on(self, store: Path, source: Any, start: int) -> None:
        """Also from the middle of a chunk."""
        pieces = [found["targets"] for _, found in LocalRows(store).scan(("targets",), start=start)]
        joined = np.concatenate(pieces) if pieces else np.empty((0, 10))
        np.testing.assert_array_equal(joined, source.logits()[start:])

    def test_views_and_not_copies(self, store: Path) -> None:
        """The arrays lie in the mapped files: nobody may write to them, and they outlive the reader."""
        rows = LocalRows(store)
        _, found = next(rows.scan(("targets",)))
        before = found["targets"].copy()
        assert not found["targets"].flags.writeable
        rows.close()
        del rows
        np.testing.assert_array_equal(found["targets"], before)

    def test_what_is_damaged_is_not_given(self, store: Path, flip: Callable[..., None]) -> None:
        """The rows before it are."""
        path = store / "targets" / "c" / "0" / "0"
        path = path if path.exists() else store / "shards" / "00000000.h5"
        flip(
            path,
            byte=path.read_bytes().find(LocalRows(store).fetch_rows(np.array([20]), ("targets",))["targets"].tobytes()),
        )
        scan = LocalRows(store).scan(("targets",))
        next(scan)
        with pytest.raises(ChecksumError):
            next(scan)

    def test_what_is_missing(self, source: Any, tmp_path: Path) -> None:
        """A shard that is not committed yet, a field that is not kept."""
        source.write(tmp_path / "s", shards=[0])
        with pytest.raises(RowsNotCommittedError):
            list(LocalRows(tmp_path / "s").scan(("targets",)))
        with pytest.raises(UnknownFieldError):
            next(LocalRows(tmp_path / "s").scan(("logits",)))
