"""`softlabels resume STORE`: go on with an interrupted precompute."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from softlabels.cli.precompute import add_metrics, interrupt_on_sigterm, report


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command and its arguments."""
    parser = commands.add_parser(
        "resume",
        help="go on with an interrupted precompute",
        description="Go on with a store that an interrupted or repaired precompute left unfinished: shards that are "
        "committed stay, all others are computed. Nothing happens to a store that is finished.",
    )
    parser.add_argument("store", type=Path, help="the store's folder")
    add_metrics(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Resume the store's own job."""
    from softlabels.precompute import resume

    interrupt_on_sigterm()
    try:
        manifest = resume(options.store, metrics=options.metrics)
    except KeyboardInterrupt:
        print(f"\nall committed shards are kept; go on with: softlabels resume {options.store}", file=sys.stderr)
        raise
    report(manifest, options.store)
    return 0
