"""Data-set snapshot: the files of a transfer set as they were when a job began, to compare when it is resumed."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from softlabels.atomic_files import write_atomically
from softlabels.errors import TransferSetChangedError
from softlabels.transfer_set import TransferSet
from softlabels.transfer_sets import SupportsIdentity

SNAPSHOT = "transfer_set.tsv.gz"
"""File beside a store's plan: a line per file of the transfer set, with its size and time. No part of the store."""

Fact = tuple[str, str]
"""Name of a file, and a text that changes whenever its contents do."""


def write_snapshot(store: Path, data: TransferSet) -> None:
    """Write the snapshot of a job that begins; one that is there already stays."""
    path = Path(store) / SNAPSHOT
    if isinstance(data, SupportsIdentity) and not path.exists():
        write_atomically(path, [_compress(map(_escape, data.identity()))])


def check_unchanged(store: Path, data: TransferSet) -> None:
    """Raise unless a transfer set is what it was when the job began.

    Args:
        store: folder of the store; without a snapshot there is nothing to compare.
        data: transfer set; one without `identity` always passes, since only fingerprints tell it from another.
    Raises:
        TransferSetChangedError: files were added or removed, or changed size or time; the first one is named.
    """
    path = Path(store) / SNAPSHOT
    if not isinstance(data, SupportsIdentity) or not path.is_file():
        return
    now = map(_escape, data.identity())
    with gzip.open(path, "rt", encoding="ascii", newline="\n") as file:
        before = map(_parse, file)
        for old, new in zip_longest(before, now):
            if old != new:
                raise TransferSetChangedError(
                    f"transfer set {data.name!r} changed under the job: {_difference(old, new, before, now)}. Targets "
                    "computed so far are of other samples than those still to compute: put the data back as they were "
                    "and resume, or begin another store. Where the contents are certainly the same (copied, with other "
                    f"times), delete {path} and resume"
                )


def _difference(old: Fact | None, new: Fact | None, before: Iterator[Fact], now: Iterator[Fact]) -> str:
    """Describe the first difference; the iterators hold what comes after it."""
    if old is not None and new is not None and old[0] == new[0]:
        return f"{_shown(old[0])} was {old[1]!r} when the job began and is now {new[1]!r}"
    if new is not None and new[0] not in {name for name, _ in before}:
        return f"{_shown(new[0])} was not there when the job began"
    if old is not None and new is not None and old[0] in {name for name, _ in now}:
        return f"{_shown(new[0])} comes where {_shown(old[0])} came when the job began"
    assert old is not None, "one of two that differ is there"
    return f"{_shown(old[0])} is gone"


def _compress(facts: Iterator[Fact]) -> bytes:
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", mtime=0) as file:  # mtime: the same data give the same bytes
        for name, fact in facts:
            file.write(f"{name}\t{fact}\n".encode("ascii"))
    return out.getvalue()


def _escape(pair: Fact) -> Fact:
    # File names may hold anything: tabs, line feeds, and bytes that are not UTF-8.
    name, fact = (text.encode("unicode_escape", "surrogatepass").decode("ascii") for text in pair)
    return name, fact


def _shown(name: str) -> str:
    return repr(name.encode("ascii").decode("unicode_escape"))


def _parse(line: str) -> Fact:
    name, _, fact = line.rstrip("\n").partition("\t")
    return name, fact
