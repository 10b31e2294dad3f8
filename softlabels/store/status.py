"""How far is a store that is being written? Read from its ledger and locks, from any process that sees the folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softlabels.audit import Audit
from softlabels.errors import ShardClaimedError
from softlabels.manifest import Manifest
from softlabels.store.geometry import shard_rows
from softlabels.store.ledger import LOCKS, Ledger
from softlabels.store.rows import load_manifest, plan_digest


@dataclass(frozen=True, kw_only=True)
class Status:
    """How far a store is.

    Attributes:
        manifest: of the finished store, else its plan.
        committed: shards that have a receipt.
        rows: in these shards.
        in_work: shards that a living process holds.
        rows_per_s: rows a second between the first and the last commit; None before the second commit.
        left_s: seconds that the rest takes at this rate; None without one, 0 when nothing is left.
        audit: the encoding's error over the rows so far, see `Audit.summary`.
    """

    manifest: Manifest
    committed: tuple[int, ...]
    rows: int
    in_work: tuple[int, ...]
    rows_per_s: float | None
    left_s: float | None
    audit: dict[str, Any]


def read_status(root: Path) -> Status:
    """How far the store at `root` is.

    Raises:
        UnknownStoreError: nothing was begun there. ManifestError: a receipt is damaged.
    """
    manifest = load_manifest(root)
    ledger = Ledger(root, plan_sha256=plan_digest(manifest))
    committed = tuple(shard for shard in ledger.committed() if shard < manifest.shards.count)
    audit, times, rows = Audit(), [], 0
    for shard in committed:
        receipt = ledger.read(shard)
        if receipt is None:  # repaired away since it was listed
            continue
        audit.merge(Audit.from_json(receipt.audit))
        size = len(shard_rows(manifest, shard))
        times.append((ledger.path(shard).stat().st_mtime, size))
        rows += size
    rate = _rate(sorted(times))
    left = manifest.rows - rows
    return Status(
        manifest=manifest,
        committed=committed,
        rows=rows,
        in_work=tuple(shard for shard in _lock_numbers(root) if _is_held(ledger, shard)),
        rows_per_s=rate,
        left_s=0.0 if left == 0 else None if rate is None else left / rate,
        audit=audit.summary(),
    )


def _rate(commits: list[tuple[float, int]]) -> float | None:
    # The first shard was begun at a time that nobody wrote down: the clock runs from its commit on.
    if len(commits) < 2 or commits[-1][0] <= commits[0][0]:
        return None
    return sum(size for _, size in commits[1:]) / (commits[-1][0] - commits[0][0])


def _lock_numbers(root: Path) -> list[int]:
    folder = root / LOCKS
    return sorted(int(path.stem) for path in folder.glob("*.lock") if path.stem.isdigit()) if folder.is_dir() else []


def _is_held(ledger: Ledger, shard: int) -> bool:
    try:
        with ledger.claim(shard):
            return False
    except ShardClaimedError:
        return True
