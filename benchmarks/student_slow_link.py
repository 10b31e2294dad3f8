"""A student over a slow link: bandwidth used in the first epoch, and rate of the second from the disk.

    python -m benchmarks.student_slow_link [--rounds N] [--folder FOLDER]

The link, 50 ms and 100 Mbit/s, is a proxy in a process of its own (`benchmarks.slow_link`) before a real server. The
peer of the first epoch is a bare socket that gets as many bytes through the same proxy; of the second, the same store
read from a folder on this machine. All take turns; figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import softlabels
from benchmarks.bench_serve import Row, first_line, process
from benchmarks.slow_link import bare_bytes_per_s, bare_server
from softlabels.audit import Audit
from softlabels.encodings import make_encoding
from softlabels.manifest import IdSpec, TemperatureSpec, TransferSetSpec
from softlabels.store import StoreWriter, plan_store
from softlabels.target_store import TargetStore

SAMPLES, CLASSES, BATCH = 20_000, 1_000, 256
ROW_BYTES = CLASSES * 2 + 4 + 8
"""Targets in f16, a label and an id; 40 MB in all, three seconds of the link."""


def rows(folder: Path, rounds: int = 3) -> Iterator[Row]:
    """The figures `slow_link.bandwidth` and `slow_link.second_epoch`, in MB/s of arrays.

    Args:
        folder: for the store, which is kept there between runs, and the cache, which is not.
        rounds: of which the medians are taken.
    """
    stores = folder / "slow-link-stores"
    if not (stores / "slow" / "manifest.json").exists():
        _write(stores / "slow")
    first, bare, second, near = [], [], [], []
    with ExitStack() as stack:
        line = first_line(stack.enter_context(process("softlabels", "serve", str(stores), "--port", "0")))
        found = re.search(r" at (http://\S+):(\d+)", line)
        assert found is not None, line
        size_bytes = SAMPLES * ROW_BYTES
        slow = _proxied(stack, int(found.group(2)))
        slow_bare = _proxied(stack, stack.enter_context(bare_server(size_bytes)))
        on_disk = stack.enter_context(softlabels.open(stores / "slow"))
        for _ in range(rounds):
            cache = Path(tempfile.mkdtemp(dir=folder))
            with softlabels.open(f"{found.group(1)}:{slow}/slow", cache=cache) as store:
                bare.append(bare_bytes_per_s(slow_bare, size_bytes) / 1e6)
                first.append(_epoch_mb_per_s(store, 0))
                second.append(_epoch_mb_per_s(store, 1))
                near.append(_epoch_mb_per_s(on_disk, 1))
            shutil.rmtree(cache)
    yield _row("slow_link.bandwidth", "bare socket, same proxy: 50 ms, 100 Mbit/s", first, bare)
    yield _row("slow_link.second_epoch", "the store in a folder of this machine", second, near)


def _proxied(stack: ExitStack, port: int) -> int:
    return int(first_line(stack.enter_context(process("benchmarks.slow_link", str(port)))))


def _epoch_mb_per_s(store: TargetStore, epoch: int) -> float:
    begun_s, samples = time.monotonic(), 0
    for targets in store.epoch(seed=0, epoch=epoch, batch_size=BATCH):
        samples += len(targets)
    assert samples == SAMPLES
    return samples * ROW_BYTES / (time.monotonic() - begun_s) / 1e6


def _row(what: str, against: str, ours: list[float], peer: list[float]) -> Row:
    ratio = statistics.median(a / b for a, b in zip(ours, peer, strict=True))
    return Row(
        what=what,
        ours=round(statistics.median(ours), 2),
        peer=round(statistics.median(peer), 2),
        against=against,
        ratio=round(ratio, 3),
        unit="MB/s",
    )


def _write(root: Path) -> None:
    encoding = make_encoding("f16", classes=CLASSES)
    plan = plan_store(
        name=root.name,
        samples=SAMPLES,
        ids=IdSpec(kind="int", dense_start=0),
        encoding=encoding,
        temperature=TemperatureSpec(default=4.0, captured=1.0, locked=False),
        mean="none",
        teachers=(),
        transfer_set=TransferSetSpec(name="noise", source="benchmarks:noise", arguments={}, labelled=True),
    )
    root.parent.mkdir(parents=True, exist_ok=True)
    writer = StoreWriter.create(root, plan)
    for shard in writer.missing_shards():
        with writer.claim(shard) as claim:
            ids = np.arange(claim.rows.start, claim.rows.stop)
            claim.commit(
                ids=ids,
                encoded=encoding.encode(_noise(shard, len(ids))),
                fingerprints=np.zeros((len(ids), 16), dtype=np.uint8),
                labels=ids % CLASSES,
                audit=Audit().to_json(),
            )
    writer.finish()


def _noise(seed: int, count: int) -> NDArray[np.float32]:
    logits_BC = np.random.default_rng(seed).standard_normal((count, CLASSES), dtype=np.float32) * 3
    return logits_BC - logits_BC.max(axis=1, keepdims=True)


def main() -> int:
    """Measure, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "softlabels-bench")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print(json.dumps([asdict(row) for row in rows(options.folder, options.rounds)], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
