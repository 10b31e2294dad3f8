"""A link of 50 ms and 100 Mbit/s between a student and a real server: used to the full once, and then not at all."""

from __future__ import annotations

import contextlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import softlabels
from benchmarks.slow_link import Link, SlowLink, bare_bytes_per_s, bare_server
from softlabels.audit import Audit
from softlabels.encodings import make_encoding
from softlabels.manifest import IdSpec, TemperatureSpec, TransferSetSpec
from softlabels.store import StoreWriter, plan_store
from softlabels.target_store import TargetStore

CLASSES, BATCH = 1_000, 64
ROW_BYTES = 2 * CLASSES + 4 + 8


@dataclass(frozen=True)
class Size:
    """How much goes over which link, and how near the bandwidth it must come."""

    samples: int
    link: Link
    rounds: int
    least: float


SIZES = [
    # On a busy machine a proxy of threads is late now and then: the small one leaves room for it.
    pytest.param(Size(1_500, Link(rtt_s=0.03, bytes_per_s=6e6), 3, 0.8), id="small"),
    pytest.param(Size(20_000, Link(), 3, 0.95), id="full", marks=[pytest.mark.slow]),
]


def write(root: Path, samples: int) -> None:
    """A finished store of random rows."""
    encoding = make_encoding("f16", classes=CLASSES)
    plan = plan_store(
        name=root.name,
        samples=samples,
        ids=IdSpec(kind="int", dense_start=0),
        encoding=encoding,
        temperature=TemperatureSpec(default=4.0, captured=1.0, locked=False),
        mean="none",
        teachers=(),
        transfer_set=TransferSetSpec(name="noise", source="m:g", arguments={}, labelled=True),
    )
    writer = StoreWriter.create(root, plan)
    for shard in writer.missing_shards():
        with writer.claim(shard) as claim:
            logits_BC = np.random.default_rng(shard).standard_normal((len(claim.rows), CLASSES), dtype=np.float32)
            claim.commit(
                ids=np.arange(claim.rows.start, claim.rows.stop),
                encoded=encoding.encode(logits_BC - logits_BC.max(axis=1, keepdims=True)),
                fingerprints=np.zeros((len(claim.rows), 16), dtype=np.uint8),
                labels=np.arange(len(claim.rows)) % CLASSES,
                audit=Audit().to_json(),
            )
    writer.finish()


@dataclass(frozen=True)
class Far:
    """A served store at the other end of a slow link."""

    near: TargetStore
    url: str
    link: SlowLink
    size: Size
    bare_s: Callable[[], float]


@contextlib.contextmanager
def served(folder: Path, log: Path) -> Iterator[int]:
    """`softlabels serve` over a folder, in a process of its own; its port."""
    with log.open("wb") as output:
        command = [sys.executable, "-m", "softlabels", "serve", str(folder), "--port", "0"]
        server = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        give_up = time.monotonic() + 60
        while time.monotonic() < give_up and server.poll() is None:
            if found := re.search(r" at http://[^:]+:(\d+)", log.read_text()):
                yield int(found.group(1))
                return
            time.sleep(0.05)
        pytest.fail(f"the server did not start:\n{log.read_text()}")
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def far(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Far]:
    """The store, the link, and how long a bare socket takes for as many bytes over a link like it."""
    size: Size = request.param
    folder = tmp_path_factory.mktemp("far")
    write(folder / "stores" / "far", size.samples)
    total = size.samples * ROW_BYTES
    with (
        served(folder / "stores", folder / "log") as server,
        SlowLink(server, size.link) as link,
        bare_server(total) as port,
        SlowLink(port, size.link) as bare,
        softlabels.open(folder / "stores" / "far") as near,
    ):
        url = f"http://127.0.0.1:{link.port}/far"
        yield Far(near, url, link, size, lambda: total / bare_bytes_per_s(bare.port, total))


def go_through(store: TargetStore, epoch: int, *, step_s: float = 0.0) -> float:
    """Seconds for an epoch whose every step takes so long, every sample once."""
    begun_s, seen = time.monotonic(), []
    for targets in store.epoch(seed=0, epoch=epoch, batch_size=BATCH):
        seen.append(targets.ids)
        time.sleep(step_s)
    seconds = time.monotonic() - begun_s
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(len(store)))
    return seconds


@pytest.mark.alone
@pytest.mark.parametrize("far", SIZES, indirect=True)
class TestSlowLink:
    def test_the_first_epoch_at_the_links_speed_and_the_second_from_the_disk(self, far: Far, tmp_path: Path) -> None:
        """As fast as a bare socket takes for the bytes; then no row is asked for at all, and every row is right."""
        ratios = []
        for number in range(far.size.rounds):
            far.link.questions.clear()
            with softlabels.open(far.url, cache=tmp_path / f"cache-{number}") as store:
                bare_s = far.bare_s()
                ratios.append(bare_s / go_through(store, 0))
                asked = list(far.link.questions)
                second_s = go_through(store, 1)
                assert far.link.questions == asked, "the second epoch asks for nothing"
                assert second_s < bare_s / 2
                for ours, theirs in zip(
                    store.epoch(seed=0, epoch=2, batch_size=BATCH),
                    far.near.epoch(seed=0, epoch=2, batch_size=BATCH),
                    strict=True,
                ):
                    np.testing.assert_array_equal(ours.ids, theirs.ids)
                    np.testing.assert_array_equal(ours.encoded["targets"], theirs.encoded["targets"])
            assert [question.partition("?")[0] for question in asked] == ["/v1/stores/far", "/v1/stores/far/epochs/0"]
        assert statistics.median(ratios) >= far.size.least, ratios

    def test_a_student_that_takes_its_time_does_not_slow_the_link(self, far: Far, tmp_path: Path) -> None:
        """Steps of half the time that their rows take to come: the link is what the epoch waits for."""
        step_s = 0.5 * BATCH * ROW_BYTES / far.size.link.bytes_per_s
        ratios = []
        for number in range(far.size.rounds):
            with softlabels.open(far.url, cache=tmp_path / f"cache-{number}") as store:
                bare_s = far.bare_s()
                ratios.append(bare_s / go_through(store, 0, step_s=step_s))
        assert statistics.median(ratios) >= far.size.least - 0.05, ratios

    def test_half_a_cache_sends_half_the_rows(self, far: Far, tmp_path: Path) -> None:
        """Where the store is larger than its cache, a later epoch takes the time of what has no room."""
        most_bytes = far.size.samples * (ROW_BYTES + 60) // 2
        with softlabels.open(far.url, cache=tmp_path / "half", cache_bytes=most_bytes) as store:
            first_s = go_through(store, 0)
            ratios = [go_through(store, epoch) / first_s for epoch in range(1, 1 + far.size.rounds)]
        assert statistics.median(ratios) < 0.75, ratios
