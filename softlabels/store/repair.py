"""How is a damaged store made sound again? What is wrong is taken out, so that `resume` computes just that anew."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from softlabels.errors import ManifestError, ShardClaimedError, TruncatedError
from softlabels.manifest import Manifest
from softlabels.sealing import seal
from softlabels.store.container import container_of
from softlabels.store.documents import Documents, read_documents
from softlabels.store.faults import Fault, Report, ShowProgress, silent
from softlabels.store.files import TEMPORARY, make_folder, purge, sync_folder, write_atomically
from softlabels.store.ledger import FOLDER, Ledger
from softlabels.store.rows import MANIFEST, PLAN
from softlabels.store.verify import DAMAGED, find_faults
from softlabels.store.writer import StoreWriter


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What `repair` found and did.

    Attributes:
        faults: everything that was wrong.
        dropped: shards that are committed no more; `resume` computes them.
        busy: faulty shards that a living writer holds; left to it.
        moved: where what was taken out lies now, by the path that it had.
        rebuilt: files that were written again, from what is sound.
        unpublished: the manifest was taken away: the store is unfinished until it is published anew.
        digest: of the published store; None while it is unfinished.
    """

    faults: tuple[Fault, ...]
    dropped: tuple[int, ...]
    busy: tuple[int, ...]
    moved: dict[str, str]
    rebuilt: tuple[str, ...]
    unpublished: bool
    digest: str | None


def repair(root: Path, *, show: ShowProgress = silent) -> Repair:
    """Verify a store and take out what is faulty, into its folder `damaged/`; nothing is deleted.

    A faulty shard loses its receipt first, so that its rows stop existing before their bytes do; then the manifest goes,
    then the shard's files. What follows from sound parts is written again: a lost plan, metadata files, the id index,
    and, where no shard is missing, the manifest. Killed at any point and run again, it ends the same.

    Raises:
        UnknownStoreError: there is no store. FormatVersionError: a newer softlabels wrote it.
        ManifestError: neither plan nor manifest can be believed, so that nothing tells what the store should hold.
    """
    root = Path(root)
    documents = read_documents(root)
    plan = documents.plan
    if plan is None:
        raise ManifestError(
            f"{root} cannot be repaired: {'; '.join(map(str, documents.faults))}. Restore {PLAN} from a copy, or run "
            "`softlabels precompute` into another folder"
        )
    with Ledger(root, plan_sha256=plan.digest).alone():
        work = _Work(root, plan)
        faults = tuple(find_faults(root, Report(root=str(root)), show=show))
        return work.mend(read_documents(root), faults)


class _Work:
    """One repair, the store held alone; every step leaves the store one that may be read, resumed and repaired."""

    def __init__(self, root: Path, plan: Manifest) -> None:
        self._root, self._plan = root, plan
        self._ledger = Ledger(root, plan_sha256=plan.digest)
        self._moved: dict[str, str] = {}
        self._rebuilt: list[str] = []

    def mend(self, documents: Documents, faults: tuple[Fault, ...]) -> Repair:
        """Take out, then rebuild."""
        published = (self._root / MANIFEST).exists()
        busy: list[int] = []
        if any(fault.path == PLAN for fault in documents.faults):
            self._take_out(PLAN)
            self._write(PLAN, seal(self._plan.to_json()))
        files: list[str] = []
        dropped = []
        for shard in sorted({fault.shard for fault in faults if fault.shard is not None}):
            with contextlib.ExitStack() as held:
                try:
                    held.enter_context(self._ledger.claim(shard))
                except ShardClaimedError:
                    busy.append(shard)
                    continue
                files += self._files_of(shard, faults)
                self._take_out(f"{FOLDER}/{self._ledger.path(shard).name}")
                dropped.append(shard)
        manifest = documents.manifest
        whole = manifest is not None and not dropped and not _is_wrong(MANIFEST, faults)
        metadata = self._metadata_to_mend(manifest, faults) if whole and manifest is not None else None
        if published and metadata is None:
            self._take_out(MANIFEST)
        strays = [fault.path for fault in faults if fault.path is not None and fault.shard is None]
        for path in [*files, *(path for path in strays if path not in (PLAN, MANIFEST) and not self._is_rebuilt(path))]:
            self._take_out(path)
        for path, contents in (metadata or {}).items():
            self._write(path, contents)
        self._purge()
        digest = self._publish() if not busy else None
        return Repair(
            faults=faults,
            dropped=tuple(dropped),
            busy=tuple(busy),
            moved=self._moved,
            rebuilt=tuple(self._rebuilt),
            unpublished=published and digest is None,
            digest=digest,
        )
