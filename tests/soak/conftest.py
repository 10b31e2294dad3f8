"""What the long runs share: two stores, real server processes, and what such a process holds."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from softlabels.audit import Audit
from softlabels.encodings import make_encoding
from softlabels.manifest import IdSpec, TemperatureSpec, TransferSetSpec
from softlabels.store import StoreWriter, plan_store

START_S = 60.0
"""Far more than a start takes: the machine may be busy."""

SIZES = {"small": (20_000, 10, "f32"), "large": (20_000, 1_000, "f16")}
"""Samples, classes and encoding: 0.8 MB for many requests, 40 MB for streams that no kernel buffer holds."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server process.

    Attributes:
        popen: the process that was started.
        url: where it serves.
        log: what it printed.
    """

    popen: subprocess.Popen[bytes]
    url: str
    log: Path

    @property
    def host(self) -> str:
        """Where to connect to."""
        return self.url.removeprefix("http://").rpartition(":")[0]

    @property
    def port(self) -> int:
        """Where to connect to."""
        return int(self.url.rpartition(":")[2])

    def anonymous_mb(self) -> float:
        """Memory of its own: mapped files, which the system can drop at any time, do not count."""
        return self._status_mb("RssAnon")

    def resident_mb(self) -> float:
        """Memory with the pages of the stores that it has touched."""
        return self._status_mb("VmRSS")

    def open_files(self) -> int:
        """Sockets among them."""
        return len(os.listdir(f"/proc/{self.popen.pid}/fd"))

    def _status_mb(self, what: str) -> float:
        text = Path(f"/proc/{self.popen.pid}/status").read_text(encoding="ascii")
        found = re.search(rf"{what}:\s+(\d+) kB", text)
        assert found is not None
        return int(found.group(1)) / 1024


Serve = Callable[..., Served]


@pytest.fixture(scope="session")
def soak_stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stores `small` and `large`; nobody writes to it."""
    root = tmp_path_factory.mktemp("soak")
    for name, (samples, classes, encoding) in SIZES.items():
        _write(root / name, samples, classes, encoding)
    return root


@pytest.fixture
def serve(soak_stores: Path, tmp_path: Path) -> Iterator[Serve]:
    """Start `softlabels serve` over the two stores, with more arguments of the test's choice; ended with the test."""
    if not Path("/proc/self/status").exists():
        pytest.skip("what a process holds is read from /proc, which only Linux has")
    started: list[subprocess.Popen[bytes]] = []

    def begin(*arguments: object) -> Served:
        log = tmp_path / f"server-{len(started)}.log"
        command = [sys.executable, "-m", "softlabels", "serve", soak_stores, "--port", "0", *map(str, arguments)]
        with log.open("wb") as output:
            started.append(subprocess.Popen(command, stdout=output, stderr=output))
        give_up = time.monotonic() + START_S
        while time.monotonic() < give_up and started[-1].poll() is None:
            if found := re.search(r" at (http://\S+)$", log.read_text(), re.MULTILINE):
                return Served(popen=started[-1], url=found.group(1), log=log)
            time.sleep(0.02)
        pytest.fail(f"the server did not start:\n{log.read_text()}")

    yield begin
    for process in started:
        process.terminate()
    for process in started:
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def many_files() -> None:
    """As many open files as the system lets this process have; its server children inherit that."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _write(root: Path, samples: int, classes: int, encoding_name: str) -> None:
    encoding = make_encoding(encoding_name, classes=classes)
    plan = plan_store(
        name=root.name,
        samples=samples,
        ids=IdSpec(kind="int", dense_start=0),
        encoding=encoding,
        temperature=TemperatureSpec(default=4.0, captured=1.0, locked=False),
        mean="none",
        teachers=(),
        transfer_set=TransferSetSpec(name="noise", source="m:f", arguments={}, labelled=True),
    )
    writer = StoreWriter.create(root, plan)
    block = np.random.default_rng(0).standard_normal((1_024, classes), dtype=np.float32)
    block -= block.max(axis=1, keepdims=True)
    for shard in writer.missing_shards():
        with writer.claim(shard) as claim:
            ids = np.arange(claim.rows.start, claim.rows.stop)
            claim.commit(
                ids=ids,
                encoded=encoding.encode(block[ids % len(block)]),
                fingerprints=np.zeros((len(ids), 16), dtype=np.uint8),
                labels=ids % classes,
                audit=Audit().to_json(),
            )
    writer.finish()
