"""Commits, kills, damage, resumes and repairs in any order: the store never reports anything false."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from softlabels.errors import SoftLabelsError, StoreExistsError, UnknownStoreError
from softlabels.store.copies import merge
from softlabels.store.repair import repair
from softlabels.store.verify import verify

SHARDS = 3
UNITS = st.floats(0, 1, exclude_max=True)


class StoreMachine(RuleBasedStateMachine):
    """One store and all that may happen to it. Its class attributes are set by `machine_of`."""

    kind_name: str
    kind: Any
    fork_server: Any
    expected: dict[str, str]
    pristine: Path
    tree: Callable[[Path], dict[str, str]]
    refuse_wrong_rows: Callable[[Path, str], int]
    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir=self.folder)) / "s"

    def teardown(self) -> None:
        """Leave no files."""
        shutil.rmtree(self.root.parent)

    # What a user does.

    @rule(shard=st.integers(0, SHARDS - 1))
    def commit(self, shard: int) -> None:
        """Write one shard, where the existing files allow it."""
        try:
            self.kind.race(self.root, shard)
        except SoftLabelsError:
            assert self.wrong(), "a sound store takes every shard"

    @rule()
    def resume(self) -> None:
        """Compute what is missing and publish."""
        try:
            self.kind.write(self.root)
        except SoftLabelsError:
            assert self.wrong(), "a sound store can be resumed"

    @rule()
    def repair_and_resume(self) -> None:
        """Whatever happened before, afterwards the store is bit-identical with an undisturbed one."""
        # Where the plan was lost, the writer brings back what the rest of the damage can be told by: hence twice.
        for last in (False, True):
            self.mend()
            try:
                self.kind.write(self.root)
            except StoreExistsError:
                # Plan, manifest and every receipt are gone: what lies there is nobody's, and is not overwritten.
                assert not any(self.found().get(name) == self.expected[name] for name in self.receipts())
                shutil.rmtree(self.root)
            except SoftLabelsError:
                assert not last
        differs = {path for path, digest in self.expected.items() if self.found().get(path) != digest}
        assert {path for path in differs if not self.means_the_same(path)} == set()
        assert set(self.found()) == set(self.expected)
        assert verify(self.root).sound

    @rule()
    def mend(self) -> None:
        """Repair; afterwards only unfinished work is reported, and tables that only the transfer set can restore."""
        try:
            done = repair(self.root)
        except UnknownStoreError:
            return
        if not done.plan_lost:
            left = [fault for fault in verify(self.root, every_fault=True).faults if fault.kind != "unfinished"]
            assert all(fault.kind == "missing" and str(fault.path).startswith("index/") for fault in left), left
            assert self.kind.sequences or not left

    @rule()
    def merge_elsewhere(self) -> None:
        """What can be united with nothing else is a store without a wrong row."""
        target = self.root.with_name("merged")
        with contextlib.suppress(SoftLabelsError):
            merge([self.root], target)
        if target.exists():
            self.refuse_wrong_rows(target, self.kind_name)
            shutil.rmtree(target)

    # What befalls it.

    @rule(after=UNITS)
    def kill_a_writer(self, after: float) -> None:
        """kill -9 somewhere on the way from beginning to end."""
        pid = self.fork_server.start("write", root=self.root, kind=self.kind_name)
        # Not `time.sleep`: the moment is a count of looks at the store's own growth, so that it falls on work.
        for _ in range(int(after * 300)):
            os.path.exists(self.root)
        os.kill(pid, 9)
        assert self.fork_server.wait() in (-9, 0, 3), self.fork_server.said()

    @rule(which=UNITS, where=UNITS, bit=st.integers(0, 7))
    def flip(self, which: float, where: float, bit: int) -> None:
        """One bit of any file."""
        path = self.pick(which)
        raw = bytearray(b"" if path is None else path.read_bytes())
        if path is not None and raw:
            raw[int(where * len(raw))] ^= 1 << bit
            path.write_bytes(raw)

    @rule(which=UNITS)
    def delete(self, which: float) -> None:
        """Any file."""
        path = self.pick(which)
        if path is not None:
            path.unlink()

    @rule(which=UNITS, where=UNITS)
    def truncate(self, which: float, where: float) -> None:
        """Any file, to any length."""
        path = self.pick(which)
        if path is not None:
            os.truncate(path, int(where * path.stat().st_size))

    # What must hold all the time.

    @invariant()
    def nothing_wrong_is_served(self) -> None:
        """Every row of every field, by number and by id: right, or refused."""
        if self.root.exists():
            self.refuse_wrong_rows(self.root, self.kind_name)

    @invariant()
    def verify_tells_the_truth(self) -> None:
        """It reports damage exactly where there is any."""
        if not self.root.exists():
            return
        try:
            kinds = {fault.kind for fault in verify(self.root, every_fault=True).faults}
        except UnknownStoreError:
            assert not {"plan.json", "manifest.json"} & set(self.found())
            return
        if self.wrong():
            assert kinds - {"unfinished"}, self.wrong()
        else:
            assert kinds <= {"unfinished"}
            assert bool(kinds) == ("manifest.json" not in self.found())

    # The model: what an undisturbed store holds, file by file.

    def found(self) -> dict[str, str]:
        """The store's files as they are."""
        return type(self).tree(self.root) if self.root.exists() else {}

    def files(self) -> list[str]:
        """The store's files that damage may befall."""
        return [path for path in self.found() if path in self.expected]

    def pick(self, which: float) -> Path | None:
        """One of them. No rule has a precondition: what a killed writer leaves differs from run to run."""
        files = self.files()
        return self.root / files[int(which * len(files))] if files else None

    def receipts(self) -> list[str]:
        """Paths of the receipts of a whole store."""
        return [path for path in self.expected if path.startswith("ledger/")]

    def wrong(self) -> set[str]:
        """Files that are damaged or missing, and that the manifest or a receipt lists."""
        found = self.found()
        vouched = {path for path in ("plan.json", "manifest.json", *self.receipts()) if path in found}
        if "manifest.json" in found:
            vouched = set(self.expected)
        elif {path for path in found if path in self.expected} and "plan.json" not in found:
            vouched.add("plan.json")
        for number, receipt in enumerate(self.receipts()):
            if receipt in found:
                vouched |= {path for path in self.expected if shard_of(path) == number}
        if "plan.json" in found and self.kind.sequences:
            vouched |= {path for path in self.expected if path.startswith("index/")}
        return {path for path in vouched if found.get(path) != self.expected[path] and not self.means_the_same(path)}

    def means_the_same(self, path: str) -> bool:
        """Whether a document says what it should, spelt otherwise: without its last newline, with 1E-05 for 1e-05."""
        if not path.endswith(".json") or path.endswith("zarr.json") or not (self.root / path).exists():
            return False
        try:
            return bool(json.loads((self.root / path).read_bytes()) == json.loads((self.pristine / path).read_bytes()))
        except ValueError:
            return False


def shard_of(path: str) -> int | None:
    """The shard that a file of a store belongs to."""
    parts = path.split("/")
    if parts[0] == "shards":
        return int(parts[1].removesuffix(".h5"))
    return int(parts[2]) if len(parts) > 2 and parts[1] == "c" else None


@pytest.fixture
def machine(
    fork_server: Any,
    undisturbed: Callable[[str], Path],
    kind_of: Callable[..., Any],
    tree: Callable[[Path], dict[str, str]],
    refuse_wrong_rows: Callable[[Path, str], int],
    tmp_path: Path,
) -> Callable[[str], type[StoreMachine]]:
    """The machine over stores of a kind."""

    def machine_of(kind_name: str) -> type[StoreMachine]:
        facts = {
            "kind_name": kind_name,
            "kind": kind_of(kind_name),
            "fork_server": fork_server,
            "expected": tree(undisturbed(kind_name)),
            "pristine": undisturbed(kind_name),
            "tree": staticmethod(tree),
            "refuse_wrong_rows": staticmethod(refuse_wrong_rows),
            "folder": tmp_path,
        }
        return type("Machine", (StoreMachine,), facts)

    return machine_of


@pytest.mark.parametrize("kind_name", ["zarr", "hdf5-int", "zarr-sequences"])
def test_any_order_of_events(machine: Callable[[str], type[StoreMachine]], kind_name: str) -> None:
    """60 lives of a store of up to 25 events each."""
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine(kind_name),
        settings=settings(
            max_examples=60,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
