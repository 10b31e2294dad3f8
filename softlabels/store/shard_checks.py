"""Checks of one shard: file sizes, digests, chunk checksums, and whether the decoded rows are plausible.

`Fault` and `Report`, in which these and the checks of the whole store (`softlabels.store.verify`) record what they
find, are defined here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from softlabels.encodings import Encoding
from softlabels.errors import DamageError, ManifestError, UnknownIdError
from softlabels.ids import IdArray
from softlabels.manifest import Manifest
from softlabels.store.array_reader import checked_part
from softlabels.store.chunks import (
    CHECKSUM_BYTES,
    ShardFile,
    chunks_in,
    decompress,
    masked,
    salt_of,
    shard_rows,
    sums_of_shard,
    sums_path,
)
from softlabels.store.containers import container_of
from softlabels.store.ledger import FileRecord, Receipt
from softlabels.store.safe_open import open_committed, safe_open
from softlabels.store.sample_index import DenseIdIndex, SortedIdIndex, ids_of_rows
from softlabels.transfer_set import UNLABELLED, FingerprintSum, sample_fingerprints

FaultKind = Literal["missing", "checksum", "document", "contents", "stray", "unfinished", "agreement"]
"""missing: a file is gone, short or unreadable. checksum: bytes are not what was written. document: a plan, manifest or
receipt is invalid. contents: bytes are as written, but their values are invalid. stray: a file that neither the
manifest nor a receipt lists. unfinished: nothing is damaged, the store is not complete yet. agreement: the bytes are as
written, but a job's data or teachers are not those of the store."""

ROW_MAX_TOLERANCE = 0.1
"""Nats. Rows are stored with their largest logit at 0, and no encoding that can be re-tempered moves it further."""

_BUFFERS_AT_ONCE = 16
"""Chunks and their checksums that are compared together: about a megabyte of targets, which stays in the cache."""

READ_BACK_CHUNKS = 8
"""Chunks, evenly spaced, of which every row's sum is compared when a shard is committed."""

_BLOCK_BYTES = 4 << 20
"""Files are read, and rows decoded, in blocks of about this size."""

_Bytes: TypeAlias = NDArray[np.uint8]
_Read: TypeAlias = Callable[[str, int, int], _Bytes]
"""Returns bytes of a file of the shard, given path, offset and length."""
_BadRows: TypeAlias = tuple[str, NDArray[np.bool_], str]
"""Array, [rows] mask of the rows with invalid values, and what is wrong with them."""


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
        found = [(name, getattr(self, name)) for name in ("shard", "array", "chunk")]
        location = [f"{name} {value}" for name, value in found if value is not None]
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


class ShardChecks:
    """Checks of the shards of one store.

    Args:
        encoding: encoding of its rows; None where it is damaged: rows are then not decoded.
        index: index from ids to positions; None where it is damaged: ids are then not looked up.
        report: report whose counters are increased as chunks, rows and files are verified.
    """

    def __init__(
        self,
        root: Path,
        plan: Manifest,
        encoding: Encoding | None,
        *,
        index: DenseIdIndex | SortedIdIndex | None,
        report: Report,
    ) -> None:
        self._root, self._plan, self._container, self._encoding = root, plan, container_of(plan), encoding
        self._index, self._report = index, report

    def receipt_fault(self, receipt: Receipt) -> Fault | None:
        """Return what in a receipt contradicts the plan; None where nothing does."""
        rows = shard_rows(self._plan, receipt.shard)
        try:
            if receipt.rows != (rows.start, rows.stop):
                raise ManifestError(f"it is of rows {receipt.rows[0]} to {receipt.rows[1] - 1}")
            for name in self._plan.arrays:
                checked_part(receipt, name, self._plan)
        except ManifestError as error:
            return self.fault("document", str(error), receipt.shard)
        return None

    def faults(self, receipt: Receipt, numbers: Sequence[int] | None = None) -> Iterator[Fault]:
        """Yield every fault of a shard, or of some of its chunks in every array.

        Each byte of its files is read once; with `numbers`, only these chunks are.
        """
        whole = numbers is None
        contents: dict[str, _Bytes] = {}
        broken: set[str] = set()
        for path, record in receipt.files.items():
            fault = self._size_fault(path, record, receipt.shard)
            try:
                if fault is None and whole:
                    contents[path] = _read(self._root, path, 0, record.size)
            except OSError as error:
                fault = self.fault("missing", f"it cannot be read: {error}", receipt.shard, path=path)
            if fault is not None:
                broken.add(path)
                yield fault

        def read(path: str, offset: int, length: int) -> _Bytes:
            return contents[path][offset : offset + length] if whole else _read(self._root, path, offset, length)

        if numbers is None:
            numbers = range(chunks_in(receipt.rows[1] - receipt.rows[0], self._plan.shards.rows_per_chunk))
        unread = set(broken)
        for name in self._plan.arrays:
            path = receipt.parts[name].path
            for fault in () if path in unread else self._chunk_faults(receipt, name, read, numbers):
                broken.add(path)
                yield fault
        for path, raw in contents.items():
            self._report.files += 1
            if path not in broken and hashlib.sha256(raw.data).hexdigest() != receipt.files[path].sha256:
                broken.add(path)
                message = "its SHA-256 is not the receipt's, though every chunk in it is intact"
                yield self.fault("checksum", message, receipt.shard, path=path)
        if not broken:
            yield from self._row_faults(receipt, read, numbers, whole=whole)

    def read_back(self, receipt: Receipt, written: Sequence[ShardFile]) -> Iterator[Fault]:
        """Yield what a reader would refuse in a shard that was written just now, and what differs from `written`.

        Each byte is compared with what was written. A few chunks are read as readers do, from their place in the
        receipt, and their rows compared with their sums; all chunks, where what was written is no longer in memory.
        """
        numbers = range(chunks_in(receipt.rows[1] - receipt.rows[0], self._plan.shards.rows_per_chunk))
        few = sorted({number * (len(numbers) - 1) // (READ_BACK_CHUNKS - 1) for number in range(READ_BACK_CHUNKS)})
        for path, record in receipt.files.items():
            fault = self._size_fault(path, record, receipt.shard)
            if fault is not None:
                yield fault
                return
        with contextlib.ExitStack() as opened:
            files = {
                path: opened.enter_context(os.fdopen(safe_open(self._root, path), "rb", buffering=0))
                for path in receipt.files
            }

            def read(path: str, offset: int, length: int) -> _Bytes:
                return np.frombuffer(os.pread(files[path].fileno(), length, offset), dtype=np.uint8)

            for file in written:
                offset, whole = 0, iter(file.buffers)
                # Many at once: chunks of ids and labels are a few hundred bytes, and a call for each would cost more.
                while block := b"".join(islice(whole, _BUFFERS_AT_ONCE)):
                    if os.pread(files[file.path].fileno(), len(block), offset) != block:
                        message = f"some of its bytes from {offset} on are not what was written"
                        yield self.fault("checksum", message, receipt.shard, path=file.path)
                        return
                    offset += len(block)
            for name in self._plan.arrays:
                yield from self._chunk_faults(receipt, name, read, few if written else numbers)
            for rows, arrays in self._row_blocks(receipt, read, few) if self._plan.row_sum_names else ():
                yield from self._changed(receipt, arrays, rows, self._stored_sums(receipt, read))

    def fault(self, kind: FaultKind, message: str, shard: int, **where: Any) -> Fault:
        """Return a fault of a shard, of all its rows unless `where` says otherwise."""
        rows = shard_rows(self._plan, shard)
        return Fault(**{"kind": kind, "message": message, "shard": shard, "rows": (rows.start, rows.stop - 1), **where})

    def _size_fault(self, path: str, record: FileRecord, shard: int) -> Fault | None:
        try:
            with os.fdopen(open_committed(self._root, path), "rb") as file:
                size = os.fstat(file.fileno()).st_size
        except (DamageError, OSError) as error:
            return self.fault("missing", f"it cannot be read: {error}", shard, path=path)
        if size != record.size:
            return self.fault("missing", f"it has {size} bytes, {record.size} were written", shard, path=path)
        return None

    def _chunk_faults(self, receipt: Receipt, name: str, read: _Read, numbers: Sequence[int]) -> Iterator[Fault]:
        part = receipt.parts[name]
        for number in numbers:
            chunk = read(part.path, *part.span(number))
            self._report.chunks += 1
            if not self._container.is_as_written(chunk, part, number):
                where = {"path": part.path, "array": name, "chunk": number, "rows": self._rows(receipt, number)}
                message = "its checksum fails, or it is another chunk than the receipt's"
                yield self.fault("checksum", message, receipt.shard, **where)

    def _rows(self, receipt: Receipt, number: int) -> tuple[int, int]:
        first = receipt.rows[0] + number * self._plan.shards.rows_per_chunk
        return first, min(first + self._plan.shards.rows_per_chunk, receipt.rows[1]) - 1

    def _row_faults(self, receipt: Receipt, read: _Read, numbers: Sequence[int], *, whole: bool) -> Iterator[Fault]:
        """Yield faults of the rows in these intact chunks; `whole` where these are all chunks of the shard."""
        fingerprint = FingerprintSum()
        keyed = {"ids", "fingerprints"} <= set(self._plan.arrays)
        stored_RA = self._stored_sums(receipt, read) if self._plan.row_sum_names else None
        if whole and stored_RA is not None and salt_of(stored_RA) != receipt.salt:
            path = sums_path(receipt.shard)
            yield self.fault("checksum", "the receipt's salt is not that of the row sums", receipt.shard, path=path)
        try:
            for rows, arrays in self._row_blocks(receipt, read, numbers):
                self._report.rows += len(rows)
                if stored_RA is not None:
                    yield from self._changed(receipt, arrays, rows, stored_RA)
                for name, bad, message in self._checked(arrays, rows):
                    yield from self._fault_of_rows("contents", receipt, name, rows[bad], message)
                if keyed and whole:
                    fingerprint.add(ids_of_rows(arrays["ids"]), arrays["fingerprints"])
        except ValueError as error:
            yield self.fault("contents", str(error), receipt.shard)
            return
        if whole and keyed and fingerprint.hexdigest() != receipt.fingerprint:
            message = "ids and fingerprints do not add up to the receipt's fingerprint"
            yield self.fault("contents", message, receipt.shard)

    def _row_blocks(
        self, receipt: Receipt, read: _Read, numbers: Sequence[int]
    ) -> Iterator[tuple[NDArray[np.int64], dict[str, NDArray[Any]]]]:
        """Yield row numbers and arrays of these chunks, several at a time; ValueError where one cannot be decoded."""
        for block in _blocks(numbers, self._plan):
            rows = np.concatenate([np.arange(a, b + 1) for a, b in (self._rows(receipt, number) for number in block)])
            yield rows, {name: self._decoded(receipt, name, read, block)[: len(rows)] for name in self._plan.arrays}

    def _stored_sums(self, receipt: Receipt, read: _Read) -> NDArray[np.uint32]:
        """Return the sums that were kept when the rows were written, [rows of the shard, arrays]."""
        path, rows = sums_path(receipt.shard), np.arange(*receipt.rows)
        stored_RA = read(path, 0, receipt.files[path].size).view("<u4").reshape(len(rows), -1)
        assert receipt.salt is not None, "the ledger refuses receipts without"
        return masked(stored_RA, rows, receipt.salt)

    def _changed(
        self, receipt: Receipt, arrays: Mapping[str, NDArray[Any]], rows: NDArray[np.int64], stored_RA: NDArray[Any]
    ) -> Iterator[Fault]:
        """Yield a fault for each array of which some rows do not have the sums that were kept of them."""
        differs_RA = sums_of_shard(self._plan, arrays) != stored_RA[rows - receipt.rows[0]]
        for name, differs_R in zip(self._plan.row_sum_names, differs_RA.T, strict=True):
            yield from self._fault_of_rows("checksum", receipt, name, rows[differs_R], "rows without their stored sums")

    def _fault_of_rows(
        self, kind: FaultKind, receipt: Receipt, name: str, bad_rows: NDArray[np.int64], message: str
    ) -> Iterator[Fault]:
        if len(bad_rows):
            first, last = int(bad_rows[0]), int(bad_rows[-1])
            chunk = (first - receipt.rows[0]) // self._plan.shards.rows_per_chunk
            where = {"array": name, "chunk": chunk, "rows": (first, last)}
            yield self.fault(kind, f"{message} ({len(bad_rows)} rows)", receipt.shard, **where)

    def _decoded(self, receipt: Receipt, name: str, read: _Read, numbers: Sequence[int]) -> NDArray[Any]:
        """Return the rows of these chunks, [rows, *row_shape], with the padding of the shard's last chunk."""
        spec, shards, part = self._plan.arrays[name], self._plan.shards, receipt.parts[name]
        dtype, size_bytes = np.dtype(spec.dtype), spec.row_bytes * shards.rows_per_chunk
        bodies = [read(part.path, *part.span(number))[:-CHECKSUM_BYTES] for number in numbers]
        if shards.compression is not None:
            bodies = [decompress(b.tobytes(), shards.compression, dtype=dtype, size_bytes=size_bytes) for b in bodies]
        return np.concatenate(bodies).view(dtype).reshape(-1, *spec.row_shape)

    def _checked(self, arrays: Mapping[str, NDArray[Any]], rows: NDArray[np.int64]) -> Iterator[_BadRows]:
        if self._encoding is not None:
            yield from _implausible_targets(self._encoding, arrays, self._plan.members)
        if "labels" in arrays:
            bad = (arrays["labels"] < UNLABELLED) | (arrays["labels"] >= self._plan.classes)
            yield "labels", bad, f"labels outside {UNLABELLED} to {self._plan.classes - 1}"
        if "inputs" in arrays:
            bad = (sample_fingerprints(arrays["inputs"]) != arrays["fingerprints"]).any(axis=1)
            yield "inputs", bad, "inputs that do not have their fingerprints"
        if "ids" in arrays and self._index is not None:
            bad = _misplaced(self._index, ids_of_rows(arrays["ids"]), rows // self._plan.layout.views)
            yield "ids", bad, "ids that belong to other rows"


def _implausible_targets(
    encoding: Encoding, arrays: Mapping[str, NDArray[Any]], members: int | None
) -> Iterator[_BadRows]:
    name = next(iter(encoding.fields))
    encoded = {field: arrays[field] for field in encoding.fields}
    if members is not None:
        encoded = {field: array.reshape(-1, *array.shape[2:]) for field, array in encoded.items()}
    rows_RW = encoding.decode_rows(encoded)
    if encoding.row_kind == "hidden_states":
        # Only the hidden states: the logits of every class would take as long as the teacher's head took.
        yield name, np.asarray(~np.isfinite(rows_RW).all(axis=1)), "NaN or Inf"
        return
    largest_R = rows_RW.max(axis=1)
    # −Inf is the logit of a class that truncated and sampled rows leave out.
    invalid_R = np.isnan(rows_RW).any(axis=1) | ~np.isfinite(largest_R)
    # Truncated and sampled rows are log-probabilities, and learnt ones approximate: their maximum may be below 0.
    exact = encoding.retemperable and not encoding.constants
    unshifted_R = ~invalid_R & ((np.abs(largest_R) if exact else largest_R) > ROW_MAX_TOLERANCE)
    for bad_R, message in ((invalid_R, "NaN or Inf"), (unshifted_R, "rows whose largest logit is not 0")):
        yield name, bad_R.reshape(-1, members or 1).any(axis=1), message


def _misplaced(index: DenseIdIndex | SortedIdIndex, ids: IdArray, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which ids do not belong to these positions; one by one where some id is unknown, to find which."""
    try:
        return np.asarray(index.positions(ids) != positions)
    except UnknownIdError:
        if len(ids) == 1:
            return np.array([True])
        return np.concatenate([_misplaced(index, ids[i : i + 1], positions[i : i + 1]) for i in range(len(ids))])


def _blocks(numbers: Sequence[int], plan: Manifest) -> Iterator[Sequence[int]]:
    row_bytes = 4 * plan.classes * (plan.members or 1) + sum(spec.row_bytes for spec in plan.arrays.values())
    step = max(1, _BLOCK_BYTES // (row_bytes * plan.shards.rows_per_chunk))
    for start in range(0, len(numbers), step):
        yield numbers[start : start + step]


def _read(root: Path, path: str, offset: int, length: int) -> _Bytes:
    """Return bytes of a file, read-only and fewer where it ends."""
    # Read, not mapped: a failing disk raises an error here, where it would kill a reader of a mapping (SIGBUS).
    with os.fdopen(safe_open(root, path), "rb") as file:
        file.seek(offset)
        return np.frombuffer(file.read(length), dtype=np.uint8)
