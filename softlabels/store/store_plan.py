"""Store plans: arrays, shard and chunk sizes chosen from a job, and the folder that a store is created in."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from msgspec.structs import replace
from numpy.typing import NDArray

from softlabels.atomic_files import TEMPORARY, make_folder, sha256_of, write_atomically
from softlabels.documents import seal
from softlabels.encodings import Encoding
from softlabels.errors import JobError, ManifestError, StoreExistsError
from softlabels.manifest import (
    STORE_NAME,
    ArraySpec,
    Container,
    EncodingSpec,
    IdSpec,
    Manifest,
    RowLayout,
    ShardSpec,
    TeacherSpec,
    TemperatureSpec,
    TransferSetSpec,
    ViewSpec,
    encoded_arrays,
)
from softlabels.softmath import Mean
from softlabels.store.chunks import choose_rows_per_chunk, choose_rows_per_shard
from softlabels.store.ledger import DAMAGED_FOLDER, LEDGER_FOLDER, LOCK_FOLDER, STAGING_FOLDER, Ledger, read_receipt
from softlabels.store.sample_index import SampleTable
from softlabels.store.store_documents import JOB, PLAN, constant_files, load_plan
from softlabels.transfer_set import FINGERPRINT_BYTES

_RECORDED = ("softlabels", "numpy", "torch", "zarr", "h5py", "numcodecs")
"""Libraries whose versions may change a target or a file."""

MAX_INPUT_CHUNK_BYTES = 1 << 20
"""A chunk of inputs is verified whole before its first row is read: a mebibyte takes a quarter of a millisecond."""


def plan_store(
    *,
    name: str,
    samples: int,
    ids: IdSpec,
    encoding: Encoding,
    temperature: TemperatureSpec,
    mean: Mean,
    teachers: tuple[TeacherSpec, ...],
    transfer_set: TransferSetSpec,
    container: Container = "zarr",
    rows_per_shard: int | None = None,
    rows_per_chunk: int | None = None,
    layout: RowLayout | None = None,
    members: int | None = None,
    views: ViewSpec | None = None,
    table: SampleTable | None = None,
    inputs: ArraySpec | None = None,
) -> Manifest:
    """Return the plan of a store, with shard and chunk sizes chosen where they are not given.

    Args:
        samples: number of samples in the transfer set, at least 1.
        layout: how rows follow from samples; one row per sample when left out.
        members: number of members whose rows are kept side by side; None keeps their mean.
        views: how views were made, for a layout of views.
        table: the samples, for a layout of sequences.
        inputs: dtype and shape of one sample, where the store also keeps the inputs; see `kept_inputs`.
    Raises:
        JobError: sizes that do not fit each other, or inputs that the layout cannot keep. ManifestError: not a valid
        store name.
    """
    check_store_name(name)
    if samples < 1:
        raise JobError(f"transfer set {transfer_set.name!r} is empty: there is nothing to compute targets for")
    if table is not None:
        layout = RowLayout(kind="sequences", samples=samples, rows=table.rows)
        transfer_set = replace(transfer_set, fingerprint=table.fingerprint())
    layout = layout or RowLayout(kind="single", samples=samples, rows=samples)
    arrays = encoded_arrays(encoding, members)
    row_bytes = sum(spec.row_bytes for spec in arrays.values())
    input_bytes = 0 if inputs is None else inputs.row_bytes
    # Sequence stores keep ids and fingerprints once per sample, see `softlabels.store.sample_index`.
    if layout.kind != "sequences":
        as_bytes = ArraySpec(dtype="|u1", row_shape=(ids.width_bytes,))
        arrays["ids"] = as_bytes if ids.kind == "str" else ArraySpec(dtype="<i8", row_shape=())
        arrays["fingerprints"] = ArraySpec(dtype="|u1", row_shape=(FINGERPRINT_BYTES,))
    if views is not None and views.parameters:
        arrays["view_parameters"] = ArraySpec(dtype="<f8", row_shape=(len(views.parameters),))
    if transfer_set.labelled:
        arrays["labels"] = ArraySpec(dtype="<i4", row_shape=())
    if inputs is not None:
        if layout.kind != "single":
            raise JobError(
                f"inputs are kept where every sample has one row of targets, not in a store of {layout.kind}: leave "
                "out `inputs = true` of [store]; students bring the inputs themselves"
            )
        arrays["inputs"] = inputs
    files = constant_files(encoding) | ({} if table is None else table.files())
    per_chunk = rows_per_chunk or _chunk_for(row_bytes, input_bytes, rows_per_shard)
    per_shard = rows_per_shard or choose_rows_per_shard(row_bytes + input_bytes, per_chunk, layout.rows)
    if per_shard % per_chunk:
        raise JobError(f"rows_per_shard ({per_shard}) must be a multiple of rows_per_chunk ({per_chunk})")
    return Manifest(
        name=name,
        container=container,
        layout=layout,
        ids=ids,
        classes=encoding.classes,
        encoding=EncodingSpec(
            name=encoding.name, params=dict(encoding.params), constants=tuple(sorted(encoding.constants))
        ),
        temperature=temperature,
        mean=mean,
        teachers=teachers,
        transfer_set=transfer_set,
        shards=ShardSpec(count=-(-layout.rows // per_shard), rows_per_shard=per_shard, rows_per_chunk=per_chunk),
        arrays=arrays,
        software=_software_versions(),
        metadata_sha256={path: hashlib.sha256(contents).hexdigest() for path, contents in files.items()},
        members=members,
        views=views,
    )


def kept_inputs(inputs: NDArray[Any]) -> ArraySpec:
    """Return how a store keeps samples like these.

    Args:
        inputs: [B, ...], a few of them.
    Raises:
        JobError: a type or shape that no store can hold.
    """
    order = inputs.dtype.newbyteorder("<") if inputs.dtype.itemsize > 1 else inputs.dtype
    if inputs.dtype.kind not in "fiu" or inputs.dtype.itemsize > 8 or inputs.dtype.str != order.str:
        raise JobError(
            f"inputs of type {inputs.dtype.str} cannot be kept in a store: give whole numbers or floats of up to 8 "
            "bytes, little-endian, as '|u1' or '<f4', or leave out `inputs = true` of [store]"
        )
    if not all(inputs.shape[1:]) or inputs.ndim > 9:
        raise JobError(
            f"inputs of shape {list(inputs.shape[1:])} a sample cannot be kept in a store: it takes up to 8 axes, none "
            "of them empty"
        )
    return ArraySpec(dtype=inputs.dtype.str, row_shape=inputs.shape[1:])


def _software_versions() -> dict[str, str]:
    found = {}
    for library in _RECORDED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[library] = metadata.version(library)
    return found


def _chunk_for(row_bytes: int, input_bytes: int, rows_per_shard: int | None) -> int:
    # Sized for the targets, which are read most; smaller where a chunk of inputs would be too large.
    chosen = choose_rows_per_chunk(row_bytes)
    while chosen > 1 and chosen * input_bytes > MAX_INPUT_CHUNK_BYTES:
        chosen //= 2
    while rows_per_shard is not None and rows_per_shard % chosen:
        chosen //= 2
    return max(1, chosen)


def initialize_store(root: Path, plan: Manifest, files: Mapping[str, bytes]) -> Manifest:
    """Create a store's folder with its plan; do nothing more where a store of the very same plan exists.

    Args:
        files: contents by path of the metadata files that the plan lists.
    Returns:
        The plan, in the format version that the store was begun in.
    Raises:
        StoreExistsError: the folder holds a store of another plan, or files that are not a store.
        ManifestError: the existing plan is invalid.
    """
    make_folder(root)
    with Ledger(root, plan).exclusive():
        exists = (root / PLAN).exists()
        plan = plan.as_version(load_plan(root).format_version if exists else _version_of_receipts(root, plan))
        if exists and (existing := load_plan(root)).digest != plan.digest:
            old, new = existing.to_json(), plan.to_json()
            differs = sorted(key for key in old | new if old.get(key) != new.get(key))
            raise StoreExistsError(
                f"{root} holds a store made from another job (they differ in {', '.join(differs)}): choose another "
                "path, or delete it first",
                differs=differs,
            )
        if not exists and _holds_other_files(root, files):
            _check_receipts(root, plan)
        for path, contents in files.items():
            if not has_file(root / path, plan.metadata_sha256[path]):
                write_atomically(root / path, [contents])
        # The plan is written last: where it exists, everything that it lists does.
        if not exists:
            write_atomically(root / PLAN, [seal(plan.to_json())])
    return plan


def has_file(path: Path, sha256: str) -> bool:
    """Return whether this file exists and has this SHA-256."""
    try:
        return sha256_of(path) == sha256
    except FileNotFoundError:
        return False


def _holds_other_files(root: Path, files: Mapping[str, bytes]) -> bool:
    """Return whether a folder holds anything that a store does not hold before its first shard."""
    known = {root / path for path in (PLAN, JOB, *files)}
    # Temporary files of a creation that was interrupted are no reason to refuse the folder.
    known |= {path.with_name(path.name + TEMPORARY) for path in known}
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        if here == root:
            folders[:] = [name for name in folders if name not in (LOCK_FOLDER, STAGING_FOLDER, DAMAGED_FOLDER)]
        if any(here / name not in known for name in names):
            return True
    return False


def _version_of_receipts(root: Path, plan: Manifest) -> int:
    """Return the format version in which this plan has the digest that a receipt names, where the plan was lost."""
    for path in (root / LEDGER_FOLDER).glob("*.json"):
        with contextlib.suppress(ManifestError):
            named = read_receipt(root, f"{LEDGER_FOLDER}/{path.name}", what=str(path)).plan_sha256
            for version in range(1, plan.format_version):
                if plan.as_version(version).digest == named:
                    return version
    return plan.format_version


def _check_receipts(root: Path, plan: Manifest) -> None:
    """Raise unless a folder without a plan holds receipts of this very plan: then only the plan was lost."""
    own = 0
    for path in sorted((root / LEDGER_FOLDER).glob("*.json")):
        try:
            found = read_receipt(root, f"{LEDGER_FOLDER}/{path.name}", what=str(path))
        except ManifestError:
            continue  # damaged: `repair` drops it, once there is a plan again
        if found.plan_sha256 != plan.digest:
            own = 0
            break
        own += 1
    if not own:
        raise StoreExistsError(f"{root} holds files that are not a store of this job: choose another path, or empty it")


def check_store_name(name: str) -> str:
    """Return the name; raise ManifestError unless it can name a store."""
    if STORE_NAME.fullmatch(name):
        return name
    raise ManifestError(f"{name!r} cannot name a store: use letters, digits, '.', '_' and '-', a letter or digit first")
