"""The manifest: everything a store says about itself, its JSON form, its validation, and the digest of a version."""

from __future__ import annotations

import hashlib
import math
import re
import sys
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from softlabels.class_list import ClassList, check_digest_of_names
from softlabels.documents import Document, Sha256, as_json, canonical_json, parse_document
from softlabels.encodings import Encoding, make_encoding
from softlabels.errors import FormatVersionError, ManifestError
from softlabels.ids import MAX_STRING_ID_BYTES, IdKind
from softlabels.softmath import Mean
from softlabels.transfer_set import FINGERPRINT_BYTES

FORMAT = "softlabels-store"
FORMAT_VERSION = 2
"""Version 2 has a CRC-32C of every row and chunk, and a digest of every receipt; docs/format.md."""

# Bounds that no real store reaches: they keep sizes computed from a hostile manifest within 64-bit integers.
MAX_ROWS = 1 << 48
MAX_SHARDS = 1 << 24
MAX_EXTENT = 1 << 31
MAX_CLASSES = 1 << 24
MAX_VIEWS = MAX_MEMBERS = 1 << 20
MAX_CHUNK_BYTES = 1 << 40
MAX_INTEGER_ID = 1 << 62

# `$` alone would also match before a line feed at the end.
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_END = r"(?!\n)$"

STORE_NAME = re.compile(_NAME)
"""A store's name is a path segment in URLs and on disk, so it has no `/` and no leading dot."""

StoreName: TypeAlias = Annotated[str, Meta(pattern=f"^{_NAME}{_END}")]
StorePath: TypeAlias = Annotated[str, Meta(pattern=f"^{_NAME}(/{_NAME})*{_END}")]
"""A path relative to a store's folder that cannot leave it: no `..`, no leading `/`, no hidden files."""

PositiveNumber: TypeAlias = Annotated[int, Meta(gt=0, le=1 << 53)] | Annotated[float, Meta(gt=0, le=sys.float_info.max)]
"""A finite number above 0, kept as it was written: 4 and 4.0 have different canonical bytes."""

Container = Literal["zarr", "hdf5"]
Compression = Literal["zstd", "blosc", "gzip"]

COMPRESSIONS: Mapping[Container, tuple[Compression, ...]] = {"zarr": ("zstd", "blosc"), "hdf5": ("gzip",)}
"""What any reader of the format decodes without a plugin: HDF5 itself ships neither Zstandard nor Blosc."""

IDS = "ids"
LABELS = "labels"
FINGERPRINTS = "fingerprints"
VIEW_PARAMETERS = "view_parameters"
INPUTS = "inputs"
SAMPLE_ARRAYS = (IDS, LABELS, FINGERPRINTS, VIEW_PARAMETERS, INPUTS)
"""Arrays that describe the sample of a row; all other arrays belong to the encoding."""

ROW_OFFSETS = "row_offsets"
"""Field of replies for sequences: where each sample's rows begin. Not an array of the store."""


class RowLayout(Document, frozen=True):
    """How rows follow from samples: one each, `views` each, or a varying number (sequences)."""

    kind: Literal["single", "views", "sequences"]
    samples: Annotated[int, Meta(ge=1, le=MAX_ROWS)]
    rows: Annotated[int, Meta(ge=1, le=MAX_ROWS)]
    views: Annotated[int, Meta(ge=1, le=MAX_VIEWS)] = 1

    def __post_init__(self) -> None:
        if self.kind != "sequences" and self.rows != self.samples * self.views:
            raise ValueError(f"{self.rows} rows are not {self.samples} samples × {self.views} views")


class IdSpec(Document, frozen=True):
    """How sample ids are stored.

    Attributes:
        dense_start: sample i has the id `dense_start + i`; None when ids must be looked up.
        width_bytes: UTF-8 bytes of the longest string id; 0 for integers.
    """

    kind: IdKind
    dense_start: Annotated[int, Meta(ge=-MAX_INTEGER_ID, le=MAX_INTEGER_ID)] | None = None
    width_bytes: Annotated[int, Meta(ge=0, le=MAX_STRING_ID_BYTES)] = 0

    def __post_init__(self) -> None:
        if (self.kind == "str") != (self.width_bytes > 0):
            raise ValueError(f"ids of kind {self.kind!r} cannot have width_bytes {self.width_bytes}")
        if self.dense_start is not None and self.kind != "int":
            raise ValueError("only integer ids can have a dense_start")


class EncodingSpec(Document, frozen=True):
    """Name and parameters of the encoding, and the names of the arrays that it learnt for this store."""

    name: str
    params: Mapping[str, Any]
    constants: Annotated[tuple[StoreName, ...], Meta(max_length=64)] = ()


class TemperatureSpec(Document, frozen=True):
    """Temperatures: `default` of a batch, `captured` in the stored rows, and whether they are `locked` to it."""

    default: PositiveNumber
    captured: PositiveNumber
    locked: bool

    def __post_init__(self) -> None:
        if self.locked and self.default != self.captured:
            raise ValueError(f"default is {self.default}, but the targets are locked to {self.captured}")


class TeacherSpec(Document, frozen=True):
    """One member of the ensemble, as the job named it.

    Attributes:
        weights, weights_sha256: name and SHA-256 of the file; without a file, the digest of the weights in memory.
        state_sha256: digest of what the model computes with: its loaded state, and files named in `arguments`.
        libraries: versions of the libraries that ran it, beyond those of the whole store.
        class_list_sha256: digest of the teacher's class list; its columns were reordered to the store's.
    """

    name: str
    model: str
    arguments: Mapping[str, Any]
    weight: PositiveNumber
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
    state_sha256: Sha256 | None = None


class TransferSetSpec(Document, frozen=True):
    """What the targets were computed for."""

    name: str
    source: str
    arguments: Mapping[str, Any]
    fingerprint: str | None = None  # of all samples; None until every shard is committed
    labelled: bool = False
    planned_sha256: Sha256 | None = None  # of all ids and some samples, when the store was planned; None in version 1


class ShardSpec(Document, frozen=True):
    """How rows are cut: a shard is the unit of commit, a chunk of checksum and, in archives, of compression."""

    count: Annotated[int, Meta(ge=1, le=MAX_SHARDS)]
    rows_per_shard: Annotated[int, Meta(ge=1, le=MAX_ROWS)]
    rows_per_chunk: Annotated[int, Meta(ge=1, le=MAX_ROWS)]
    compression: Compression | None = None

    def __post_init__(self) -> None:
        if self.rows_per_shard % self.rows_per_chunk:
            raise ValueError("rows_per_shard is not a multiple of rows_per_chunk")


class ArraySpec(Document, frozen=True):
    """One array of the store: little-endian dtype and the shape of one row."""

    dtype: Annotated[str, Meta(pattern=rf"^([<|][iu][1248]|<f[248]){_END}")]
    row_shape: Annotated[tuple[Annotated[int, Meta(ge=1, le=MAX_EXTENT)], ...], Meta(max_length=8)]

    @property
    def row_bytes(self) -> int:
        """Bytes that one row takes."""
        # Not np.prod: in a hostile manifest the product may exceed 64 bits.
        return math.prod(self.row_shape) * np.dtype(self.dtype).itemsize


class ViewSpec(Document, frozen=True):
    """How the views of a sample were made, so that a trainer replays each of them exactly.

    Attributes:
        transform: reference to the callable that makes a view, called with `arguments`.
        parameters: names of the recorded parameters, the columns of the array `view_parameters`; empty when seeded.
        seed_key: key that view seeds derive from, together with sample id and view number (`softlabels.views`).
        libraries: library versions that a replay must match.
        transform_sha256: digest of the transform's code and settings (`softlabels.views.transforms`).
    """

    transform: str
    parameters: tuple[str, ...] = ()
    seed_key: str | None = None
    libraries: Mapping[str, str] = {}
    arguments: Mapping[str, Any] | None = None
    transform_sha256: str | None = None


class Manifest(Document, frozen=True):
    """One transfer set × one ensemble × one encoding.

    Attributes:
        members: number of teachers whose rows are stored side by side; None when their mean is stored.
        precision: precision of the teachers under autocast; None for float32.
        ledger: digest over all receipts; None while the store is unfinished.
        metadata_sha256: SHA-256 of the container's metadata files and of the id index, by path; empty in a plan.
        audit: error of the encoding over every row written, see `softlabels.audit`.
        plan_sha256: digest of the plan that every receipt of this store names; None in the plan itself.
    """

    name: StoreName
    container: Container
    layout: RowLayout
    ids: IdSpec
    classes: Annotated[int, Meta(ge=1, le=MAX_CLASSES)]
    encoding: EncodingSpec
    temperature: TemperatureSpec
    mean: Mean
    teachers: tuple[TeacherSpec, ...]
    transfer_set: TransferSetSpec
    shards: ShardSpec
    arrays: Mapping[StoreName, ArraySpec]
    software: Mapping[str, Any]
    metadata_sha256: Mapping[StorePath, Sha256]
    members: Annotated[int, Meta(ge=1, le=MAX_MEMBERS)] | None = None
    views: ViewSpec | None = None
    precision: Literal["bfloat16", "float16"] | None = None
    audit: Mapping[str, Any] | None = None
    ledger: Sha256 | None = None
    plan_sha256: Sha256 | None = None
    class_list: ClassList | None = None
    format_version: int = FORMAT_VERSION

    @property
    def finished(self) -> bool:
        """Whether every shard is committed."""
        return self.ledger is not None

    @property
    def rows(self) -> int:
        """Number of rows of the finished store."""
        return self.layout.rows

    @property
    def samples(self) -> int:
        """Number of samples of the finished store."""
        return self.layout.samples

    @property
    def digest(self) -> str:
        """64 hex digits that name this version of this store: SHA-256 of the canonical JSON."""
        return hashlib.sha256(canonical_json(self.to_json())).hexdigest()

    @property
    def row_sum_names(self) -> tuple[str, ...]:
        """Arrays in the order in which their rows' CRC-32C are stored; none in format version 1."""
        return tuple(sorted(self.arrays)) if self.format_version >= 2 else ()

    @property
    def target_row_bytes(self) -> int:
        """Bytes of targets a row: what the encoding writes, without ids, labels, fingerprints and inputs."""
        return sum(spec.row_bytes for name, spec in self.arrays.items() if name not in SAMPLE_ARRAYS)

    def make_encoding(self, constants: Mapping[str, NDArray[Any]] | None = None) -> Encoding:
        """Return the encoding of this store's rows; `constants` are the arrays that it learnt, by name."""
        spec = self.encoding
        return make_encoding(spec.name, classes=self.classes, params=spec.params, constants=constants)

    def finish(
        self, *, ledger: str, fingerprint: str, audit: Mapping[str, Any], metadata_sha256: Mapping[str, str]
    ) -> Manifest:
        """Return the manifest of the finished store that this plan describes."""
        return msgspec.structs.replace(
            self,
            ledger=ledger,
            transfer_set=msgspec.structs.replace(self.transfer_set, fingerprint=fingerprint),
            audit=audit,
            metadata_sha256=metadata_sha256,
            plan_sha256=self.digest,
        )

    def as_version(self, version: int) -> Manifest:
        """Return the same plan in an older format version, to continue a store that was begun in it."""
        if version >= self.format_version:
            return self
        return msgspec.structs.replace(
            self,
            format_version=version,
            transfer_set=msgspec.structs.replace(self.transfer_set, planned_sha256=None),
            teachers=tuple(msgspec.structs.replace(teacher, state_sha256=None) for teacher in self.teachers),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, which `from_json` reads back."""
        return {"format": FORMAT, **as_json(self)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Manifest:
        """Return the manifest of a JSON document, validated before anything is allocated for it.

        Raises FormatVersionError where a newer softlabels wrote it, ManifestError where it is invalid.
        """
        # Before parsing, which would reject a newer version for a field that is unknown here.
        _check_version(document)
        manifest = parse_document({k: v for k, v in document.items() if k != "format"}, cls, what="the manifest")
        try:
            _check_parts(manifest)
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
            raise ManifestError(f"the manifest contradicts itself: {error}") from error
        return manifest


def _check_parts(manifest: Manifest) -> None:
    """Raise ValueError unless the parts of a manifest agree with each other; `Document` checks types and bounds."""
    shards, rows = manifest.shards, manifest.layout.rows
    if shards.count != -(-rows // shards.rows_per_shard):
        raise ValueError(f"shards.count is {shards.count}, too few or too many for {rows} rows")
    if shards.compression is not None and shards.compression not in COMPRESSIONS[manifest.container]:
        raise ValueError(f"shards.compression {shards.compression!r} is unknown in {manifest.container} containers")
    if (manifest.ledger is None) != (manifest.plan_sha256 is None):
        raise ValueError("a finished store has both ledger and plan_sha256, an unfinished one neither")
    if manifest.class_list is not None:
        check_digest_of_names(manifest.class_list, classes=manifest.classes)
    ids, views = manifest.ids, manifest.views
    for name, spec in manifest.arrays.items():
        if spec.row_bytes * manifest.shards.rows_per_chunk > MAX_CHUNK_BYTES:
            raise ValueError(f"arrays.{name}.row_shape: a chunk would take more than {MAX_CHUNK_BYTES} bytes")
    if not manifest.encoding.constants:
        # With constants the row size depends on learnt arrays; `check_encoding` runs once those are read.
        for name, spec in encoded_arrays(manifest.make_encoding(), manifest.members).items():
            _expect(manifest, name, spec.dtype, spec.row_shape)
    if manifest.layout.kind != "sequences":
        _expect(manifest, IDS, *(("|u1", (ids.width_bytes,)) if ids.kind == "str" else ("<i8", ())))
        _expect(manifest, FINGERPRINTS, "|u1", (FINGERPRINT_BYTES,))
    if views is not None and views.parameters:
        _expect(manifest, VIEW_PARAMETERS, "<f8", (len(views.parameters),))
    if manifest.transfer_set.labelled:
        _expect(manifest, LABELS, "<i4", ())
    if INPUTS in manifest.arrays and manifest.layout.kind != "single":
        raise ValueError(f"arrays.{INPUTS} needs the layout 'single', one row a sample")


def store_digest(manifest: Manifest) -> str:
    """Return the digest that identifies this version of the store to caches and clients."""
    digest = manifest.digest
    # Not the plan's own digest: nothing cached from an unfinished store may pass for the finished one.
    return digest if manifest.finished else hashlib.sha256(b"unfinished" + bytes.fromhex(digest)).hexdigest()


def check_encoding(manifest: Manifest, encoding: Encoding) -> Encoding:
    """Return the encoding; raise ManifestError unless it writes the arrays that the manifest lists."""
    for name, spec in encoded_arrays(encoding, manifest.members).items():
        if manifest.arrays.get(name) != spec:
            raise ManifestError(f"array {name!r} of {manifest.name!r} is not what encoding {encoding.name!r} writes")
    return encoding


def encoded_arrays(encoding: Encoding, members: int | None) -> dict[str, ArraySpec]:
    """Return the arrays of an encoding's rows, with a leading axis for members where those are stored."""
    axis, fields = () if members is None else (members,), encoding.fields.items()
    return {name: ArraySpec(dtype=field.dtype.str, row_shape=(*axis, *field.row_shape)) for name, field in fields}


def _check_version(document: Mapping[str, Any]) -> None:
    if document.get("format") != FORMAT:
        raise ManifestError(f"not a softlabels manifest: its format is {document.get('format')!r}, not {FORMAT!r}")
    version = document.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ManifestError(f"format_version of the manifest is {version!r}, not a positive integer")
    if version > FORMAT_VERSION:
        message = f"this store has format version {version}, this softlabels reads up to {FORMAT_VERSION}: upgrade it"
        raise FormatVersionError(message, found=version, supported=FORMAT_VERSION)


def _expect(manifest: Manifest, name: str, dtype: str, row_shape: tuple[int, ...]) -> None:
    spec = manifest.arrays.get(name)
    if spec is None or (spec.dtype, spec.row_shape) != (dtype, row_shape):
        raise ValueError(f"arrays.{name} is not {dtype}{list(row_shape)} a row, as the other fields require")
