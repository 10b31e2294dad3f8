"""A store that is damaged, replaced, repaired and served by a server that is killed, and clients that keep reading."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from softlabels.errors import SoftLabelsError
from softlabels.store.repair import repair
from softlabels.store.store_reader import LocalRows
from softlabels.target_store import TargetStore
from softlabels_client import HttpRows
from softlabels_client.cache import CachedRows
from tests.faults.generator.judging import Questions, Verdict
from tests.faults.generator.readers import QUICK, TIMEOUT_S, Server
from tests.faults.generator.stores import NOT_CONTENTS, Stores, read_tree, write_tree

UNITS = st.floats(0, 1, exclude_max=True)
VERSIONS = st.sampled_from(["current", "rival", "older"])
READERS = ("folder", "server", "cache")


class ClientMachine(RuleBasedStateMachine):
    """One served store, three readers of it, and all that may happen. Its class attributes are set by the test."""

    stores: Stores
    server: Server
    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.root = self.folder / "served" / "s"
        self.cache = Path(tempfile.mkdtemp(dir=self.folder))
        self.readers: dict[str, TargetStore] = {}
        self.questions = Questions(np.random.default_rng(0), self.stores.models[self.stores.digests["current"]])
        write_tree(self.root, self.stores.trees["current"])

    def teardown(self) -> None:
        """Let go of everything."""
        for store in self.readers.values():
            store.close()
        shutil.rmtree(self.cache)

    # What users do.

    @rule(which=st.sampled_from(READERS))
    def open(self, which: str) -> None:
        """Open the store anew; an untouched one opens, under its own digest."""
        old = self.readers.pop(which, None)
        if old is not None:
            old.close()
        try:
            self.readers[which] = self._opened(which)
        except SoftLabelsError as error:
            if self._version() is not None:
                pytest.fail(f"an undamaged store was not opened: {error!r}")
            return
        if (version := self._version()) is not None:
            assert self.readers[which].digest == self.stores.digests[version]

    @rule(which=st.sampled_from(READERS))
    def read(self, which: str) -> None:
        """What is returned is right by the digest that was opened; of an untouched store, all is returned."""
        store = self.readers.get(which)
        if store is None:
            return
        if which != "folder":
            self.server.address()
        verdict = Verdict()
        self.questions.everything(store, self.stores.models, verdict)
        assert not verdict.wrong, verdict.wrong
        version = self._version()
        if version is not None and store.digest == self.stores.digests[version] and which == "server":
            assert not verdict.codes, f"an undamaged store was refused: {verdict.codes}"

    @rule()
    def repair_and_resume(self) -> None:
        """Repaired and computed again, the store is what it was, or repair says that it cannot know."""
        try:
            done = repair(self.root)
            if not (done.mixed or done.plan_lost):
                self.stores.kind.write(self.root)
        except SoftLabelsError:
            return

    # What befalls the store.

    @rule(version=VERSIONS, renamed=st.booleans())
    def replace(self, version: str, renamed: bool) -> None:
        """Another version, whole: the folder renamed, or every file overwritten in place."""
        tree = self.stores.trees[version]
        if renamed:
            fresh = write_tree(self.root.with_name(".s-new"), tree)
            gone = self.root.with_name(".s-gone")
            os.rename(self.root, gone)
            os.rename(fresh, self.root)
            shutil.rmtree(gone)
            return
        for path in read_tree(self.root).keys() - tree.keys():
            (self.root / path).unlink()
        for name in NOT_CONTENTS:
            shutil.rmtree(self.root / name, ignore_errors=True)
        for path, raw in tree.items():
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            (self.root / path).write_bytes(raw)

    @rule(version=VERSIONS, which=UNITS)
    def replace_one_file(self, version: str, which: float) -> None:
        """One file of another version, renamed over this one's."""
        paths = sorted(self.stores.trees[version])
        path = paths[int(which * len(paths))]
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / "aside.new").write_bytes(self.stores.trees[version][path])
        os.replace(self.root / "aside.new", self.root / path)

    @rule(which=UNITS, where=UNITS, bit=st.integers(0, 7))
    def flip(self, which: float, where: float, bit: int) -> None:
        """One bit of any file, in place."""
        path = self._pick(which)
        raw = bytearray(path.read_bytes())
        if raw:
            raw[int(where * len(raw))] ^= 1 << bit
            path.write_bytes(raw)

    @rule(which=UNITS, where=UNITS)
    def truncate(self, which: float, where: float) -> None:
        """Any file, to any length, also one that is mapped."""
        path = self._pick(which)
        os.truncate(path, int(where * path.stat().st_size))

    @rule(chance=st.integers(0, 3))
    def kill_the_server(self, chance: int) -> None:
        """kill -9, now and then; the next one, which listens at the same port, is started when it is needed."""
        if chance == 0:
            self.server.close()

    def _opened(self, which: str) -> TargetStore:
        url = f"{self.server.address()}/s"
        if which == "folder":
            return TargetStore(LocalRows(self.root), where="folder")
        rows: Any = HttpRows(url, timeout_s=TIMEOUT_S, retry=QUICK)
        return TargetStore(CachedRows(rows, folder=self.cache) if which == "cache" else rows, where=url)

    def _version(self) -> str | None:
        """The version that lies there, untouched; None for anything else."""
        found = read_tree(self.root)
        return next((name for name in VERSIONS_OF_STORES if found == self.stores.trees[name]), None)

    def _pick(self, which: float) -> Path:
        paths = sorted(read_tree(self.root))
        return self.root / paths[int(which * len(paths))]


VERSIONS_OF_STORES = ("current", "rival", "older")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Server]]:
    """A folder with `served/` in it, and a server over that."""
    folder = tmp_path_factory.mktemp("machine")
    (folder / "served").mkdir()
    server = Server(folder / "served")
    yield folder, server
    server.close()


@pytest.mark.parametrize("kind", ["zarr-wide", "hdf5-int", "zarr-sequences"])
def test_any_order_of_events(served: tuple[Path, Server], kind: str) -> None:
    """10 lives of up to 20 events each."""
    folder, server = served
    facts = {"stores": Stores.make(kind, folder / "made"), "server": server, "folder": folder}
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        type("Machine", (ClientMachine,), facts),
        settings=settings(
            max_examples=10, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
