"""What a job's data were when it began, to compare when it goes on: files with size and time, ids, some contents.

The snapshot of files lies beside the plan and names what changed. The digest of ids and contents is in the plan itself,
so that data of the same size and time, or those of another machine, are not taken for the ones that a store was begun
with; what it misses, row by row, `committed_rows` looks for.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from softlabels.atomic_files import write_atomically
from softlabels.documents import as_json, canonical_json
from softlabels.errors import ManifestError, TransferSetChangedError
from softlabels.manifest import IdSpec, TransferSetSpec
from softlabels.store.sample_index import SampleTable
from softlabels.transfer_set import UNLABELLED, Samples, TransferSet, sample_fingerprints
from softlabels.transfer_sets import SupportsAllIds, SupportsIdentity, ids_sha256

SNAPSHOT = "transfer_set.tsv.gz"
"""File beside a store's plan: a line per file of the transfer set, with its size and time. No part of the store."""

PLANNED_SAMPLES = 64
"""Samples that the digest in the plan is of, evenly spaced: other data under the same names differ in nearly all."""

Fact = tuple[str, str]
"""Name of a file, and a text that changes whenever its contents do."""


class PlannedSamples:
    """Digests of ids, labels and contents of `PLANNED_SAMPLES` samples, the first and the last among them."""

    def __init__(self, data: TransferSet) -> None:
        self._name = data.name
        self._positions = np.unique(np.linspace(0, len(data) - 1, PLANNED_SAMPLES).astype(np.int64))
        # One at a time: a job with batches of one may have samples of different shapes.
        self.digests = [digest for position in self._positions for digest in _digests(data.take(position[None]))]

    def check(self, positions: NDArray[np.int64], taken: Samples) -> None:
        """Raise TransferSetChangedError if one of these samples is not what it was: nothing is made of changed data."""
        known = np.flatnonzero(np.isin(positions, self._positions))
        if len(known) == 0:
            return
        labels = None if taken.labels is None else taken.labels[known]
        found = _digests(Samples(ids=taken.ids[known], inputs=taken.inputs[known], labels=labels))
        for row, index, digest in zip(known, np.searchsorted(self._positions, positions[known]), found, strict=True):
            if digest != self.digests[index]:
                raise TransferSetChangedError(
                    f"transfer set {self._name!r} changed under the job: sample {taken.ids[row].item()!r} at position "
                    f"{positions[row]} is not what it was when this run began. Put the data back as they were and "
                    "resume, or begin another store",
                    id=taken.ids[row].item(),
                )


def _digests(samples: Samples) -> list[bytes]:
    labels = np.full(len(samples.ids), UNLABELLED) if samples.labels is None else samples.labels
    prints = [row.tobytes().hex() for row in sample_fingerprints(samples.inputs)]
    facts = zip(samples.ids.tolist(), labels.tolist(), prints, strict=True)
    return [hashlib.sha256(canonical_json(fact)).digest() for fact in facts]


def planned_sha256(data: TransferSet, ids: IdSpec, found: SampleTable | PlannedSamples) -> str:
    """Return the digest of a transfer set that its plan holds.

    It is of the number of samples, all ids (of a source that lists them without reading the samples), and of some
    samples; for sequences, of the fingerprints of all.

    Args:
        ids: how the store keeps the ids.
        found: the samples of a layout of sequences; else some samples.
    """
    blocks = iter([found.ids]) if isinstance(found, SampleTable) else None
    if blocks is None and ids.dense_start is None:
        own = getattr(data, "ids", None)
        blocks = data.all_ids() if isinstance(data, SupportsAllIds) else None
        blocks = iter([own]) if isinstance(own, np.ndarray) else blocks
    listed = None if blocks is None else ids_sha256(blocks)
    total = hashlib.sha256(canonical_json({"samples": len(data), "ids": as_json(ids), "ids_sha256": listed}))
    total.update(found.fingerprints.tobytes() if isinstance(found, SampleTable) else b"".join(found.digests))
    return total.hexdigest()


def check_planned(planned: TransferSetSpec, found_sha256: str | None) -> None:
    """Raise unless a transfer set has the digest in the plan; one of format version 1 has none.

    Raises:
        TransferSetChangedError: it is another transfer set, whatever names, sizes and times of its files are.
    """
    if planned.planned_sha256 not in (None, found_sha256):
        raise TransferSetChangedError(
            f"transfer set {planned.name!r} is not the one that the store was begun with: ids, labels or contents "
            "differ, even where files have the same names, sizes and times. Targets computed so far are of other "
            "samples than those still to compute: put the data back as they were and resume, or begin another store"
        )


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
        ManifestError: the snapshot is damaged.
    """
    path = Path(store) / SNAPSHOT
    if not isinstance(data, SupportsIdentity) or not path.is_file():
        return
    now = map(_escape, data.identity())
    try:
        with gzip.open(path, "rt", encoding="ascii", newline="\n") as file:
            before = map(_parse, file)
            different = next(((old, new) for old, new in zip_longest(before, now) if old != new), None)
            told = None if different is None else _difference(*different, before, now)
    except (EOFError, zlib.error, UnicodeError, gzip.BadGzipFile) as error:
        raise ManifestError(
            f"{path} is damaged ({error}), so it cannot say whether the data are those that the job began with: delete "
            "it and resume; the plan's digest of the data and committed rows are compared all the same"
        ) from error
    if told is not None:
        raise TransferSetChangedError(
            f"transfer set {data.name!r} changed under the job: {told}. Targets computed so far are of other samples "
            "than those still to compute: put the data back as they were and resume, or begin another store. Where the "
            f"contents are certainly the same (copied, with other times), delete {path} and resume"
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
