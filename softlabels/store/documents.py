"""What do a store's own documents say, where some of them may be lost or damaged?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from softlabels.documents import MAX_DOCUMENT_BYTES, open_sealed
from softlabels.errors import ManifestError, UnknownStoreError
from softlabels.manifest import Manifest
from softlabels.store.confined import read_confined
from softlabels.store.container import container_of
from softlabels.store.faults import Fault
from softlabels.store.index import POSITIONS, SORTED_IDS
from softlabels.store.rows import JOB, MANIFEST, PLAN


@dataclass(frozen=True, kw_only=True)
class Documents:
    """A store's plan and manifest.

    Attributes:
        plan: as it lies there; else as the manifest implies it; None where neither can be had.
        manifest: None where the store is unfinished, or the manifest cannot be believed.
        faults: what is wrong with them.
    """

    plan: Manifest | None
    manifest: Manifest | None
    faults: tuple[Fault, ...]


def read_documents(root: Path) -> Documents:
    """The documents of the store at `root`.

    Raises:
        UnknownStoreError: it has neither plan nor manifest. FormatVersionError: a newer softlabels wrote them.
    """
    faults: list[Fault] = []
    plan, manifest = (_read(root, name, faults) for name in (PLAN, MANIFEST))
    if plan is None and manifest is None and not faults:
        raise UnknownStoreError(f"there is no store at {root}: it has neither {MANIFEST} nor {PLAN}", where=str(root))
    if manifest is not None and not manifest.finished:
        faults.append(_wrong(MANIFEST, "it is a plan, not the manifest of a finished store"))
        manifest = None
    if plan is not None and plan.finished:
        faults.append(_wrong(PLAN, "it is a manifest, not a plan"))
        plan = None
    if plan is None and manifest is not None:
        if not any(fault.path == PLAN for fault in faults):
            faults.append(_wrong(PLAN, "it is gone: without it nothing can be added to the store"))
        plan = plan_of(manifest)
    elif plan is not None and manifest is not None and manifest.plan_sha256 != plan.digest:
        faults.append(_wrong(MANIFEST, f"it belongs to another plan than {PLAN}: do not mix stores' files"))
    read_job(root, faults)
    return Documents(plan=plan, manifest=manifest, faults=tuple(faults))


def plan_of(manifest: Manifest) -> Manifest | None:
    """The plan that a manifest was made from; None where what is known now does not lead back to it."""
    written_later = set(container_of(manifest).metadata(manifest))
    before = {path: digest for path, digest in manifest.metadata_sha256.items() if path not in written_later}
    without_index = {path: digest for path, digest in before.items() if path not in (SORTED_IDS, POSITIONS)}
    # What of the transfer set and of the files beside the shards was known beforehand differs between layouts.
    for fingerprint in (None, manifest.transfer_set.fingerprint):
        for metadata in (without_index, before):
            plan = replace(
                manifest,
                ledger=None,
                audit=None,
                plan_sha256=None,
                metadata_sha256=metadata,
                transfer_set=replace(manifest.transfer_set, fingerprint=fingerprint),
            )
            if plan.digest == manifest.plan_sha256:
                return plan
    return None


def read_job(root: Path, faults: list[Fault]) -> None:
    """Add what is wrong with the job beside a plan; that there is none is no fault."""
    try:
        open_sealed(read_confined(root, JOB, most_bytes=MAX_DOCUMENT_BYTES), what=JOB)
    except FileNotFoundError:
        return
    except (ManifestError, OSError) as error:
        faults.append(_wrong(JOB, f"{error}; it is needed by `softlabels resume` alone"))


def _read(root: Path, name: str, faults: list[Fault]) -> Manifest | None:
    try:
        return Manifest.from_json(open_sealed(read_confined(root, name, most_bytes=MAX_DOCUMENT_BYTES), what=name))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ManifestError, OSError) as error:
        faults.append(_wrong(name, str(error)))
        return None


def _wrong(name: str, message: str) -> Fault:
    return Fault(kind="document", path=name, message=message)
