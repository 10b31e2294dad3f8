"""What a precompute run is told: the job, and how it is read from TOML."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from softlabels.encodings.requested import parse_encoding
from softlabels.errors import JobError
from softlabels.transfer_sets import check_source

Table = TypeVar("Table")

AUTO = "auto"
PILOT_BATCH = 32
"""What a few rows are computed in while no batch size is found yet: any device can do so much of any teacher."""


@dataclass(frozen=True, kw_only=True)
class StoreTable:
    """Where the targets go.

    Attributes:
        path: the store's folder, relative to the job file.
        name: what the store calls itself; the folder's name when left out.
        format: container format.
        rows_per_shard, rows_per_chunk: chosen by size when left out.
        inputs: whether the samples themselves are kept beside their targets, so that the store alone trains a student.
    """

    path: str
    name: str | None = None
    format: Literal["zarr", "hdf5"] = "zarr"
    rows_per_shard: int | None = None
    rows_per_chunk: int | None = None
    inputs: bool = False


@dataclass(frozen=True, kw_only=True)
class TransferSetTable:
    """What targets are computed for; docs/transfer-sets.md shows every kind.

    Attributes:
        source: one of `softlabels.transfer_sets.KINDS`, or a reference to a callable that returns a `TransferSet`.
        arguments: for it, by name.
    """

    source: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ViewsTable:
    """Several augmented versions of each sample, with a target each; leave the table out for one row a sample.

    Attributes:
        count: views a sample.
        transform: a reference to a callable that returns what makes a view of a sample, see
            `softlabels.views.load_view_transform`.
        arguments: for that callable.
    """

    count: int
    transform: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SequencesTable:
    """Samples of many positions, with a row of targets each; leave the table out for one row a sample.

    Attributes:
        positions_per_pass: what a forward pass takes at most, padding included, beside [run]'s `batch_size`; a longer
            sequence goes alone.
        labels: `own` keeps those of the transfer set, one a position; `next` takes each position's next token;
            `none` keeps none.
    """

    positions_per_pass: int = 2048
    labels: Literal["own", "next", "none"] = "own"


@dataclass(frozen=True, kw_only=True)
class TargetsTable:
    """What is kept of the teachers' outputs.

    Attributes:
        temperature: what batches are tempered with unless a trainer asks otherwise, and what an arithmetic mean is
            taken at.
        mean: over the members of an ensemble.
        encoding: how a distribution becomes bytes: a name or a table, see `softlabels.encodings.requested`.
        keep: `members` keeps every teacher's own rows, so that mean, weights and temperature stay open after the job.
        classes: a file with the names of the store's classes, one a column, in order; that of the first teacher with
            a list when left out.
    """

    temperature: float
    mean: Literal["arithmetic", "geometric"] = "geometric"
    encoding: str | Mapping[str, Any] = "f16"
    keep: Literal["mean", "members"] = "mean"
    classes: str | None = None


@dataclass(frozen=True, kw_only=True)
class TeacherTable:
    """One member of the ensemble; docs/teachers.md shows every kind.

    Attributes:
        model: a reference to a callable that returns a `torch.nn.Module` giving logits; or `torchscript:`, `export:`,
            `onnx:` and a file, `transformers:`, `timm:`, `torchvision:` and a name or folder.
        arguments: for that callable or library.
        weights: safetensors, an index of them, or a checkpoint of weights alone, relative to the job file; None when
            the callable returns a trained model.
        weight: in the mean.
        preprocess: a reference to a callable from the inputs' tensor to what the model takes, or a table of simple
            steps for pictures.
        classes: a file of class names in the order of the outputs, or `model` where its library knows them.
        head: dotted name of the last linear layer, where hidden states are kept and the model does not say.
        name: for messages and the manifest; `teacher 0`, `teacher 1`, … when left out.
    """

    model: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    weight: float = 1.0
    preprocess: str | Mapping[str, Any] | None = None
    classes: str | None = None
    head: str | None = None
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunTable:
    """How the computation runs; docs/operations.md says what each setting costs and changes.

    Attributes:
        batch_size: inputs a forward pass; `auto` finds one, see `memory_limit_gib`.
        memory_limit_gib: what a run may take of the device's memory (of main memory, on the CPU) when it looks for its
            batch size; most of what is free when left out.
        loaders: threads that take samples from the transfer set, which must bear that; one is enough where taking a
            batch is faster than computing it.
        device: `auto` takes an accelerator where there is one.
        precision: what the teachers compute in, by autocast; other than `float32` it changes the targets, so the
            manifest names it.
        compile: whether the teachers go through `torch.compile`.
        channels_last: whether images and convolutions lie with their channels last.
        deterministic: whether the teachers may use deterministic kernels alone; an error where one has none.
    """

    batch_size: int | str = 512
    memory_limit_gib: float | None = None
    loaders: int = 1
    device: str = "auto"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False
    channels_last: bool = False
    deterministic: bool = False

    @property
    def pilot_batch_size(self) -> int:
        """Inputs a forward pass before the run has found its own."""
        return PILOT_BATCH if isinstance(self.batch_size, str) else self.batch_size


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a precompute run is told.

    Attributes:
        base: the folder that relative paths and file references start from.
    """

    store: StoreTable
    transfer_set: TransferSetTable
    targets: TargetsTable
    teachers: tuple[TeacherTable, ...]
    run: RunTable = field(default_factory=RunTable)
    views: ViewsTable | None = None
    sequences: SequencesTable | None = None
    base: Path = field(default_factory=Path.cwd)

    @property
    def store_path(self) -> Path:
        """The store's folder."""
        return self.base / self.store.path

    def to_json(self) -> dict[str, Any]:
        """A JSON-able description that `job_from_json` reads back."""
        return {**asdict(self), "base": str(self.base)}


def load_job(path: Path) -> Job:
    """Read a job file.

    Raises:
        JobError: the file is missing, no TOML, or says something that no job says; the nearest known key is named.
    """
    path = Path(path)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise JobError(f"there is no job file {path}: see the README for an example") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise JobError(f"job file {path} cannot be read: {error}") from error
    return job_from_json(document, base=path.resolve().parent, what=str(path))


def job_from_json(document: Mapping[str, Any], *, base: Path, what: str = "the job") -> Job:
    """Make a job of nested tables, as TOML and JSON give them. Raises JobError as `load_job` does."""
    known = {"store", "transfer_set", "targets", "teachers", "run", "views", "sequences"}
    _refuse_unknown(document, known, f"{what}, top level")
    teachers = document.get("teachers")
    if not isinstance(teachers, list | tuple) or not teachers:
        raise JobError(f"{what} names no teacher: add at least one [[teachers]] table with a `model`")
    job = Job(
        store=_table(StoreTable, document, "store", what),
        transfer_set=_table(TransferSetTable, document, "transfer_set", what),
        targets=_table(TargetsTable, document, "targets", what),
        teachers=tuple(filled(TeacherTable, t, f"{what}, teacher {i}") for i, t in enumerate(teachers)),
        run=_table(RunTable, document, "run", what) if "run" in document else RunTable(),
        views=None if document.get("views") is None else _table(ViewsTable, document, "views", what),
        sequences=None if document.get("sequences") is None else _table(SequencesTable, document, "sequences", what),
        base=base,
    )
    check_source(job.transfer_set.source)
    parse_encoding(job.targets.encoding)
    _check_run(job.run, what)
    for label, value in (
        ("store.rows_per_shard", job.store.rows_per_shard),
        ("store.rows_per_chunk", job.store.rows_per_chunk),
        ("views.count", None if job.views is None else job.views.count),
        ("sequences.positions_per_pass", None if job.sequences is None else job.sequences.positions_per_pass),
    ):
        if value is not None and value < 1:
            raise JobError(f"{what}: {label} is {value}, it must be at least 1")
    if job.views is not None and job.sequences is not None:
        raise JobError(f"{what} has [views] and [sequences]: a sample's rows are its views or its positions, not both")
    return job


def _check_run(run: RunTable, what: str) -> None:
    size, limit = run.batch_size, run.memory_limit_gib
    if size != AUTO and (isinstance(size, str) or size < 1):
        raise JobError(f"{what}: run.batch_size is {size!r}, it must be at least 1, or {AUTO!r}")
    if run.loaders < 1:
        raise JobError(f"{what}: run.loaders is {run.loaders}, it must be at least 1")
    if limit is not None and not 0 < limit < math.inf:
        raise JobError(f"{what}: run.memory_limit_gib is {limit}, it must be above 0")


def _table(cls: type[Table], document: Mapping[str, Any], key: str, what: str) -> Table:
    if key not in document:
        raise JobError(f"{what} has no [{key}] table")
    return filled(cls, document[key], f"{what}, [{key}]")


def filled(cls: type[Table], values: Any, where: str) -> Table:
    """A table of a job, each value of the type that it must have. Raises JobError, with the nearest known key."""
    if not isinstance(values, Mapping):
        raise JobError(f"{where} must be a table, not {values!r}")
    hints = get_type_hints(cls)
    _refuse_unknown(values, set(hints), where)
    for entry in fields(cls):  # type: ignore[arg-type]
        required = entry.default is MISSING and entry.default_factory is MISSING
        if required and entry.name not in values:
            raise JobError(f"{where} lacks `{entry.name}`")
    return cls(**{key: _checked(value, hints[key], f"{where}: {key}") for key, value in values.items()})


def _checked(value: Any, hint: Any, where: str) -> Any:
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    literal = next((kind for kind in kinds if get_origin(kind) is Literal), None)
    if literal is not None:
        if value not in get_args(literal):
            raise JobError(f"{where} is {value!r}, it must be one of {', '.join(map(repr, get_args(literal)))}")
        return value
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    kinds = tuple(get_origin(kind) or kind for kind in kinds)
    if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds):
        names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise JobError(f"{where} is {value!r}, it must be a {names}")
    return value


def _refuse_unknown(values: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in values:
        if key not in known:
            near = get_close_matches(key, sorted(known), n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(sorted(known))}"
            raise JobError(f"{where} has an unknown key `{key}`: {hint}", key=key)
