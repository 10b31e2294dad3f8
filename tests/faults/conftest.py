"""Real processes to kill and real stores to damage."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from softlabels.errors import SoftLabelsError
from softlabels.store.store_reader import LocalRows

HERE = Path(__file__).parent
NOT_COMPARED = ("locks", "staging", "damaged")
"""Folders that are not part of a store's contents."""

PATIENCE_S = 60.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder is a fault test: it kills or damages something, many times over."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.faults)
            item.add_marker(pytest.mark.timeout(1800))


def load_fork_server() -> ModuleType:
    """The fork server's module, which defines the kinds of stores."""
    spec = importlib.util.spec_from_file_location("softlabels_fault_fork_server", HERE / "fork_server.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


FORK_SERVER = load_fork_server()


class ForkServer:
    """The fork server's process; `start` a task, disturb it, and `wait` for its end."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "fork_server.py"), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self._line() == "ready"

    def start(self, do: str, **task: Any) -> int:
        """Start a task in a child; return its pid."""
        self.log.unlink(missing_ok=True)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, "log": str(self.log), **task}, default=str) + "\n")
        return int(json.loads(self._line())["pid"])

    def wait(self) -> int:
        """The child's exit code; −9 where it was killed."""
        return int(json.loads(self._line())["code"])

    def run(self, do: str, **task: Any) -> int:
        """Run a task to its end."""
        self.start(do, **task)
        return self.wait()

    def said(self) -> str:
        """What the last child reported."""
        return self.log.read_text() if self.log.exists() else ""

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=PATIENCE_S)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the fork server died"
        return line.strip()


@pytest.fixture(scope="session")
def make_fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ForkServer]]:
    """Starts fork servers; all end with the session."""
    started: list[ForkServer] = []

    def make(*arguments: str) -> ForkServer:
        started.append(ForkServer(tmp_path_factory.mktemp("fork_server") / "log", *arguments))
        return started[-1]

    yield make
    for fork_server in started:
        fork_server.close()


@pytest.fixture(scope="session")
def fork_server(make_fork_server: Callable[..., ForkServer]) -> ForkServer:
    """One fork server for all tests."""
    return make_fork_server()


@pytest.fixture(scope="session")
def undisturbed(fast_folder: Path) -> Callable[[str], Path]:
    """An undamaged finished store of each kind; must not be changed."""
    made: dict[str, Path] = {}

    def find(kind: str) -> Path:
        if kind not in made:
            made[kind] = fast_folder / f"undisturbed-{kind}"
            FORK_SERVER.Kind(kind).write(made[kind])
        return made[kind]

    return find


@pytest.fixture
def damaged_copy(tmp_path: Path, undisturbed: Callable[[str], Path]) -> Callable[[str], Path]:
    """A copy of the undisturbed store of a kind, to be damaged."""
    numbers = itertools.count()

    def copy(kind: str) -> Path:
        return Path(shutil.copytree(undisturbed(kind), tmp_path / f"copy-{next(numbers)}"))

    return copy


@pytest.fixture(scope="session")
def kind_of() -> Callable[..., Any]:
    """What a kind of store is made of, by name."""
    kind: Callable[..., Any] = FORK_SERVER.Kind
    return kind


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, str]]:
    """SHA-256 of every file of a store by path, without locks, staging and damaged files."""

    def tree(root: Path) -> dict[str, str]:
        found = {}
        for path in sorted(root.rglob("*")):
            inner = path.relative_to(root)
            if path.is_file() and inner.parts[0] not in NOT_COMPARED:
                found[str(inner)] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    return tree


@pytest.fixture(scope="session")
def refuse_wrong_rows() -> Callable[[Path, str], int]:
    """Reads every row and field of a store in every way there is; what is returned must be what was written.

    Returns how many rows were served; what is refused with an error of the product's own is not counted.
    """

    def check(root: Path, name: str) -> int:
        kind = FORK_SERVER.Kind(name)
        served = 0
        try:
            rows = LocalRows(root)
        except SoftLabelsError:
            return 0
        for field in rows.manifest.arrays:
            for number in range(rows.manifest.shards.count):
                span = range(
                    number * FORK_SERVER.ROWS_PER_SHARD, min((number + 1) * FORK_SERVER.ROWS_PER_SHARD, kind.plan.rows)
                )
                try:
                    found = rows.fetch_rows(np.arange(span.start, span.stop), (field,))[field]
                except SoftLabelsError:
                    continue
                np.testing.assert_array_equal(
                    found, expected_rows(kind, span, field), err_msg=f"{field}, shard {number}"
                )
                served += len(span)
        return served + served_by_id(kind, rows)

    return check


def expected_rows(kind: Any, span: range, field: str) -> Any:
    """What was written of a field."""
    contents = kind.contents(span)
    found = {**contents["encoded"], **contents}[field]
    return found.astype(np.int32) if field == "labels" else found


def served_by_id(kind: Any, rows: LocalRows) -> int:
    """Rows returned by sample id, one sample at a time."""
    served = 0
    keys: dict[str, Any] = {"views": np.array([1])} if kind.views > 1 else {}
    for position in range(0, FORK_SERVER.SAMPLES, 7):
        try:
            found = rows.fetch(kind.ids[position : position + 1], ("targets",), **keys)["targets"]
        except SoftLabelsError:
            continue
        np.testing.assert_array_equal(found, expected_of_sample(kind, position))
        served += len(found)
    return served


def expected_of_sample(kind: Any, position: int) -> Any:
    """The targets of a sample (of its view 1, where there are views)."""
    first, count = position, 1
    if kind.sequences:
        lengths = kind.table.lengths
        first, count = int(lengths[:position].sum()), int(lengths[position])
    elif kind.views > 1:
        first = position * kind.views + 1
    pieces = []
    for row in range(first, first + count):
        shard = row // FORK_SERVER.ROWS_PER_SHARD
        span = range(shard * FORK_SERVER.ROWS_PER_SHARD, min((shard + 1) * FORK_SERVER.ROWS_PER_SHARD, kind.plan.rows))
        pieces.append(kind.contents(span)["encoded"]["targets"][row - span.start])
    shape = (0, *((kind.members,) if kind.members else ()), FORK_SERVER.CLASSES)
    return np.stack(pieces) if pieces else np.empty(shape, "<f2")


@pytest.fixture(scope="session")
def fast_folder() -> Iterator[Path]:
    """A folder in memory where possible: fsync is free there, so a kill is as likely at any other call."""
    memory = Path("/dev/shm")
    place = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place, prefix="softlabels-faults-") as folder:
        yield Path(folder)


@pytest.fixture
def tmp_path(fast_folder: Path) -> Iterator[Path]:
    """A fresh folder in memory."""
    folder = Path(tempfile.mkdtemp(dir=fast_folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers, different on each run: `SOFTLABELS_FAULT_SEED` repeats a run that failed."""
    seed = int(os.environ.get("SOFTLABELS_FAULT_SEED", time.time_ns() % 2**32))
    print(f"SOFTLABELS_FAULT_SEED={seed}")
    return np.random.default_rng(seed)


def wait_until_stopped(pid: int) -> None:
    """Wait until a process has stopped itself."""
    give_up = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return
        time.sleep(0.001)
    pytest.fail("the child did not stop")


@pytest.fixture(scope="session")
def stopped() -> Callable[[int], None]:
    """Waits until a child has stopped itself."""
    return wait_until_stopped


@pytest.fixture(scope="session")
def go_on() -> Callable[[int], None]:
    """Resumes a stopped child."""
    return lambda pid: os.kill(pid, signal.SIGCONT)


@pytest.fixture(params=FORK_SERVER.KINDS)
def kind_name(request: pytest.FixtureRequest) -> str:
    """Every kind of store."""
    return str(request.param)
