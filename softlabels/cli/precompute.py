"""`softlabels precompute` and `softlabels resume`: run the teachers once and store their soft targets."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softlabels.manifest import Manifest


def run_job(job: Path, /, *, metrics: Path | None = None) -> None:
    """Run the teachers of a job file once over its transfer set and keep their soft targets in a store.

    Run it again after an interruption: committed shards are kept. Several processes may run the same job.

    Args:
        job: job file (TOML)
        metrics: file to add a JSON line to for every shard: rows, rate, time left, KL so far, device's idle share
    """
    from softlabels.precompute import load_job, precompute

    _interrupt_on_sigterm()
    loaded = load_job(job)
    try:
        manifest = precompute(loaded, metrics=metrics)
    except KeyboardInterrupt:
        _advise_resume(loaded.store_path)
        raise
    _report(manifest, loaded.store_path)


def resume_store(store: Path, /, *, metrics: Path | None = None) -> None:
    """Continue a store that an interrupted or repaired precompute left unfinished.

    Committed shards stay, all others are computed. Nothing happens to a finished store.

    Args:
        store: folder of the store
        metrics: file to add a JSON line to for every shard: rows, rate, time left, KL so far, device's idle share
    """
    from softlabels.precompute import resume

    _interrupt_on_sigterm()
    try:
        manifest = resume(store, metrics=metrics)
    except KeyboardInterrupt:
        _advise_resume(store)
        raise
    _report(manifest, store)


def _advise_resume(store: Path) -> None:
    print(f"\nall committed shards are kept; continue with: softlabels resume {store}", file=sys.stderr)


def _report(manifest: Manifest, where: Path) -> None:
    if not manifest.finished:
        print(f"{where}: other processes still work on shards of this store; the last one publishes it")
        return
    print(
        f"{where}: {manifest.samples} samples × {manifest.classes} classes, {manifest.target_row_bytes} bytes of "
        "targets a sample"
    )
    for temperature, kl in (manifest.audit or {}).get("kl_nats", {}).items():
        print(f"  KL to the exact targets at T = {temperature}: mean {kl['mean']:.2g}, max {kl['max']:.2g} nats")
    print(f"  store digest {manifest.digest}")


def _interrupt_on_sigterm() -> None:
    """Make `kill` end a run as Ctrl-C does: in order, with all committed shards kept."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
