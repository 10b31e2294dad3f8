"""What a store says of itself: the manifest, its JSON form, and the digest that names one version of a store."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from softlabels.class_list import ClassList, class_list_of
from softlabels.documents import as_json, canonical_json
from softlabels.encodings import Encoding, make_encoding
from softlabels.errors import FormatVersionError, ManifestError
from softlabels.ids import MAX_STRING_ID_BYTES, IdKind
from softlabels.softmath import Mean
from softlabels.transfer_set import FINGERPRINT_BYTES

FORMAT = "softlabels-store"
FORMAT_VERSION = 1

STORE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What a store may be called: it is a path segment in URLs and on disk, so nothing that climbs out of a folder."""

IDS = "ids"
LABELS = "labels"
FINGERPRINTS = "fingerprints"
VIEW_PARAMETERS = "view_parameters"
INPUTS = "inputs"
ROW_OFFSETS = "row_offsets"
SAMPLE_ARRAYS = (IDS, LABELS, FINGERPRINTS, VIEW_PARAMETERS, INPUTS)
"""Arrays that say what a row belongs to, up to the sample itself; all others are the encoding's."""

Container = Literal["zarr", "hdf5"]
LayoutKind = Literal["single", "views", "sequences"]
T = TypeVar("T")

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


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """How rows follow from samples: one each, `views` each, or a varying number through offsets."""

    kind: LayoutKind
    samples: int
    rows: int
    views: int = 1


@dataclass(frozen=True, kw_only=True)
class IdSpec:
    """How sample ids are kept.

    Attributes:
        kind: int or str.
        dense_start: sample i has the id `dense_start + i`; None when ids must be looked up.
        width_bytes: UTF-8 bytes a string id may take; 0 for integers.
    """

    kind: IdKind
    dense_start: int | None = None
    width_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class EncodingSpec:
    """Name and parameters of the encoding, and the names of the arrays that it learnt for this store."""

    name: str
    params: Mapping[str, Any]
    constants: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TemperatureSpec:
    """Temperatures of the kept rows.

    Attributes:
        default: what a batch is tempered with when nobody asks otherwise.
        captured: what the kept rows are tempered with already.
        locked: True when only `captured` may be asked for.
    """

    default: float
    captured: float
    locked: bool


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """One member of the ensemble, as the job named it.

    Attributes:
        weights, weights_sha256: the file's name and SHA-256; without a file, the digest is of the weights in memory.
        preprocess, preprocess_table: the reference or the table of what turned samples into the model's inputs.
        code_sha256, preprocess_sha256: of the source files that define them.
        kind: where the model came from: `python`, `torchscript`, `export`, `onnx`, `transformers`, ...
        revision: the version that a model hub resolved the name to.
        libraries: versions of the libraries that ran it, beyond those of the whole store.
        class_list_sha256: digest of its own list of classes, as in `ClassList`, whose order was mapped to the store's.
    """

    name: str
    model: str
    arguments: Mapping[str, Any]
    weight: float
    weights: str | None = None
    weights_sha256: str | None = None
    preprocess: str | None = None
    code_sha256: str | None = None
    kind: str | None = None
    preprocess_table: Mapping[str, Any] | None = None
    preprocess_sha256: str | None = None
    revision: str | None = None
    libraries: Mapping[str, str] | None = None
    class_list_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class TransferSetSpec:
    """What the targets were computed for; `fingerprint` is None until every shard is committed."""

    name: str
    source: str
    arguments: Mapping[str, Any]
    fingerprint: str | None = None
    labelled: bool = False


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """How rows are cut: shards are the unit of commit, chunks the unit of checksum.

    Attributes:
        compression: of chunks, for archives; None where a row must have an address.
    """

    count: int
    rows_per_shard: int
    rows_per_chunk: int
    compression: str | None = None


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array of the store: little-endian dtype and the shape each row has in it."""

    dtype: str
    row_shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes that one row takes."""
        size = np.dtype(self.dtype).itemsize
        for extent in self.row_shape:
            size *= extent
        return size


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """How the views of a sample were made, so that a trainer replays each of them exactly.

    Attributes:
        transform: a reference to what makes a view, for people and trainers.
        parameters: names of the recorded parameters, the columns of the array `view_parameters`; empty when seeded.
        seed_key: the views' seeds follow from this key, the sample id and the view's number (`softlabels.views`).
        libraries: versions that a replay must match.
        arguments: that the reference was called with.
        transform_sha256: what names the transform's code and settings, see `softlabels.views.transforms`.
    """

    transform: str
    parameters: tuple[str, ...] = ()
    seed_key: str | None = None
    libraries: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Any] | None = None
    transform_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One transfer set × one ensemble × one encoding.

    Attributes:
        members: how many members' rows are kept side by side; None when their mean is kept.
        views: how views were made; None where samples have one row, or none that was augmented.
        precision: what the teachers computed in, by autocast; None for float32.
        ledger: digest over all receipts; None while the store is unfinished.
        metadata_sha256: SHA-256 of the container's metadata files and of the id index, by path; empty in a plan.
        class_list: names of the classes, in the order of the columns; None where the job gave none.
        audit: error of the encoding over every row written, see `softlabels.audit`.
        plan_sha256: digest of the plan that every receipt of this store names; None in the plan itself.
    """

    name: str
    container: Container
    layout: RowLayout
    ids: IdSpec
    classes: int
    encoding: EncodingSpec
    temperature: TemperatureSpec
    mean: Mean
    teachers: tuple[TeacherSpec, ...]
    transfer_set: TransferSetSpec
    shards: ShardSpec
    arrays: Mapping[str, ArraySpec]
    software: Mapping[str, str]
    metadata_sha256: Mapping[str, str]
    members: int | None = None
    views: ViewSpec | None = None
    precision: str | None = None
    audit: Mapping[str, Any] | None = None
    ledger: str | None = None
    plan_sha256: str | None = None
    class_list: ClassList | None = None
    format_version: int = FORMAT_VERSION

    @property
    def finished(self) -> bool:
        """Whether every shard is committed."""
        return self.ledger is not None

    @property
    def rows(self) -> int:
        """How many rows the store has when finished."""
        return self.layout.rows

    @property
    def samples(self) -> int:
        """How many samples the store has when finished."""
        return self.layout.samples

    @property
    def digest(self) -> str:
        """64 hex digits that name this version of this store: SHA-256 of the canonical JSON."""
        return hashlib.sha256(canonical_json(self.to_json())).hexdigest()

    @property
    def target_row_bytes(self) -> int:
        """Bytes of targets a row: what the encoding writes, without ids, labels, fingerprints and inputs."""
        return sum(spec.row_bytes for name, spec in self.arrays.items() if name not in SAMPLE_ARRAYS)

    def make_encoding(self, constants: Mapping[str, NDArray[Any]] | None = None) -> Encoding:
        """The encoding of this store's rows, with the arrays that it learnt, by name."""
        spec = self.encoding
        return make_encoding(spec.name, classes=self.classes, params=spec.params, constants=constants)

    def finish(
        self, *, ledger: str, fingerprint: str, audit: Mapping[str, Any], metadata_sha256: Mapping[str, str]
    ) -> Manifest:
        """The manifest of the finished store that this plan describes."""
        transfer_set = replace(self.transfer_set, fingerprint=fingerprint)
        return replace(
            self,
            ledger=ledger,
            transfer_set=transfer_set,
            audit=audit,
            metadata_sha256=metadata_sha256,
            plan_sha256=self.digest,
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-able description that `from_json` reads back."""
        return {"format": FORMAT, **as_json(self)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Manifest:
        """Read a manifest and believe nothing of it that does not add up.

        Raises:
            FormatVersionError: written by a newer softlabels.
            ManifestError: anything missing, of the wrong type, out of bounds or contradicting itself.
        """
        _check_version(document)
        try:
            manifest = cls(
                name=check_store_name(_typed(document, "name", str)),
                container=cast(Container, _one_of(document, "container", ("zarr", "hdf5"))),
                layout=RowLayout(**_table(document, "layout")),
                ids=IdSpec(**_table(document, "ids")),
                classes=_typed(document, "classes", int),
                encoding=_encoding_spec(_table(document, "encoding")),
                temperature=TemperatureSpec(**_table(document, "temperature")),
                mean=cast(Mean, _one_of(document, "mean", ("none", "arithmetic", "geometric"))),
                teachers=tuple(check_teacher(TeacherSpec(**t)) for t in _typed(document, "teachers", list)),
                transfer_set=TransferSetSpec(**_table(document, "transfer_set")),
                shards=ShardSpec(**_table(document, "shards")),
                arrays={check_store_name(k): _array_spec(v) for k, v in _table(document, "arrays").items()},
                software=_table(document, "software"),
                metadata_sha256=_table(document, "metadata_sha256"),
                members=document.get("members"),
                views=None if document.get("views") is None else _view_spec(_table(document, "views")),
                precision=document.get("precision"),
                audit=document.get("audit"),
                ledger=document.get("ledger"),
                plan_sha256=document.get("plan_sha256"),
                class_list=_class_list(document),
            )
            check_manifest(manifest)
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
            raise ManifestError(f"the manifest does not say what a store needs: {error}") from error
        return manifest


def check_encoding(manifest: Manifest, encoding: Encoding) -> Encoding:
    """The encoding, if the manifest's arrays are those that it writes.

    Raises:
        ManifestError: they are not.
    """
    for name, spec in encoded_arrays(encoding, manifest.members).items():
        if manifest.arrays.get(name) != spec:
            raise ManifestError(f"array {name!r} of {manifest.name!r} is not what encoding {encoding.name!r} writes")
    return encoding


def encoded_arrays(encoding: Encoding, members: int | None) -> dict[str, ArraySpec]:
    """The arrays that an encoding's rows are kept in, with a leading axis for members where those are kept."""
    axis = () if members is None else (members,)
    return {
        name: ArraySpec(dtype=field.dtype.str, row_shape=(*axis, *field.row_shape))
        for name, field in encoding.fields.items()
    }


def check_store_name(name: str) -> str:
    """The name, if a store may be called so.

    Raises:
        ManifestError: it may not.
    """
    if not STORE_NAME.fullmatch(name):
        raise ManifestError(
            f"{name!r} cannot name a store: use letters, digits, '.', '_' and '-', starting with a letter or digit"
        )
    return name


def _check_version(document: Mapping[str, Any]) -> None:
    if document.get("format") != FORMAT:
        raise ManifestError(f"not a softlabels manifest: its format is {document.get('format')!r}, not {FORMAT!r}")
    version = document.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ManifestError(f"the manifest's format version is {version!r}, not a positive whole number")
    if version > FORMAT_VERSION:
        raise FormatVersionError(
            f"this store has format version {version}, this softlabels reads up to {FORMAT_VERSION}: upgrade "
            "softlabels",
            found=version,
            supported=FORMAT_VERSION,
        )


def _array_spec(value: Any) -> ArraySpec:
    shape = value["row_shape"]
    if not isinstance(shape, list | tuple) or len(shape) > 8:
        raise ValueError(f"row_shape {shape!r}")
    for extent in shape:
        if not isinstance(extent, int) or isinstance(extent, bool) or not 1 <= extent <= MAX_EXTENT:
            raise ValueError(f"row_shape {shape!r}")
    dtype = value["dtype"]
    if not isinstance(dtype, str) or not re.fullmatch(r"[<|][fiu][1248]", dtype):
        raise ValueError(f"dtype {dtype!r} is not a little-endian number type")
    return ArraySpec(dtype=dtype, row_shape=tuple(shape))


def _class_list(document: Mapping[str, Any]) -> ClassList | None:
    if document.get("class_list") is None:
        return None
    return class_list_of(_table(document, "class_list"), classes=_typed(document, "classes", int))


def _view_spec(value: Mapping[str, Any]) -> ViewSpec:
    names = value.get("parameters", ())
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"views.parameters is {names!r}")
    return ViewSpec(**{**value, "parameters": tuple(names)})


def _encoding_spec(value: Mapping[str, Any]) -> EncodingSpec:
    names = value.get("constants", ())
    if not isinstance(names, list | tuple) or len(names) > 64:
        raise ValueError(f"encoding.constants is {names!r}")
    return EncodingSpec(**{**value, "constants": tuple(check_store_name(name) for name in names)})


def _typed(document: Mapping[str, Any], key: str, kind: type[T]) -> T:
    value = document[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{key} is {value!r}, not a {kind.__name__}")
    return value


def _table(document: Mapping[str, Any], key: str) -> dict[str, Any]:
    return _typed(document, key, dict)


def _one_of(document: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> str:
    value = document[key]
    if value not in allowed:
        raise ValueError(f"{key} is {value!r}, not one of {', '.join(allowed)}")
    return cast(str, value)


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
    for text in _TEACHER_TEXTS:
        if not isinstance(getattr(teacher, text), str | None):
            raise ValueError(f"{text} of teacher {teacher.name!r} is no text")
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
    for name, kept in manifest.make_encoding().fields.items():
        _expect(manifest, name, kept.dtype.str, (*axis, *kept.row_shape))


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
