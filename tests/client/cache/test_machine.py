"""Reading, damage, other bounds and clearing in any order: what comes out of a cache is what the store holds."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from softlabels.store import LocalRows
from softlabels.target_store import TargetStore
from softlabels_client.cache import CachedRows, CacheFolder

SAMPLES = 120
PLACES = st.lists(st.integers(0, SAMPLES - 1), min_size=1, max_size=30)
UNITS = st.floats(0, 1, exclude_max=True)
BOUNDS = st.sampled_from([1_000, 5_000, 9_000, 14_000, 1 << 30])


class CacheMachine(RuleBasedStateMachine):
    """One store behind a cache, and all that may happen to its files. Class attributes are set by `machine_of`."""

    root: Path
    same: Any
    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.cache = Path(tempfile.mkdtemp(dir=self.folder))
        self.near = TargetStore(LocalRows(self.root), where="near")
        self.ids = self.near.ids()
        self.views = {"views": 1} if self.near.manifest.layout.kind == "views" else {}
        self.store = self.opened(1 << 30, read_only=False)

    def opened(self, most_bytes: int, *, read_only: bool) -> TargetStore:
        """The store behind the cache."""
        rows = CachedRows(LocalRows(self.root), folder=self.cache, most_bytes=most_bytes, read_only=read_only)
        return TargetStore(rows, where="cached")

    def teardown(self) -> None:
        """Leave no files."""
        self.store.close()
        shutil.rmtree(self.cache)

    @rule(places=PLACES, fingerprints=st.booleans(), labels=st.booleans())
    def batch(self, places: list[int], fingerprints: bool, labels: bool) -> None:
        """Any samples, with any fields."""
        asked = {"fingerprints": fingerprints, "labels": labels, **self.views}
        self.same(self.store.batch(self.ids[places], **asked), self.near.batch(self.ids[places], **asked))

    @rule(
        epoch=st.integers(0, 3), batch_size=st.integers(5, 60), cursor=st.integers(0, SAMPLES), steps=st.integers(1, 9)
    )
    def epoch(self, epoch: int, batch_size: int, cursor: int, steps: int) -> None:
        """A part of an epoch, or all of it."""
        view = {"view": 1} if self.views else {}
        plan: dict[str, Any] = {"seed": 2, "epoch": epoch, "batch_size": batch_size, "cursor": cursor, **view}
        with self.store.epoch(**plan) as ours, self.near.epoch(**plan) as theirs:
            for _ in range(min(steps, len(theirs))):
                self.same(next(ours), next(theirs))
                assert ours.cursor == theirs.cursor

    @rule(most_bytes=BOUNDS, read_only=st.booleans(), first=st.booleans())
    def open_again(self, most_bytes: int, read_only: bool, first: bool) -> None:
        """Within another bound, while the old one is open or afterwards."""
        if first:
            self.store.close()
        before, self.store = self.store, self.opened(most_bytes, read_only=read_only)
        before.close()

    @rule(which=UNITS, places=st.lists(UNITS, min_size=1, max_size=20), bit=st.integers(0, 7))
    def flip(self, which: float, places: list[float], bit: int) -> None:
        """Bits of one file."""
        file = self.file(which)
        if file is not None and file.stat().st_size:
            content = bytearray(file.read_bytes())
            for place in places:
                content[int(place * len(content))] ^= 1 << bit
            with file.open("r+b") as opened:
                opened.write(content)

    @rule(which=UNITS, share=UNITS)
    def cut(self, which: float, share: float) -> None:
        """One file, anywhere."""
        file = self.file(which)
        if file is not None:
            with file.open("r+b") as opened:
                opened.truncate(int(share * file.stat().st_size))

    @rule(which=UNITS)
    def remove(self, which: float) -> None:
        """One file."""
        file = self.file(which)
        if file is not None:
            file.unlink()

    @rule()
    def clear(self) -> None:
        """What is not in use."""
        CacheFolder(self.cache).clear()

    def file(self, which: float) -> Path | None:
        """One of the cache's files."""
        files = sorted(path for path in self.cache.rglob("*") if path.is_file())
        return files[int(which * len(files))] if files else None


@pytest.mark.parametrize("kind", ["dense", "strings", "views"])
@pytest.mark.parametrize(
    ("examples", "steps"),
    [pytest.param(8, 15, id="few"), pytest.param(400, 40, id="many", marks=[pytest.mark.slow, pytest.mark.faults])],
)
def test_any_order_of_events(
    kind: str, examples: int, steps: int, stores: dict[str, Path], tmp_path: Path, refuse_difference: Any
) -> None:
    """No wrong row, no lost one, and no error that the store itself would not raise."""
    assert len(np.unique(TargetStore(LocalRows(stores[kind]), where="near").ids())) == SAMPLES
    machine = type(
        "Machine", (CacheMachine,), {"root": stores[kind], "same": staticmethod(refuse_difference), "folder": tmp_path}
    )
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
