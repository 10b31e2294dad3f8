"""What a store will look like: the plan, made from a transfer set, an encoding and the words that describe a job."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from msgspec.structs import replace
from numpy.typing import NDArray

from softlabels.encodings import Encoding
from softlabels.errors import JobError
from softlabels.manifest import (
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
    check_store_name,
    encoded_arrays,
)
from softlabels.softmath import Mean
from softlabels.store.constants import constant_files
from softlabels.store.geometry import choose_rows_per_chunk, choose_rows_per_shard
from softlabels.store.sequences import SampleTable
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
    """The plan of a store, with shard and chunk sizes chosen where they are not given.

    Args:
        layout: one row a sample unless told otherwise.
        members: how many members' rows are kept side by side; None keeps their mean.
        views: how views were made, for a layout of views.
        table: the samples of a layout of sequences.
        inputs: what one sample looks like, where the inputs are kept as well; see `kept_inputs`.
    Raises:
        JobError: sizes that do not fit each other, or inputs of a layout that cannot keep them. ManifestError: a name
        that no store may have.
    """
    check_store_name(name)
    if samples < 1:
        raise JobError(f"transfer set {transfer_set.name!r} is empty: there is nothing to compute targets for")
    if table is not None:
        layout = RowLayout(kind="sequences", samples=samples, rows=table.rows)
        transfer_set = replace(transfer_set, fingerprint=table.fingerprint())
    layout = layout or RowLayout(kind="single", samples=samples, rows=samples)
    arrays = store_arrays(encoding, ids, layout=layout, labelled=transfer_set.labelled, members=members, views=views)
    row_bytes = sum(spec.row_bytes for spec in encoded_arrays(encoding, members).values())
    input_bytes = 0 if inputs is None else inputs.row_bytes
    if inputs is not None:
        _refuse_inputs_of(layout)
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
        software=software_versions(),
        metadata_sha256={path: hashlib.sha256(contents).hexdigest() for path, contents in files.items()},
        members=members,
        views=views,
    )


def store_arrays(
    encoding: Encoding,
    ids: IdSpec,
    *,
    layout: RowLayout,
    labelled: bool,
    members: int | None = None,
    views: ViewSpec | None = None,
) -> dict[str, ArraySpec]:
    """Every array of a store: the encoding's own, then, a row each, ids, fingerprints, view parameters and labels.

    Sequences keep ids and fingerprints once a sample, see `softlabels.store.sequences`.
    """
    arrays = encoded_arrays(encoding, members)
    if layout.kind != "sequences":
        as_bytes = ArraySpec(dtype="|u1", row_shape=(ids.width_bytes,))
        arrays["ids"] = as_bytes if ids.kind == "str" else ArraySpec(dtype="<i8", row_shape=())
        arrays["fingerprints"] = ArraySpec(dtype="|u1", row_shape=(FINGERPRINT_BYTES,))
    if views is not None and views.parameters:
        arrays["view_parameters"] = ArraySpec(dtype="<f8", row_shape=(len(views.parameters),))
    if labelled:
        arrays["labels"] = ArraySpec(dtype="<i4", row_shape=())
    return arrays


def kept_inputs(inputs: NDArray[Any]) -> ArraySpec:
    """How samples like these are kept in a store.

    Args:
        inputs: [B, ...], some of them.
    Raises:
        JobError: of a type or shape that no store holds.
    """
    order = inputs.dtype.newbyteorder("<") if inputs.dtype.itemsize > 1 else inputs.dtype
    if inputs.dtype.kind not in "fiu" or inputs.dtype.itemsize > 8 or inputs.dtype.str != order.str:
        raise JobError(
            f"inputs of type {inputs.dtype.str} cannot be kept in a store: it holds whole numbers and floats of up to "
            "8 bytes, little-endian; have the transfer set give one of these, as '|u1' or '<f4', or leave out `inputs "
            "= true` of [store]"
        )
    if not all(inputs.shape[1:]) or inputs.ndim > 9:
        raise JobError(
            f"inputs of shape {list(inputs.shape[1:])} a sample cannot be kept in a store: it takes up to 8 axes, none "
            "of them empty"
        )
    return ArraySpec(dtype=inputs.dtype.str, row_shape=inputs.shape[1:])


def software_versions() -> Mapping[str, Any]:
    """Versions of the installed libraries that may change a target or a file."""
    found = {}
    for library in _RECORDED:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def _refuse_inputs_of(layout: RowLayout) -> None:
    if layout.kind != "single":
        what = "views" if layout.kind == "views" else "sequences"
        raise JobError(
            f"inputs are kept where every sample has one row of targets, not in a store of {what}: leave out `inputs = "
            "true` of [store]; students bring the inputs themselves"
        )


def _chunk_for(row_bytes: int, input_bytes: int, rows_per_shard: int | None) -> int:
    """Rows a chunk: for the targets' sake, which are read most; fewer where the inputs' chunks would be too large."""
    chosen = choose_rows_per_chunk(row_bytes)
    while chosen > 1 and chosen * input_bytes > MAX_INPUT_CHUNK_BYTES:
        chosen //= 2
    while rows_per_shard is not None and rows_per_shard % chosen:
        chosen //= 2
    return max(1, chosen)
