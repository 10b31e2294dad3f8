"""What tests of several rooms share: the data folder, one small finished store, and a real server over it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from softlabels.audit import Audit
from softlabels.encodings import make_encoding
from softlabels.manifest import IdSpec, TeacherSpec, TemperatureSpec, TransferSetSpec
from softlabels.store import StoreWriter, plan_store
from softlabels.transfer_set import sample_fingerprints

ROOT = Path(__file__).resolve().parents[1]

# Two cores shared with servers and training: a slow example says nothing about the code, so no deadline.
hypothesis.settings.register_profile("softlabels", deadline=None, print_blob=True)
hypothesis.settings.load_profile("softlabels")

# A shell that runs the suite in the background has it ignore Ctrl-C, and every process that it starts, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

SAMPLES, CLASSES = 200, 10
SERVER_START_S = 60.0
"""Far more than the second that a server takes to start: the machine may be busy."""


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets: `SOFTLABELS_DATA`, else `shared/data` beside the repository; skips without one."""
    named = os.environ.get("SOFTLABELS_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is no folder; set SOFTLABELS_DATA to one that holds mnist/ and the like")
    return folder


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store `tiny`: 200 samples, ids 0 … 199, 10 classes, f16, T = 4 by default, every tenth unlabelled.

    It has four shards, the last one short, and lies alone in its folder. Nobody writes to it.
    """
    rng = np.random.default_rng(7)
    inputs = rng.normal(size=(SAMPLES, 4)).astype(np.float32)
    logits_BC = 6 * rng.normal(size=(SAMPLES, CLASSES)).astype(np.float32)
    logits_BC -= logits_BC.max(axis=1, keepdims=True)
    labels = np.where(np.arange(SAMPLES) % 10 == 0, -1, logits_BC.argmax(axis=1)).astype(np.int64)
    encoding = make_encoding("f16", classes=CLASSES)
    plan = plan_store(
        name="tiny",
        samples=SAMPLES,
        ids=IdSpec(kind="int", dense_start=0),
        encoding=encoding,
        temperature=TemperatureSpec(default=4.0, captured=1.0, locked=False),
        mean="none",
        teachers=(TeacherSpec(name="noise", model="m:f", arguments={}, weights=None, weights_sha256=None, weight=1.0),),
        transfer_set=TransferSetSpec(name="noise", source="m:g", arguments={}, labelled=True),
        rows_per_shard=64,
        rows_per_chunk=16,
    )
    root = tmp_path_factory.mktemp("stores") / "tiny"
    writer = StoreWriter.create(root, plan)
    for shard in writer.missing_shards():
        with writer.claim(shard) as claim:
            rows = slice(claim.rows.start, claim.rows.stop)
            encoded = encoding.encode(logits_BC[rows])
            audit = Audit((1.0, 4.0))
            audit.add(logits_BC[rows], encoding.decode(encoded), captured=1.0)
            claim.commit(
                ids=np.arange(rows.start, rows.stop),
                encoded=encoded,
                fingerprints=sample_fingerprints(inputs[rows]),
                labels=labels[rows],
                audit=audit.to_json(),
            )
    writer.finish()
    return root


@pytest.fixture(scope="session")
def served_store(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of `tiny_store` behind `softlabels serve` in a process of its own, on a free port."""
    log = tmp_path_factory.mktemp("served") / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "softlabels", "serve", tiny_store.parent, "--port", "0"],
            stdout=output,
            stderr=output,
        )
    try:
        yield f"{_announced_address(server, log)}/tiny"
    finally:
        server.terminate()
        try:
            server.wait(timeout=15)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _announced_address(server: subprocess.Popen[bytes], log: Path) -> str:
    give_up = time.monotonic() + SERVER_START_S
    while time.monotonic() < give_up and server.poll() is None:
        if found := re.search(r" at (http://\S+)", log.read_text()):
            return found.group(1)
        time.sleep(0.05)
    pytest.fail(f"the server did not start (exit code {server.poll()}):\n{log.read_text()}")
