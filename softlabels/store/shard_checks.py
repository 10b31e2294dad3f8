"""Checks of one shard: file sizes, digests, chunk checksums, and whether the decoded rows are plausible."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from softlabels.encodings import Encoding
from softlabels.errors import DamageError, ManifestError, UnknownIdError
from softlabels.ids import IdArray
from softlabels.manifest import Manifest
from softlabels.store.array_reader import checked_part
from softlabels.store.chunks import CHECKSUM_BYTES, Part, chunks_in, decompress, shard_rows
from softlabels.store.containers import StoreContainer
from softlabels.store.ledger import FileRecord, Receipt
from softlabels.store.safe_open import open_committed, safe_open
from softlabels.store.sample_index import DenseIdIndex, SortedIdIndex, ids_of_rows
from softlabels.store.verify_report import Fault, Report
from softlabels.transfer_set import UNLABELLED, FingerprintSum, sample_fingerprints

Piece: TypeAlias = NDArray[np.uint8]
Read: TypeAlias = Callable[[str, int, int], Piece]
"""Returns bytes of a file of the shard, given path, offset and length."""

ROW_MAX_TOLERANCE = 0.1
"""Nats. Rows are stored with their largest logit at 0, and no encoding that can be re-tempered moves it further."""

_BLOCK_BYTES = 4 << 20
"""Files are read, and rows decoded, in blocks of about this size."""


class ShardChecks:
    """Checks of the shards of one store.

    Args:
        plan: the store's plan.
        encoding: encoding of its rows; None where it is damaged: rows are then not decoded.
        index: index from ids to positions; None where it is damaged: ids are then not looked up.
        report: report whose counters are increased as chunks, rows and files are verified.
    """

    def __init__(
        self,
        root: Path,
        plan: Manifest,
        container: StoreContainer,
        encoding: Encoding | None,
        *,
        index: DenseIdIndex | SortedIdIndex | None,
        report: Report,
    ) -> None:
        self._root, self._plan, self._container, self._encoding = root, plan, container, encoding
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

    def faults(self, receipt: Receipt) -> Iterator[Fault]:
        """Yield every fault of a shard; each byte of its files is read once."""
        contents: dict[str, Piece] = {}
        sound = True
        for path, record in receipt.files.items():
            found = self._contents(path, record, receipt.shard)
            if isinstance(found, Fault):
                yield found
                sound = False
            else:
                contents[path] = found

        def read(path: str, offset: int, length: int) -> Piece:
            return contents[path][offset : offset + length]

        broken: set[str] = set()
        for name in self._plan.arrays:
            part = checked_part(receipt, name, self._plan)
            if part.path in contents:
                for fault in self._chunk_faults(receipt, name, part, read, self._numbers(receipt)):
                    broken.add(part.path)
                    yield fault
        for path, whole in contents.items():
            self._report.files += 1
            if path not in broken and hashlib.sha256(whole.data).hexdigest() != receipt.files[path].sha256:
                broken.add(path)
                message = "its SHA-256 is not the receipt's, though every chunk in it is intact"
                yield self.fault("checksum", message, receipt.shard, path=path)
        if sound and not broken:
            yield from self._contents_faults(receipt, read, self._numbers(receipt), whole=True)

    def sampled_faults(self, receipt: Receipt, numbers: Sequence[int]) -> Iterator[Fault]:
        """Yield faults of some chunks of a shard, in every array; nothing else of the files is read."""
        for path, record in receipt.files.items():
            fault = self._size_fault(path, record, receipt.shard)
            if fault is not None:
                yield fault
                return

        def read(path: str, offset: int, length: int) -> Piece:
            return _read(self._root, path, offset, length)

        for name in self._plan.arrays:
            part = checked_part(receipt, name, self._plan)
            found = list(self._chunk_faults(receipt, name, part, read, numbers))
            yield from found
            if found:
                return
        yield from self._contents_faults(receipt, read, numbers, whole=False)

    def fault(self, kind: Any, message: str, shard: int, **where: Any) -> Fault:
        """Return a fault of a shard, of all its rows unless `where` says otherwise."""
        rows = shard_rows(self._plan, shard)
        return Fault(**{"kind": kind, "message": message, "shard": shard, "rows": (rows.start, rows.stop - 1), **where})

    def _numbers(self, receipt: Receipt) -> range:
        return range(chunks_in(receipt.rows[1] - receipt.rows[0], self._plan.shards.rows_per_chunk))

    def _contents(self, path: str, record: FileRecord, shard: int) -> Piece | Fault:
        fault = self._size_fault(path, record, shard)
        if fault is not None:
            return fault
        try:
            return _read(self._root, path, 0, record.size)
        except OSError as error:
            return self.fault("missing", f"it cannot be read: {error}", shard, path=path)

    def _size_fault(self, path: str, record: FileRecord, shard: int) -> Fault | None:
        try:
            with os.fdopen(open_committed(self._root, path), "rb") as file:
                size = os.fstat(file.fileno()).st_size
        except (DamageError, OSError) as error:
            return self.fault("missing", f"it cannot be read: {error}", shard, path=path)
        if size != record.size:
            return self.fault("missing", f"it has {size} bytes, {record.size} were written", shard, path=path)
        return None

    def _chunk_faults(
        self, receipt: Receipt, name: str, part: Part, read: Read, numbers: Sequence[int]
    ) -> Iterator[Fault]:
        for number in numbers:
            chunk = read(part.path, *part.span(number))
            self._report.chunks += 1
            intact = len(chunk) > CHECKSUM_BYTES and self._container.is_chunk_intact(chunk)
            if not intact or chunk[-CHECKSUM_BYTES:].tobytes() != part.checksum(number):
                where = {"path": part.path, "array": name, "chunk": number, "rows": self._rows(receipt, number)}
                message = "its checksum is not the receipt's: it is another chunk" if intact else "its checksum fails"
                yield self.fault("checksum", message, receipt.shard, **where)

    def _rows(self, receipt: Receipt, number: int) -> tuple[int, int]:
        first = receipt.rows[0] + number * self._plan.shards.rows_per_chunk
        return first, min(first + self._plan.shards.rows_per_chunk, receipt.rows[1]) - 1

    def _contents_faults(self, receipt: Receipt, read: Read, numbers: Sequence[int], *, whole: bool) -> Iterator[Fault]:
        fingerprint = FingerprintSum()
        keyed = {"ids", "fingerprints"} <= set(self._plan.arrays)
        for block in _blocks(numbers, self._plan):
            try:
                arrays = {name: self._decoded(receipt, name, read, block) for name in self._plan.arrays}
            except ValueError as error:
                yield self.fault("contents", str(error), receipt.shard)
                return
            rows = np.concatenate([np.arange(a, b + 1) for a, b in (self._rows(receipt, number) for number in block)])
            self._report.rows += len(rows)
            for name, bad, message in self._implausible(arrays, rows):
                first = int(rows[bad][0])
                chunk = (first - receipt.rows[0]) // self._plan.shards.rows_per_chunk
                where = {"array": name, "chunk": chunk, "rows": (first, int(rows[bad][-1]))}
                yield self.fault("contents", f"{message} ({int(bad.sum())} rows)", receipt.shard, **where)
            if keyed and whole:
                fingerprint.add(ids_of_rows(arrays["ids"]), arrays["fingerprints"])
        if whole and keyed and fingerprint.hexdigest() != receipt.fingerprint:
            yield self.fault(
                "contents", "ids and fingerprints do not add up to the receipt's fingerprint", receipt.shard
            )

    def _decoded(self, receipt: Receipt, name: str, read: Read, numbers: Sequence[int]) -> NDArray[Any]:
        """Return the rows of these chunks, [rows, *row_shape], without padding."""
        spec, shards, part = self._plan.arrays[name], self._plan.shards, checked_part(receipt, name, self._plan)
        dtype, size_bytes = np.dtype(spec.dtype), spec.row_bytes * shards.rows_per_chunk
        bodies = [read(part.path, *part.span(number))[:-CHECKSUM_BYTES] for number in numbers]
        if shards.compression is not None:
            bodies = [decompress(b.tobytes(), shards.compression, dtype=dtype, size_bytes=size_bytes) for b in bodies]
        rows: NDArray[Any] = np.concatenate(bodies).view(dtype).reshape(-1, *spec.row_shape)
        wanted = sum(last - first + 1 for first, last in (self._rows(receipt, number) for number in numbers))
        return rows[:wanted]

    def _implausible(
        self, arrays: Mapping[str, NDArray[Any]], rows: NDArray[np.int64]
    ) -> Iterator[tuple[str, NDArray[np.bool_], str]]:
        """Yield which rows have invalid values, and why: array, [rows] mask, message."""
        if self._encoding is not None:
            yield from _implausible_rows(self._encoding, arrays, self._plan.members)
        if "labels" in arrays:
            labels = arrays["labels"]
            bad = (labels < UNLABELLED) | (labels >= self._plan.classes)
            if bad.any():
                yield "labels", bad, f"labels outside {UNLABELLED} to {self._plan.classes - 1}"
        if "inputs" in arrays:
            bad = (sample_fingerprints(arrays["inputs"]) != arrays["fingerprints"]).any(axis=1)
            if bad.any():
                yield "inputs", bad, "inputs that do not have their fingerprints"
        if "ids" in arrays and self._index is not None:
            bad = _misplaced(self._index, ids_of_rows(arrays["ids"]), rows // self._plan.layout.views)
            if bad.any():
                yield "ids", bad, "ids that belong to other rows"


def _implausible_rows(
    encoding: Encoding, arrays: Mapping[str, NDArray[Any]], members: int | None
) -> Iterator[tuple[str, NDArray[np.bool_], str]]:
    encoded = {name: arrays[name] for name in encoding.fields}
    if members is not None:
        encoded = {name: array.reshape(-1, *array.shape[2:]) for name, array in encoded.items()}
    rows_RW = encoding.decode_rows(encoded)
    if encoding.row_kind == "hidden_states":
        # Only the hidden states: the logits of every class would take as long as the teacher's head took.
        no_numbers_R: NDArray[np.bool_] = np.asarray(~np.isfinite(rows_RW).all(axis=1))
        if no_numbers_R.any():
            yield next(iter(encoding.fields)), no_numbers_R, "NaN or Inf"
        return
    largest_R = rows_RW.max(axis=1)
    no_logits_R = np.isnan(rows_RW).any(axis=1) | ~np.isfinite(largest_R)
    # Truncated and sampled rows are log-probabilities, and learnt ones approximate: their maximum may be below 0.
    exact = encoding.retemperable and not encoding.constants
    unshifted_R = ~no_logits_R & ((np.abs(largest_R) if exact else largest_R) > ROW_MAX_TOLERANCE)
    for bad_R, message in ((no_logits_R, "NaN or Inf"), (unshifted_R, "rows whose largest logit is not 0")):
        bad = bad_R.reshape(-1, members or 1).any(axis=1)
        if bad.any():
            yield next(iter(encoding.fields)), bad, message


def _misplaced(index: DenseIdIndex | SortedIdIndex, ids: IdArray, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
    try:
        found: NDArray[np.bool_] = index.positions(ids) != positions
    except UnknownIdError:
        return np.array([not _leads_to(index, ids[i : i + 1], position) for i, position in enumerate(positions)])
    return found


def _leads_to(index: DenseIdIndex | SortedIdIndex, one_id: IdArray, position: int) -> bool:
    try:
        return bool(index.positions(one_id)[0] == position)
    except UnknownIdError:
        return False


def _blocks(numbers: Sequence[int], plan: Manifest) -> Iterator[Sequence[int]]:
    row_bytes = 4 * plan.classes * (plan.members or 1) + sum(spec.row_bytes for spec in plan.arrays.values())
    step = max(1, _BLOCK_BYTES // (row_bytes * plan.shards.rows_per_chunk))
    for start in range(0, len(numbers), step):
        yield numbers[start : start + step]


def _read(root: Path, path: str, offset: int, length: int) -> Piece:
    """Return bytes of a file, fewer where it ends."""
    # Read, not mapped: a failing disk raises an error here, where it would kill a reader of a mapping (SIGBUS).
    out = bytearray(length)
    view, done = memoryview(out), 0
    with os.fdopen(safe_open(root, path), "rb", buffering=0) as file:
        file.seek(offset)
        while done < length:
            got = file.readinto(view[done : done + _BLOCK_BYTES])
            if not got:
                break
            done += got
    found = np.frombuffer(out, dtype=np.uint8)[:done]
    found.flags.writeable = False
    return found
