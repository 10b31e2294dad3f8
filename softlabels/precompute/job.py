"""The job: settings of a precompute run, as typed documents read from TOML.

A store keeps its job as JSON beside the plan, so that `resume` needs no job file; field names are part of that format.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta, field

from softlabels.documents import Document, open_sealed, parse_document
from softlabels.encodings.selection import parse_encoding
from softlabels.errors import JobError
from softlabels.store.store_documents import JOB
from softlabels.transfer_sets import check_source

Count: TypeAlias = Annotated[int, Meta(ge=1)]

PILOT_BATCH_SIZE = 32
"""Batch size of the first few batches while none has been found: any device runs so few inputs of any teacher."""


class StoreTable(Document, frozen=True):
    """The store to write.

    Attributes:
        path: folder, relative to the job file.
        name: name of the store; the folder's name when left out.
        format: container format.
        rows_per_shard, rows_per_chunk: chosen by size when left out.
        inputs: also keep the samples beside their targets, so that the store alone trains a student.
    """

    path: str
    name: str | None = None
    format: Literal["zarr", "hdf5"] = "zarr"
    rows_per_shard: Count | None = None
    rows_per_chunk: Count | None = None
    inputs: bool = False


class TransferSetTable(Document, frozen=True):
    """The samples to compute targets for; docs/transfer-sets.md shows every kind.

    Attributes:
        source: one of `softlabels.transfer_sets.KINDS`, or a reference to a callable that returns a `TransferSet`.
        arguments: keyword arguments of the source.
    """

    source: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


class ViewsTable(Document, frozen=True):
    """Several augmented views of each sample, with one target each; without this table, one row per sample.

    Attributes:
        count: views per sample.
        transform: reference to a callable that returns a view transform, see `softlabels.views.load_view_transform`.
        arguments: keyword arguments of that callable.
    """

    count: Count
    transform: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


class SequencesTable(Document, frozen=True):
    """Samples with many positions and one row of targets per position; without this table, one row per sample.

    Attributes:
        positions_per_pass: most positions of one forward pass, padding included, beside [run]'s `batch_size`; a longer
            sequence goes alone.
        labels: `own` keeps the transfer set's labels, one per position; `next` takes each position's next token;
            `none` keeps none.
    """

    positions_per_pass: Count = 2048
    labels: Literal["own", "next", "none"] = "own"


class TargetsTable(Document, frozen=True):
    """What to keep of the teachers' logits.

    Attributes:
        temperature: default temperature of batches, and the temperature at which an arithmetic mean is taken.
        mean: mean over the members of an ensemble.
        encoding: encoding of the rows, a name or a table, see `softlabels.encodings.selection`.
        keep: `members` keeps every teacher's own rows, so that mean, weights and temperature can be chosen later.
        classes: file with the names of the store's classes, one per column, in order; the class list of the first
            teacher that has one when left out.
    """

    temperature: float
    mean: Literal["arithmetic", "geometric"] = "geometric"
    encoding: str | Mapping[str, Any] = "f16"
    keep: Literal["mean", "members"] = "mean"
    classes: str | None = None


class TeacherTable(Document, frozen=True):
    """One member of the ensemble; docs/teachers.md shows every kind.

    Attributes:
        model: reference to a callable that returns a `torch.nn.Module`; or `torchscript:`, `export:`, `onnx:` and a
            file, `transformers:`, `timm:`, `torchvision:` and a name or folder.
        arguments: keyword arguments of that callable or library.
        weights: safetensors, an index of them, or a checkpoint of weights alone, relative to the job file; None when
            the callable returns a trained model.
        weight: weight in the mean.
        preprocess: reference to a callable from the inputs' tensor to the model's input, or a table of image steps.
        classes: file of class names in the order of the outputs, or `model` where its library knows them.
        head: dotted name of the last linear layer, where hidden states are kept and the model does not say.
        name: name for messages and the manifest; `teacher 0`, `teacher 1`, … when left out.
    """

    model: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    weight: float = 1.0
    preprocess: str | Mapping[str, Any] | None = None
    classes: str | None = None
    head: str | None = None
    name: str | None = None


class RunTable(Document, frozen=True):
    """How to run the teachers; docs/operations.md says what each setting costs and changes.

    Attributes:
        batch_size: inputs per forward pass; `auto` searches for one, within `memory_limit_gib`.
        memory_limit_gib: most device memory (on the CPU, main memory) to use in that search; most of what is free when
            left out.
        loaders: threads that load batches from the transfer set, which must be thread-safe for more than one.
        device: torch device; `auto` takes an accelerator where there is one.
        precision: autocast precision of the teachers; other than `float32` it changes the targets, so the manifest
            records it.
        compile: run the teachers through `torch.compile`.
        channels_last: use the channels-last memory format for images and convolutions.
        deterministic: allow only deterministic kernels; an error where a teacher has none.
    """

    batch_size: Count | Literal["auto"] = 512
    memory_limit_gib: Annotated[float, Meta(gt=0)] | None = None
    loaders: Count = 1
    device: str = "auto"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False
    channels_last: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.memory_limit_gib is not None and not math.isfinite(self.memory_limit_gib):
            raise JobError(f"memory_limit_gib is {self.memory_limit_gib}, it must be a finite number above 0")

    @property
    def pilot_batch_size(self) -> int:
        """Return the batch size to use before `auto` has found one."""
        return PILOT_BATCH_SIZE if isinstance(self.batch_size, str) else self.batch_size


class JobTables(Document, frozen=True):
    """The tables of a job file, named as they are there."""

    store: StoreTable
    transfer_set: TransferSetTable
    targets: TargetsTable
    teachers: tuple[TeacherTable, ...] = ()
    run: RunTable = RunTable()
    views: ViewsTable | None = None
    sequences: SequencesTable | None = None

    def __post_init__(self) -> None:
        if not self.teachers:
            raise JobError("no teacher is named: add at least one [[teachers]] table with a `model`")
        if self.views is not None and self.sequences is not None:
            raise JobError("[views] and [sequences] exclude each other: a sample's rows are its views or its positions")


class Job(JobTables, frozen=True):
    """A job: its tables, and the folder that relative paths and file references start from (`base`)."""

    base: Path = field(default_factory=Path.cwd)

    @property
    def store_path(self) -> Path:
        """Return the store's folder."""
        return self.base / self.store.path

    @property
    def store_name(self) -> str:
        """Return the store's name, which random draws of its rows depend on."""
        return self.store.name or self.store_path.name

    def to_json(self) -> dict[str, Any]:
        """Return the JSON document that a store keeps; `job_from_json` reads it back once `base` is taken out."""
        # Keys that are None are written: earlier versions wrote them, and resumed jobs are compared table by table.
        return {**{name: msgspec.to_builtins(getattr(self, name)) for name in _TABLES}, "base": str(self.base)}


FOUND = "found"
"""Key of a kept job for what a run found out that its job file does not say: `batch_size`."""

_TABLES = JobTables.__struct_fields__


def load_job(path: Path) -> Job:
    """Read a job file.

    Raises:
        JobError: the file is missing, is not TOML, or holds a key or value that no job has; its path and the nearest
            known key are named.
    """
    path = Path(path)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise JobError(f"there is no job file {path}: see the README for an example") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise JobError(f"job file {path} cannot be read: {error}") from error
    return job_from_json(document, base=path.resolve().parent, what=str(path))


def load_kept_job(store: Path) -> Job:
    """Return the job that a store keeps, for the folder where it is now, under the name that its rows were drawn with.

    Raises:
        FileNotFoundError: it keeps none. ManifestError: it is damaged. JobError: as `load_job`.
    """
    path = store / JOB
    document = open_sealed(path.read_bytes(), what=str(path))
    document.pop(FOUND, None)
    job = job_from_json(document, base=Path(document.pop("base")), what=str(path))
    kept = msgspec.structs.replace(job.store, path=str(store.resolve()), name=job.store_name)
    return msgspec.structs.replace(job, store=kept)


def job_from_json(document: Mapping[str, Any], *, base: Path, what: str = "the job") -> Job:
    """Return the job that nested tables describe, as TOML and JSON give them. Raises JobError as `load_job` does."""
    tables = parse_document(document, JobTables, what=what, error=JobError)
    check_source(tables.transfer_set.source)
    parse_encoding(tables.targets.encoding)
    return Job(**msgspec.structs.asdict(tables), base=base)
