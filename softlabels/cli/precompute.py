"""`softlabels precompute JOB.toml`: run the teachers once and keep what they say."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softlabels.manifest import Manifest


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command and its arguments."""
    parser = commands.add_parser(
        "precompute",
        help="run the teachers of a job file once over its transfer set",
        description="Run the teachers of a job file once over its transfer set and keep their soft targets in a store. "
        "Run it again after an interruption: committed shards are kept. Several processes may run the same job.",
    )
    parser.add_argument("job", type=Path, help="the job file (TOML)")
    add_metrics(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the job."""
    from softlabels.precompute import load_job, precompute

    interrupt_on_sigterm()
    job = load_job(options.job)
    try:
        manifest = precompute(job, metrics=options.metrics)
    except KeyboardInterrupt:
        print(f"\nall committed shards are kept; go on with: softlabels resume {job.store_path}", file=sys.stderr)
        raise
    report(manifest, job.store_path)
    return 0


def add_metrics(parser: argparse.ArgumentParser) -> None:
    """Add the argument for a file of figures."""
    parser.add_argument(
        "--metrics",
        type=Path,
        metavar="FILE",
        help="add a JSON line to FILE for every shard: rows, rate, time left, KL so far, the device's idle share",
    )


def report(manifest: Manifest, where: Path) -> None:
    """Say what was made."""
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


def interrupt_on_sigterm() -> None:
    """Let `kill` end a run as Ctrl-C does: in order, with what is committed kept."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
