"""`softlabels repair STORE`: take out what is wrong, so that `softlabels resume` computes just that anew."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softlabels.store.repair import Repair


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command and its arguments."""
    parser = commands.add_parser(
        "repair",
        help="take faulty shards out of a store, so that resume computes just those",
        description="Verify a store and move what is faulty into its folder damaged/; what follows from sound parts "
        "(the id index, metadata, the manifest) is written again. `softlabels resume` then computes the shards that "
        "are gone.",
    )
    parser.add_argument("store", type=Path, help="the store's folder")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Repair; 0 where the store is whole again, 1 where something is left to do."""
    from softlabels.progress import track
    from softlabels.store.repair import repair

    done = repair(options.store, show=track)
    print("\n".join(_described(done, options.store)))
    return 0 if done.digest is not None else 1


def _described(done: Repair, where: Path) -> list[str]:
    """What was found and done, for people."""
    wrong = [fault for fault in done.faults if fault.kind != "unfinished"]
    lines = [f"{where}: {len(wrong)} fault{'' if len(wrong) == 1 else 's'}", *(f"  {fault}" for fault in wrong)]
    lines += [f"  moved {path} to {place}" for path, place in done.moved.items()]
    lines += [f"  wrote {path} again" for path in done.rebuilt]
    if done.plan_lost:
        lines.append("the plan is lost: run `softlabels precompute` with the same job file; committed shards are kept")
        return lines
    if done.dropped:
        lines.append(f"dropped shards: {', '.join(map(str, done.dropped))}")
    if done.busy:
        lines.append(f"left to the process that writes them: shards {', '.join(map(str, done.busy))}")
    if done.digest is None:
        lines.append(f"the store is unfinished; go on with: softlabels resume {where}")
    else:
        lines.append(f"the store is whole, digest {done.digest}")
    return lines
