"""What can be wrong with a store: a fault, where it lies, and the report that lists them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from softlabels.progress import QUIET, Progress

FaultKind = Literal["missing", "checksum", "document", "contents", "stray", "unfinished"]
"""missing: a file is gone, short or unreadable. checksum: bytes are not what was written. document: a plan, manifest or
receipt cannot be believed. contents: bytes are as written, and make no sense. stray: a file that nobody vouches for.
unfinished: nothing is damaged, something is not there yet."""

ShowProgress = Callable[..., AbstractContextManager[Progress]]
"""As `softlabels.progress.track`: total, description, unit."""


def silent(total: int, description: str, unit: str) -> AbstractContextManager[Progress]:
    """Show nothing."""
    return nullcontext(QUIET)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong with a store.

    Attributes:
        message: what is wrong, in plain words.
        path: the file, relative to the store.
        shard, array, chunk: where, as far as it can be told; the chunk counts within its shard.
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
        places = [
            f"{name} {value}" for name in ("shard", "array", "chunk") if (value := getattr(self, name)) is not None
        ]
        if self.rows is not None:
            places.append(f"rows {self.rows[0]} to {self.rows[1]}")
        if self.path is not None:
            places.append(self.path)
        return f"{', '.join(places)}: {self.message}" if places else self.message

    def to_json(self) -> dict[str, Any]:
        """The fault as JSON-able facts."""
        return asdict(self)


@dataclass(kw_only=True)
class Report:
    """What `verify` found.

    Attributes:
        finished: the manifest is published.
        committed: how many of the store's `shards` have a receipt.
        chunks, rows, files: how many were verified.
        faults: in the order found; the first alone unless all were asked for.
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
        """Whether nothing is wrong and nothing missing."""
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-able facts."""
        return {**asdict(self), "sound": self.sound}
