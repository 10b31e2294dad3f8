"""`softlabels verify STORE`: is a store what was written, whole, and does it make sense?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softlabels.store.verify_report import Report


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command and its arguments."""
    parser = commands.add_parser(
        "verify",
        help="check a store: every checksum, every row, every file",
        description="Check a store against its own checksums, receipts and plan, and that its rows make sense. Ends "
        "with exit code 1 at the first fault and names shard, chunk and rows; with 0 where nothing is wrong.",
    )
    parser.add_argument("store", type=Path, help="the store's folder")
    parser.add_argument("--all", action="store_true", help="go on after the first fault and list all of them")
    parser.add_argument("--sample", type=_count, metavar="N", help="check N random chunks instead of every one")
    parser.add_argument(
        "--against-teacher",
        type=Path,
        metavar="JOB",
        help="also run the teachers of this job file (TOML) again on random samples and demand the same targets",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Verify; 1 where anything is wrong."""
    from softlabels.progress import track
    from softlabels.store.verify import verify

    report = verify(options.store, sample=options.sample, every_fault=options.all, show=track)
    agreement: dict[str, object] = {}
    if options.against_teacher is not None and report.sound:
        from softlabels.precompute import load_job
        from softlabels.precompute.checks.verify_teachers import verify_against_teachers

        agreement = verify_against_teachers(
            options.store, load_job(options.against_teacher), report, show=track
        ).to_json()
    if options.json:
        print(json.dumps({**report.to_json(), **({"agreement": agreement} if agreement else {})}, indent=2))
    else:
        print("\n".join(_described(report, options.store)))
    return 0 if report.sound else 1


def _described(report: Report, where: Path) -> list[str]:
    """What was found, for people."""
    checked = (
        f"{report.rows:,} rows in {report.chunks:,} chunks of {report.committed} of {report.shards} shards verified"
    )
    if report.sound:
        return [f"{where}: sound; {checked}"]
    lines = [f"{where}: {len(report.faults)} fault{'s' if len(report.faults) > 1 else ''}; {checked}"]
    lines += [f"  {fault}" for fault in report.faults]
    if any(fault.kind not in ("unfinished", "agreement") for fault in report.faults):
        lines.append(f"mend with: softlabels repair {where}")
    return lines


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return count
