"""`softlabels merge SOURCE … DESTINATION`: one store of shards that were computed in several places."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command and its arguments."""
    parser = commands.add_parser(
        "merge",
        help="unite shards that were computed in several places",
        description="Unite the committed shards of stores that were begun from the very same plan. Every file is "
        "verified while it is copied; the sources stay as they are. The destination is published when no shard is "
        "missing.",
    )
    parser.add_argument("sources", type=Path, nargs="+", metavar="SOURCE", help="a store's folder, finished or not")
    parser.add_argument("destination", type=Path, metavar="DESTINATION", help="a new folder, or a store of that plan")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Merge; 0 where the destination is whole, 1 where shards are missing still."""
    from softlabels.progress import track
    from softlabels.store.merge import merge

    done = merge(options.sources, options.destination, show=track)
    for source in options.sources:
        print(f"  {source}: {done.copied.get(str(source), 0)} shards copied")
    for shard, message in sorted(done.damaged.items()):
        print(f"  shard {shard} is damaged: {message}")
    if done.digest is None:
        print(f"{options.destination}: {len(done.missing)} shards are missing; merge more, or: softlabels resume")
        return 1
    print(f"{options.destination}: whole, digest {done.digest}")
    return 0
