"""`softlabels verify` and `softlabels repair`: find faults of a store, and take faulty shards out."""

from __future__ import annotations

import json as json_library
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

if TYPE_CHECKING:
    from softlabels.store.repair import Repair
    from softlabels.store.verify_report import Report


def verify_store(
    store: Path,
    /,
    *,
    all: bool = False,
    sample: Annotated[int | None, Parameter(metavar="N", validator=Number(gte=1))] = None,
    against_teacher: Annotated[Path | None, Parameter(metavar="JOB")] = None,
    json: bool = False,
) -> int:
    """Check a store against its own checksums, receipts and plan, and that its rows make sense.

    Ends with exit code 1 at the first fault and names shard, chunk and rows; with 0 where nothing is wrong.

    Args:
        store: folder of the store
        all: list all faults instead of stopping at the first
        sample: check this many random chunks instead of every one
        against_teacher: also run the teachers of this job file (TOML) again on random samples and compare the targets
        json: print the report as JSON
    """
    from softlabels.progress import track
    from softlabels.store.verify import verify

    report = verify(store, sample=sample, every_fault=all, show=track)
    agreement: dict[str, object] = {}
    if against_teacher is not None and report.sound:
        from softlabels.precompute import load_job
        from softlabels.precompute.checks.verify_teachers import verify_against_teachers

        agreement = verify_against_teachers(store, load_job(against_teacher), report, show=track).to_json()
    if json:
        print(json_library.dumps({**report.to_json(), **({"agreement": agreement} if agreement else {})}, indent=2))
    else:
        print("\n".join(_verified(report, store)))
    return 0 if report.sound else 1


def repair_store(store: Path, /) -> int:
    """Verify a store and move what is faulty into its folder damaged/.

    What follows from intact parts (id index, metadata, manifest) is written again. `softlabels resume` then computes
    the missing shards. The exit code is 0 where the store is complete, else 1.

    Args:
        store: folder of the store
    """
    from softlabels.progress import track
    from softlabels.store.repair import repair

    done = repair(store, show=track)
    print("\n".join(_repaired(done, store)))
    return 0 if done.digest is not None else 1


def _verified(report: Report, where: Path) -> list[str]:
    checked = (
        f"{report.rows:,} rows in {report.chunks:,} chunks of {report.committed} of {report.shards} shards verified"
    )
    if report.sound:
        return [f"{where}: sound; {checked}"]
    lines = [f"{where}: {len(report.faults)} fault{'s' if len(report.faults) > 1 else ''}; {checked}"]
    lines += [f"  {fault}" for fault in report.faults]
    if any(fault.kind not in ("unfinished", "agreement") for fault in report.faults):
        lines.append(f"repair with: softlabels repair {where}")
    return lines


def _repaired(done: Repair, where: Path) -> list[str]:
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
        lines.append(f"left to the process that is writing them: shards {', '.join(map(str, done.busy))}")
    if done.digest is None:
        lines.append(f"the store is unfinished; continue with: softlabels resume {where}")
    else:
        lines.append(f"the store is complete, digest {done.digest}")
    return lines
