"""Is a transfer set still the one that a job began with? What it is made of is noted once, and compared later."""

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

NOTE = "transfer_set.tsv.gz"
"""Beside a store's plan: a line for each file of the transfer set, with its size and time. No part of the store."""

Fact = tuple[str, str]
"""The name of a file, and what would change if its contents did."""


def note_files(store: Path, data: TransferSet) -> None:
    """Note, beside the plan of a job that begins, what its transfer set is made of; a note that is there stays."""
    note = Path(store) / NOTE
    if isinstance(data, SupportsIdentity) and not note.exists():
        write_atomically(note, [_packed(map(_escaped, data.identity()))])


def refuse_changed(store: Path, data: TransferSet) -> None:
    """Let a transfer set pass that is still what it was when the job began.

    Args:
        store: the store's folder; without a note in it there is nothing to compare.
        data: one that does not say what it is made of passes always: fingerprints are all that tells it from another.
    Raises:
        TransferSetChangedError: files came, went, or changed size or time; the first one is named.
    """
    note = Path(store) / NOTE
    if not isinstance(data, SupportsIdentity) or not note.is_file():
        return
    now = map(_escaped, data.identity())
    with gzip.open(note, "rt", encoding="ascii", newline="\n") as file:
        before = map(_fact, file)
        for old, new in zip_longest(before, now):
            if old != new:
                what = _told(old, new, before, now)
                raise TransferSetChangedError(
                    f"transfer set {data.name!r} changed under the job: {what}. Rows that are computed already are of "
                    "other samples than those to come: put the data back as they were and resume, or begin another "
                    "store. Where the contents are certainly the same (copied, with other times), delete "
                    f"{note} and resume"
                )


def _told(old: Fact | None, new: Fact | None, before: Iterator[Fact], now: Iterator[Fact]) -> str:
    """What the first difference is; the iterators hold what comes after it."""
    if old is not None and new is not None and old[0] == new[0]:
        return f"{_shown(old[0])} was {old[1]!r} when the job began and is now {new[1]!r}"
    if new is not None and new[0] not in {name for name, _ in before}:
        return f"{_shown(new[0])} was not there when the job began"
    if old is not None and new is not None and old[0] in {name for name, _ in now}:
        return f"{_shown(new[0])} comes where {_shown(old[0])} came when the job began"
    assert old is not None, "one of two that differ is there"
    return f"{_shown(old[0])} is gone"


def _packed(facts: Iterator[Fact]) -> bytes:
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", mtime=0) as file:
        for name, fact in facts:
            file.write(f"{name}\t{fact}\n".encode("ascii"))
    return out.getvalue()


def _escaped(pair: Fact) -> Fact:
    """Names of files may hold anything, tabs, line feeds and what is no UTF-8 among it."""
    name, facts = (text.encode("unicode_escape", "surrogatepass").decode("ascii") for text in pair)
    return name, facts


def _shown(name: str) -> str:
    return repr(name.encode("ascii").decode("unicode_escape"))


def _fact(line: str) -> Fact:
    name, _, facts = line.rstrip("\n").partition("\t")
    return name, facts
