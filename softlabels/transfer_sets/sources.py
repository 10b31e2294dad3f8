"""Registry of transfer-set sources: short names of job files, and loading by short name or by reference."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from softlabels.documents import Document, did_you_mean, parse_document
from softlabels.errors import JobError
from softlabels.ids import IdArray
from softlabels.manifest import IdSpec
from softlabels.references import load_reference
from softlabels.transfer_set import TransferSet

KINDS: Mapping[str, str] = {
    "image_folder": "softlabels.transfer_sets.image_folder:ImageFolderSource",
    "torch": "softlabels.transfer_sets.torch_dataset:TorchSource",
    "webdataset": "softlabels.transfer_sets.webdataset_tars:WebDatasetSource",
    "huggingface": "softlabels.transfer_sets.huggingface_datasets:HuggingFaceSource",
    "parquet": "softlabels.transfer_sets.parquet:ParquetSource",
    "zarr": "softlabels.transfer_sets.array_files:ZarrSource",
    "hdf5": "softlabels.transfer_sets.array_files:Hdf5Source",
    "npy": "softlabels.transfer_sets.array_files:NpySource",
    "text": "softlabels.transfer_sets.text_files:TextSource",
}
"""Short names for `source` in a job file, and the class of their arguments. Stored plans hold the short names, so these
never change; the classes are imported on use, because each needs a library of its own."""


class Source(Document, frozen=True, kw_only=True):
    """Arguments of a built-in source, as `[transfer_set.arguments]` of a job gives them.

    Attributes:
        name: name of the transfer set in messages and in the manifest; each source has a default.
    """

    name: str | None = None

    def load(self, base: Path | None) -> TransferSet:
        """Return the transfer set; relative paths start from `base`, or from the working folder when None.

        Raises:
            DataUnavailableError: a file is missing. MissingExtraError: the library that reads it is not installed.
            JobError: a file holds something else, or has no such array, column, split or label.
        """
        raise NotImplementedError


@runtime_checkable
class SupportsIdSpec(Protocol):
    """A transfer set that knows kind and width of its ids before any sample is read."""

    def id_spec(self) -> IdSpec:
        """Return how a store keeps the ids."""
        ...


@runtime_checkable
class SupportsAllIds(Protocol):
    """A transfer set that knows all ids without reading the samples."""

    def all_ids(self) -> Iterator[IdArray]:
        """Yield the ids in order, in blocks of any size."""
        ...


@runtime_checkable
class SupportsIdentity(Protocol):
    """A transfer set that shows cheaply whether it has changed since a job began."""

    def identity(self) -> Iterator[tuple[str, str]]:
        """Yield (name, state) pairs in a fixed order, mostly files with size and modification time."""
        ...


@runtime_checkable
class SupportsLengths(Protocol):
    """A transfer set whose samples are sequences of different lengths."""

    def lengths(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of positions of each of these samples, [B], without reading the samples."""
        ...


def check_source(source: str) -> str:
    """Return `source`. Raises JobError unless it is a short name or a reference."""
    if ":" in source or source in KINDS:
        return source
    raise JobError(
        f"transfer set source {source!r} is unknown{did_you_mean(source, KINDS)}; use one of {', '.join(KINDS)}, or a "
        "reference such as 'package.module:name' or 'file.py:name'",
        source=source,
    )


def load_transfer_set(source: str, arguments: Mapping[str, Any], *, base: Path | None = None) -> TransferSet:
    """Return the transfer set that a source makes of these arguments.

    Args:
        source: one of `KINDS`, or a reference to a transfer set or to a callable that returns one.
        arguments: keyword arguments of the source.
        base: folder that relative paths start from, usually the job file's.
    Raises:
        JobError: an argument is unknown, missing or of the wrong type, or the result is no transfer set.
        ReferenceLoadError: the reference cannot be resolved. Sources raise more of their own.
    """
    what = f"transfer set {check_source(source)}"
    found = load_reference(KINDS.get(source, source), base=base)
    if source in KINDS:
        settings: Source = parse_document(dict(arguments), found, what=what, error=JobError)
        return settings.load(base)
    if callable(found):
        _check_arguments(found, arguments, what)
        found = found(**arguments)
    if not all(hasattr(found, name) for name in ("name", "take", "__len__")):
        raise JobError(f"{what} returns a {type(found).__name__}, not a TransferSet (name, __len__, take)")
    return found  # type: ignore[no-any-return]


def _check_arguments(make: Callable[..., Any], arguments: Mapping[str, Any], what: str) -> None:
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError):  # some callables written in C have no signature
        return
    parameters = signature.parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = next((key for key in arguments if key not in parameters), None)
    if unknown is not None and not takes_any:
        hint = did_you_mean(unknown, parameters)
        raise JobError(f"{what} has no argument `{unknown}`{hint}; it takes {signature}", key=unknown)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise JobError(f"{what}: {error}; give it under `arguments`") from error
