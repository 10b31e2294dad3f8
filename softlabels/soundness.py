"""Does a manifest add up? Checked before anything of it is used, and before anything is allocated for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from softlabels.ids import MAX_STRING_ID_BYTES
from softlabels.transfer import FINGERPRINT_BYTES

if TYPE_CHECKING:
    from softlabels.manifest import Manifest, TeacherSpec

# Bounds that no real store reaches, and a hostile manifest must not pass.
MAX_ROWS = 1 << 48
MAX_SHARDS = 1 << 24
MAX_EXTENT = 1 << 31
MAX_CLASSES = 1 << 24
MAX_VIEWS = MAX_MEMBERS = 1 << 20
MAX_CHUNK_BYTES = 1 << 40

COMPRESSIONS: Mapping[str, tuple[str, ...]] = {"zarr": ("zstd", "blosc"), "hdf5": ("gzip",)}
"""What any reader of the format decodes without a plugin: HDF5 itself ships neither Zstandard nor Blosc."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_TEACHER_TEXTS = (
    *("weights", "weights_sha256", "preprocess", "preprocess_sha256", "code_sha256", "kind", "revision"),
    "class_list_sha256",
)
HALF_PRECISIONS = ("bfloat16", "float16")
"""What teachers may have computed in; a manifest that names none says float32."""

_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_manifest(manifest: Manifest) -> None:
    """Let a manifest pass whose parts have the types, the bounds and the relations that they must have.

    Raises:
        ValueError: one has not; TypeError, AttributeError where it cannot even be asked.
    """
    _check_counts(manifest)
    _check_temperature(manifest)
    _check_arrays(manifest)
    _check_keys(manifest)
    _check_digests(manifest)


def check_teacher(teacher: TeacherSpec) -> TeacherSpec:
    """What a manifest says of a teacher, if all of it has the types that it must have.

    Raises:
        ValueError: it has not.
    """
    if type(teacher.weight) not in (int, float) or not 0 < teacher.weight < float("inf"):
        raise ValueError(f"the weight of a teacher is {teacher.weight!r}, not a finite positive number")
    if not isinstance(teacher.name, str) or not isinstance(teacher.model, str):
        raise ValueError("a teacher's name or model is no text")
    for field in _TEACHER_TEXTS:
        if not isinstance(getattr(teacher, field), str | None):
            raise ValueError(f"{field} of teacher {teacher.name!r} is no text")
    for table in (teacher.arguments, teacher.preprocess_table, teacher.libraries):
        if not isinstance(table, Mapping | None):
            raise ValueError(f"a table of teacher {teacher.name!r} is none")
    return teacher


def check_path(path: str) -> str:
    """A path relative to a store, if it is one that stays inside.

    Raises:
        ValueError: it is absolute, climbs, is hidden, or holds what no file of a store has in its name.
    """
    if not all(_SEGMENT.fullmatch(segment) for segment in path.split("/")):
        raise ValueError(f"path {path!r} is none that a store has")
    return path


def check_whole(value: Any, label: str, *, least: int = 0, most: int = 1 << 62) -> int:
    """A whole number within bounds.

    Raises:
        ValueError: it is of another type (true and 1.0 among them), or out of bounds.
    """
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{label} is {value!r}, not a whole number from {least} to {most}")
    return value


def _check_counts(manifest: Manifest) -> None:
    layout, shards = manifest.layout, manifest.shards
    check_whole(layout.samples, "layout.samples", least=1, most=MAX_ROWS)
    check_whole(layout.rows, "layout.rows", least=1, most=MAX_ROWS)
    check_whole(layout.views, "layout.views", least=1, most=MAX_VIEWS)
    check_whole(manifest.classes, "classes", least=1, most=MAX_CLASSES)
    check_whole(shards.count, "shards.count", least=1, most=MAX_SHARDS)
    check_whole(shards.rows_per_shard, "shards.rows_per_shard", least=1, most=MAX_ROWS)
    check_whole(shards.rows_per_chunk, "shards.rows_per_chunk", least=1, most=MAX_ROWS)
    if layout.kind not in ("single", "views", "sequences"):
        raise ValueError(f"layout.kind {layout.kind!r} is unknown")
    if layout.kind != "sequences" and layout.rows != layout.samples * layout.views:
        raise ValueError(f"{layout.rows} rows are not {layout.samples} samples × {layout.views} views")
    if shards.compression is not None and shards.compression not in COMPRESSIONS[manifest.container]:
        raise ValueError(
            f"{manifest.container} chunks are compressed with {shards.compression!r}, which is unknown there"
        )
    if shards.rows_per_shard % shards.rows_per_chunk:
        raise ValueError("rows_per_shard is not a multiple of rows_per_chunk")
    if shards.count != -(-layout.rows // shards.rows_per_shard):
        raise ValueError(f"{shards.count} shards of {shards.rows_per_shard} rows do not hold {layout.rows} rows")


def _check_temperature(manifest: Manifest) -> None:
    if manifest.precision not in (None, *HALF_PRECISIONS):
        raise ValueError(f"precision is {manifest.precision!r}, not one of {', '.join(HALF_PRECISIONS)}")
    temperature = manifest.temperature
    for degree in (temperature.default, temperature.captured):
        if type(degree) not in (int, float) or not 0 < degree < float("inf"):
            raise ValueError(f"temperature {degree!r} is not a finite positive number")
    if type(temperature.locked) is not bool or (temperature.locked and temperature.default != temperature.captured):
        raise ValueError("a locked temperature must also be the default")


def _check_arrays(manifest: Manifest) -> None:
    for name, spec in manifest.arrays.items():
        if not 0 < spec.row_bytes * manifest.shards.rows_per_chunk <= MAX_CHUNK_BYTES:
            raise ValueError(f"array {name!r} has rows of {spec.row_bytes} bytes")
    axis: tuple[int, ...] = ()
    if manifest.members is not None:
        axis = (check_whole(manifest.members, "members", least=1, most=MAX_MEMBERS),)
    if manifest.encoding.constants:
        return  # such rows have a size that follows from learnt arrays: checked where those are read (`check_encoding`)
    for name, field in manifest.make_encoding().fields.items():
        _expect(manifest, name, field.dtype.str, (*axis, *field.row_shape))


def _check_keys(manifest: Manifest) -> None:
    """Rows are found by ids and told apart by fingerprints: both must be as their readers expect them."""
    ids, layout = manifest.ids, manifest.layout
    check_whole(ids.width_bytes, "ids.width_bytes", most=MAX_STRING_ID_BYTES)
    if ids.kind not in ("int", "str") or (ids.kind == "str") != (ids.width_bytes > 0):
        raise ValueError(f"ids of kind {ids.kind!r} and width {ids.width_bytes}")
    if ids.dense_start is not None:
        check_whole(ids.dense_start, "ids.dense_start", least=-(1 << 62))
        if ids.kind != "int":
            raise ValueError("only integer ids count up by one")
    if layout.kind != "sequences":
        _expect(manifest, "ids", *(("|u1", (ids.width_bytes,)) if ids.kind == "str" else ("<i8", ())))
        _expect(manifest, "fingerprints", "|u1", (FINGERPRINT_BYTES,))
    if manifest.views is not None and manifest.views.parameters:
        _expect(manifest, "view_parameters", "<f8", (len(manifest.views.parameters),))
    if manifest.transfer_set.labelled:
        _expect(manifest, "labels", "<i4", ())
    if "inputs" in manifest.arrays and layout.kind != "single":
        raise ValueError("inputs are kept where every sample has one row, which is not so here")


def _expect(manifest: Manifest, name: str, dtype: str, row_shape: tuple[int, ...]) -> None:
    spec = manifest.arrays.get(name)
    if spec is None or (spec.dtype, spec.row_shape) != (dtype, row_shape):
        raise ValueError(f"array {name!r} is not {dtype}{list(row_shape)} a row, as the rest of the manifest demands")


def _check_digests(manifest: Manifest) -> None:
    for path, digest in manifest.metadata_sha256.items():
        check_path(path)
        _check_digest(digest, path)
    if (manifest.ledger is None) != (manifest.plan_sha256 is None):
        raise ValueError("a finished store has both a ledger and a plan, an unfinished one neither")
    if manifest.ledger is not None:
        _check_digest(manifest.ledger, "the ledger")
        _check_digest(manifest.plan_sha256, "the plan")
    if not isinstance(manifest.audit, Mapping | None) or not isinstance(manifest.transfer_set.fingerprint, str | None):
        raise ValueError("the audit is no table, or the fingerprint no text")


def _check_digest(digest: object, what: str) -> None:
    if not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
        raise ValueError(f"the digest of {what} is {digest!r}")
