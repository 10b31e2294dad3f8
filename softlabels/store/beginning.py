"""May a store begin in this folder, or go on there? It begins with its plan last: where that stands, all of it does."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from softlabels.documents import MAX_DOCUMENT_BYTES, open_sealed, seal
from softlabels.errors import ManifestError, StoreExistsError
from softlabels.manifest import Manifest
from softlabels.store.confined import read_confined
from softlabels.store.files import TEMPORARY, make_folder, sha256_of, write_atomically
from softlabels.store.ledger import DAMAGED, FOLDER, LOCKS, STAGING, Ledger, Receipt
from softlabels.store.rows import JOB, PLAN


def begin_store(root: Path, plan: Manifest, files: Mapping[str, bytes]) -> None:
    """Begin a store, or find that one was begun from the very same plan.

    Args:
        files: contents of the files beside the rows that the plan names, by path.
    Raises:
        StoreExistsError: something else stands there: a store of another plan, or files that are no store.
        ManifestError: the plan that stands there cannot be believed.
    """
    make_folder(root)
    with Ledger(root, plan_sha256=plan.digest).alone():
        begun = (root / PLAN).exists()
        if begun:
            _refuse_other_plan(root, load_plan(root), plan)
        elif _holds_more_than(root, files):
            _refuse_unless_begun_from(root, plan)
        for path, contents in files.items():
            if not has_file(root / path, plan.metadata_sha256[path]):
                write_atomically(root / path, [contents])
        if not begun:
            write_atomically(root / PLAN, [seal(plan.to_json())])


def load_plan(root: Path) -> Manifest:
    """The plan of the store at `root`.

    Raises:
        ManifestError: it is gone or damaged.
    """
    path = root / PLAN
    try:
        return Manifest.from_json(open_sealed(read_confined(root, PLAN, most_bytes=MAX_DOCUMENT_BYTES), what=str(path)))
    except FileNotFoundError as error:
        raise ManifestError(f"{path} is gone: without it nothing can be added to the store") from error


def has_file(path: Path, sha256: str) -> bool:
    """Whether this file is there and holds just that."""
    try:
        return sha256_of(path) == sha256
    except FileNotFoundError:
        return False


def _holds_more_than(root: Path, files: Mapping[str, bytes]) -> bool:
    """Whether a folder holds any file beyond what a store holds before its first shard."""
    known = {root / path for path in (PLAN, JOB, *files)}
    known |= {path.with_name(path.name + TEMPORARY) for path in known}
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        if here == root:
            folders[:] = [name for name in folders if name not in (LOCKS, STAGING, DAMAGED)]
        if any(here / name not in known for name in names):
            return True
    return False


def _refuse_unless_begun_from(root: Path, plan: Manifest) -> None:
    """Let a folder without a plan pass whose receipts are of this very plan: the plan was lost, the shards were not."""
    own = 0
    for path in sorted((root / FOLDER).glob("*.json")):
        try:
            raw = read_confined(root, f"{FOLDER}/{path.name}", most_bytes=MAX_DOCUMENT_BYTES)
            found = Receipt.from_json(open_sealed(raw, what=str(path)))
        except ManifestError:
            continue  # damaged: for `repair` to drop, once there is a plan again
        if found.plan_sha256 != plan.digest:
            own = 0
            break
        own += 1
    if not own:
        raise StoreExistsError(f"{root} holds files that are no store of this job: choose another path, or empty it")


def _refuse_other_plan(root: Path, existing: Manifest, plan: Manifest) -> None:
    if existing.digest == plan.digest:
        return
    old, new = existing.to_json(), plan.to_json()
    differs = sorted(key for key in old | new if old.get(key) != new.get(key))
    raise StoreExistsError(
        f"a store made from another job stands at {root} (they differ in {', '.join(differs)}): choose another path, "
        "or delete it first",
        differs=differs,
    )
