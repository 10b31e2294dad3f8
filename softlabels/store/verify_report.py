"""Verification report: the faults of a store, and counts of what was verified."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from softlabels.progress import QUIET, Progress

FaultKind = Literal["missing", "checksum", "document", "contents", "stray", "unfinished"]
"""missing: a file is gone, short or unreadable. checksum: bytes are not what was written. document: a plan, manifest or
receipt is invalid. contents: bytes are as written, but their values are invalid. stray: a file that neither the
manifest nor a receipt lists. unfinished: nothing is damaged, the store is not complete yet."""

ShowProgress = Callable[..., AbstractContextManager[Progress]]
"""Called with total, description and unit, as `softlabels.progress.track`."""


def silent(total: int, description: str, unit: str) -> AbstractContextManager[Progress]:
    """Show no progress."""
    return nullcontext(QUIET)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong with a store.

    Attributes:
        message: what is wrong.
        path: file, relative to the store.
        shard, array, chunk: location, as far as it is known; `chunk` counts within its shard.
        rows: first and last row of the store that may be wrong.
    """

    kind: FaultKind
    message: str
    path: str | None = None
    shard: int | None = None
    array: str | None = None
    chunk: int | None = None
    rows: tuple[int, int] | None = None

    def __str__(self) -> str:
        location = [
            f"{name} {value}" for name in ("shard", "array", "chunk") if (value := getattr(self, name)) is not None
        ]
        if self.rows is not None:
            location.append(f"rows {self.rows[0]} to {self.rows[1]}")
        if self.path is not None:
            location.append(self.path)
        return f"{', '.join(location)}: {self.message}" if location else self.message

    def to_json(self) -> dict[str, Any]:
        """Return the fault as JSON-like values."""
        return asdict(self)


@dataclass(kw_only=True)
class Report:
    """What `verify` found.

    Attributes:
        finished: whether the manifest is published.
        committed: number of the store's `shards` that have a valid receipt.
        chunks, rows, files: numbers verified.
        faults: in the order found; only the first one unless all were asked for.
    """

    root: str
    finished: bool = False
    shards: int = 0
    committed: int = 0
    chunks: int = 0
    rows: int = 0
    files: int = 0
    faults: list[Fault] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong or missing."""
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-like values."""
        return {**asdict(self), "sound": self.sound}
