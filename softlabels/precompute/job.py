"""What a precompute run is told: the job, and how it is read from TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from softlabels.encodings.requested import parse_encoding
from softlabels.errors import JobError

Table = TypeVar("Table")


@dataclass(frozen=True, kw_only=True)
class StoreTable:
    """Where the targets go.

    Attributes:
        path: the store's folder, relative to the job file.
        name: what the store calls itself; the folder's name when left out.
        format: container format.
        rows_per_shard, rows_per_chunk: chosen by size when left out.
    """

    path: str
    name: str | None = None
    format: Literal["zarr", "hdf5"] = "zarr"
    rows_per_shard: int | None = None
    rows_per_chunk: int | None = None


@dataclass(frozen=True, kw_only=True)
class TransferSetTable:
    """What targets are computed for: a reference to a callable that returns a `TransferSet`, and its arguments."""

    source: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TargetsTable:
    """What is kept of the teachers' outputs.

    Attributes:
        temperature: what batches are tempered with unless a trainer asks otherwise, and what an arithmetic mean is
            taken at.
        mean: over the members of an ensemble.
        encoding: how a distribution becomes bytes: a name or a table, see `softlabels.encodings.requested`.
        keep: `members` keeps every teacher's own rows, so that mean, weights and temperature stay open after the job.
    """

    temperature: float
    mean: Literal["arithmetic", "geometric"] = "geometric"
    encoding: str | Mapping[str, Any] = "f16"
    keep: Literal["mean", "members"] = "mean"


@dataclass(frozen=True, kw_only=True)
class TeacherTable:
    """One member of the ensemble.

    Attributes:
        model: a reference to a callable that returns a `torch.nn.Module` giving logits [rows, classes].
        arguments: for that callable.
        weights: a safetensors file, relative to the job file; None when the callable returns a trained model.
        weight: in the mean.
        preprocess: a reference to a callable from the inputs' tensor to what the model takes.
        name: for messages and the manifest; `teacher 0`, `teacher 1`, … when left out.
    """

    model: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    weight: float = 1.0
    preprocess: str | None = None
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunTable:
    """How the computation runs; none of it changes what the targets mean.

    Attributes:
        batch_size: samples a forward pass.
        device: `auto` takes an accelerator where there is one.
    """

    batch_size: int = 512
    device: str = "auto"


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
    known = {"store", "transfer_set", "targets", "teachers", "run"}
    _refuse_unknown(document, known, f"{what}, top level")
    teachers = document.get("teachers")
    if not isinstance(teachers, list | tuple) or not teachers:
        raise JobError(f"{what} names no teacher: add at least one [[teachers]] table with a `model`")
    job = Job(
        store=_table(StoreTable, document, "store", what),
        transfer_set=_table(TransferSetTable, document, "transfer_set", what),
        targets=_table(TargetsTable, document, "targets", what),
        teachers=tuple(_filled(TeacherTable, t, f"{what}, teacher {i}") for i, t in enumerate(teachers)),
        run=_table(RunTable, document, "run", what) if "run" in document else RunTable(),
        base=base,
    )
    parse_encoding(job.targets.encoding)
    for label, value in (
        ("run.batch_size", job.run.batch_size),
        ("store.rows_per_shard", job.store.rows_per_shard),
        ("store.rows_per_chunk", job.store.rows_per_chunk),
    ):
        if value is not None and value < 1:
            raise JobError(f"{what}: {label} is {value}, it must be at least 1")
    return job


def _table(cls: type[Table], document: Mapping[str, Any], key: str, what: str) -> Table:
    if key not in document:
        raise JobError(f"{what} has no [{key}] table")
    return _filled(cls, document[key], f"{what}, [{key}]")


def _filled(cls: type[Table], values: Any, where: str) -> Table:
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
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise JobError(f"{where} is {value!r}, it must be one of {', '.join(map(repr, get_args(hint)))}")
        return value
    kinds = get_args(hint) if isinstance(hint, UnionType) else (get_origin(hint) or hint,)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    kinds = tuple(get_origin(kind) or kind for kind in kinds)
    if isinstance(value, bool) or not isinstance(value, kinds):
        names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise JobError(f"{where} is {value!r}, it must be a {names}")
    return value


def _refuse_unknown(values: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in values:
        if key not in known:
            near = get_close_matches(key, sorted(known), n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(sorted(known))}"
            raise JobError(f"{where} has an unknown key `{key}`: {hint}", key=key)
