"""`softlabels status STORE`: how far a store is, from another terminal or machine."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from softlabels.progress import duration

if TYPE_CHECKING:
    from softlabels.store.ledger import Status


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command and its arguments."""
    parser = commands.add_parser(
        "status",
        help="how far a store is: shards, rate, time left, workers, error so far",
        description="Show how far a store is while other processes write it, or that it is finished.",
    )
    parser.add_argument("store", type=Path, help="the store's folder")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="again every so often, until it is finished")
    parser.add_argument("--json", action="store_true", help="print it as JSON, for programs")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the status, once or until the store is finished."""
    from softlabels.store.ledger import read_status

    while True:
        status = read_status(options.store)
        print(as_json(status) if options.json else "\n".join(lines(status)), flush=True)
        if options.watch is None or status.manifest.finished:
            return 0
        time.sleep(options.watch)


def lines(status: Status) -> list[str]:
    """The status for people."""
    manifest = status.manifest
    count = manifest.shards.count
    state = "finished" if manifest.finished else "in work" if status.in_work else "waiting for `softlabels resume`"
    rate = "" if status.rows_per_s is None else f", {status.rows_per_s:,.0f} rows/s"
    left = "" if not status.left_s else f", {duration(status.left_s)} left"
    found = [
        f"{manifest.name}: {state}",
        f"  shards  {len(status.committed)} of {count} committed, {len(status.in_work)} held by a living process",
        f"  rows    {status.rows:,} of {manifest.rows:,} ({100 * status.rows / manifest.rows:.0f}%){rate}{left}",
    ]
    for temperature, kl in status.audit["kl_nats"].items():
        found.append(f"  KL      T = {temperature}: mean {kl['mean']:.2g}, max {kl['max']:.2g} nats so far")
    return found


def as_json(status: Status) -> str:
    """The status for programs, one line."""
    facts = asdict(status)
    facts["manifest"] = {
        "name": status.manifest.name,
        "rows": status.manifest.rows,
        "finished": status.manifest.finished,
    }
    return json.dumps(facts)
