"""What a store will look like: the plan, made from a transfer set, an encoding and the words that describe a job."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from softlabels.encodings import Encoding
from softlabels.errors import JobError
from softlabels.manifest import (
    ArraySpec,
    Container,
    EncodingSpec,
    IdSpec,
    Layout,
    Manifest,
    MeanKind,
    ShardSpec,
    TeacherSpec,
    TemperatureSpec,
    TransferSetSpec,
    check_store_name,
)
from softlabels.store.geometry import choose_rows_per_chunk, choose_rows_per_shard
from softlabels.transfer import FINGERPRINT_BYTES

_RECORDED = ("softlabels", "numpy", "torch", "zarr", "h5py")
"""Libraries whose versions may change a target or a file."""


def plan_store(
    *,
    name: str,
    samples: int,
    ids: IdSpec,
    encoding: Encoding,
    temperature: TemperatureSpec,
    mean: MeanKind,
    teachers: tuple[TeacherSpec, ...],
    transfer_set: TransferSetSpec,
    container: Container = "zarr",
    rows_per_shard: int | None = None,
    rows_per_chunk: int | None = None,
) -> Manifest:
    """The plan of a store, with shard and chunk sizes chosen where they are not given.

    Raises:
        JobError: sizes that do not fit each other. ManifestError: a name that no store may have.
    """
    check_store_name(name)
    if samples < 1:
        raise JobError(f"transfer set {transfer_set.name!r} is empty: there is nothing to compute targets for")
    arrays = store_arrays(encoding, ids, labelled=transfer_set.labelled)
    row_bytes = sum(field.row_bytes for field in encoding.fields.values())
    per_chunk = rows_per_chunk or _chunk_for(row_bytes, rows_per_shard)
    per_shard = rows_per_shard or choose_rows_per_shard(row_bytes, per_chunk, samples)
    if per_shard % per_chunk:
        raise JobError(f"rows_per_shard ({per_shard}) must be a multiple of rows_per_chunk ({per_chunk})")
    return Manifest(
        name=name,
        container=container,
        layout=Layout(kind="single", samples=samples, rows=samples),
        ids=ids,
        classes=encoding.classes,
        encoding=EncodingSpec(name=encoding.name, params=dict(encoding.params)),
        temperature=temperature,
        mean=mean,
        teachers=teachers,
        transfer_set=transfer_set,
        shards=ShardSpec(count=-(-samples // per_shard), rows_per_shard=per_shard, rows_per_chunk=per_chunk),
        arrays=arrays,
        software=software_versions(),
        metadata_sha256={},
    )


def store_arrays(encoding: Encoding, ids: IdSpec, *, labelled: bool) -> dict[str, ArraySpec]:
    """Every array of a store: the encoding's own, then ids, fingerprints and, where there are any, labels."""
    arrays: dict[str, ArraySpec] = {
        name: ArraySpec(dtype=field.dtype.str, row_shape=field.row_shape) for name, field in encoding.fields.items()
    }
    arrays["ids"] = ArraySpec(dtype="|u1", row_shape=(ids.width_bytes,)) if ids.kind == "str" else ArraySpec(
        dtype="<i8", row_shape=()
    )  # fmt: skip
    arrays["fingerprints"] = ArraySpec(dtype="|u1", row_shape=(FINGERPRINT_BYTES,))
    if labelled:
        arrays["labels"] = ArraySpec(dtype="<i4", row_shape=())
    return arrays


def software_versions() -> Mapping[str, Any]:
    """Versions of the installed libraries that may change a target or a file."""
    found = {}
    for library in _RECORDED:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def _chunk_for(row_bytes: int, rows_per_shard: int | None) -> int:
    chosen = choose_rows_per_chunk(row_bytes)
    while rows_per_shard is not None and rows_per_shard % chosen:
        chosen //= 2
    return max(1, chosen)
