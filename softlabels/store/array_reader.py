"""Array reader: a store's arrays by row number, from committed shards only, each chunk verified when first read."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import ChecksumError, ManifestError, RowsNotCommittedError, TruncatedError
from softlabels.manifest import ArraySpec, Manifest
from softlabels.store.chunks import CHECKSUM_BYTES, Part, chunk_stride, chunks_in, decompress
from softlabels.store.containers import container_of
from softlabels.store.ledger import Ledger, Receipt
from softlabels.store.memory_map import MappedArray
from softlabels.store.safe_open import safe_open

CACHED_BYTES = 64 << 20
"""Decoded chunks of a compressed array that are kept."""


class ArrayReader:
    """Every array of the store at `root`. Safe under threads and after fork.

    Args:
        plan_sha256: digest of the plan that the store's receipts name.
    """

    def __init__(self, root: Path, manifest: Manifest, *, plan_sha256: str) -> None:
        self._root, self._manifest = root, manifest
        self._ledger = Ledger(root, plan_sha256=plan_sha256)
        self._container = container_of(manifest)
        # No lock guards these tables: a lock held by another thread during a fork would stay locked in the child. Two
        # threads may build the same array at once; `setdefault` keeps one.
        self._mapped: dict[str, MappedArray] = {}
        self._compressed: dict[str, _CompressedArray] = {}

    def gather(self, field: str, rows_B: NDArray[np.int64]) -> NDArray[Any]:
        """Copy rows of one array, in the order asked.

        Args:
            field: array name, one that the store has.
            rows_B: row numbers, each inside the store.
        Raises:
            RowsNotCommittedError, ChecksumError, TruncatedError, ManifestError.
        """
        if self._manifest.shards.compression is not None:
            return self._compressed_array(field).gather(rows_B)
        array = self._mapped.get(field) or self._mapped_array(field)
        found = array.gather(rows_B)
        if found is None:
            self._verify_chunks(field, array, array.unverified(rows_B))
            found = array.gather(rows_B)
        assert found is not None, "every chunk was verified just now"
        return found

    def word_sum(self, field: str, rows_B: NDArray[np.int64]) -> int | None:
        """Return the sum of the 64-bit words of gathered rows, modulo 2⁶⁴; None where sums are not kept."""
        array = self._mapped.get(field)
        return None if array is None else array.word_sum(rows_B)

    def close(self) -> None:
        """Release the mapped files; arrays that views still refer to stay mapped."""
        self._mapped.clear()
        self._compressed.clear()

    def _mapped_array(self, field: str) -> MappedArray:
        spec, shards = self._manifest.arrays[field], self._manifest.shards
        array = MappedArray(
            dtype=np.dtype(spec.dtype),
            row_shape=spec.row_shape,
            shards=shards.count,
            rows_per_shard=shards.rows_per_shard,
            rows_per_chunk=shards.rows_per_chunk,
        )
        return self._mapped.setdefault(field, array)

    def _compressed_array(self, field: str) -> _CompressedArray:
        array = self._compressed.get(field)
        if array is None:
            array = _CompressedArray(
                self._root,
                self._manifest,
                self._manifest.arrays[field],
                part_of=lambda shard: self._part(shard, field),
                is_intact=self._container.is_chunk_intact,
                damaged=lambda shard, chunk: self._damaged(field, shard, chunk),
            )
            array = self._compressed.setdefault(field, array)
        return array

    def _verify_chunks(self, field: str, array: MappedArray, chunks: list[int]) -> None:
        per_shard = self._manifest.shards.rows_per_shard // self._manifest.shards.rows_per_chunk
        for number in chunks:
            shard, chunk = divmod(number, per_shard)
            if not array.is_mapped(shard):
                array.map(shard, self._part(shard, field), self._root)
            found = array.chunk(shard, chunk)
            # Against the receipt as well as against itself: a sound chunk may be a copy of another one.
            expected = found[-CHECKSUM_BYTES:].tobytes() == array.checksum(shard, chunk)
            if not expected or not self._container.is_chunk_intact(found):
                raise self._damaged(field, shard, chunk)
            array.mark_verified(number)

    def _damaged(self, field: str, shard: int, chunk: int) -> ChecksumError:
        shards = self._manifest.shards
        first = shard * shards.rows_per_shard + chunk * shards.rows_per_chunk
        last = min(first + shards.rows_per_chunk, self._manifest.rows) - 1
        return ChecksumError(
            f"{self._manifest.name!r}: array {field!r}, shard {shard}, chunk {chunk} (rows {first} to {last}) is not "
            "what was written; run `softlabels verify`, then `softlabels repair` and `softlabels resume`",
            field=field,
            shard=shard,
            chunk=chunk,
            rows=[first, last],
        )

    def _part(self, shard: int, field: str) -> Part:
        receipt = self._ledger.read(shard)
        if receipt is None:
            raise self._not_committed(shard)
        return checked_part(receipt, field, self._manifest)

    def _not_committed(self, shard: int) -> RowsNotCommittedError | TruncatedError:
        if self._manifest.finished:
            return TruncatedError(
                f"{self._manifest.name!r}: the receipt of shard {shard} is missing from a finished store; run "
                "`softlabels repair`, then `softlabels resume`",
                shard=shard,
            )
        first = shard * self._manifest.shards.rows_per_shard
        return RowsNotCommittedError(
            f"{self._manifest.name!r} is unfinished: shard {shard} (rows from {first} on) is not committed; run "
            "`softlabels resume`",
            shard=shard,
        )


class _CompressedArray:
    """One array of a store across all its shards: chunks are read, verified and decoded whole; the latest are kept.

    Args:
        part_of: returns the array's location in a shard; raises where the shard is not committed.
        is_intact: returns whether a chunk agrees with the checksum at its end.
        damaged: returns the error to raise for a chunk of a shard.
    """

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        array: ArraySpec,
        *,
        part_of: Callable[[int], Part],
        is_intact: Callable[[NDArray[np.uint8]], bool],
        damaged: Callable[[int, int], ChecksumError],
    ) -> None:
        assert manifest.shards.compression is not None
        self._root, self._array, self._shards = root, array, manifest.shards
        self._compression = manifest.shards.compression
        self._is_intact, self._damaged = is_intact, damaged
        self._chunk_bytes = array.row_bytes * manifest.shards.rows_per_chunk
        # Both caches are safe under threads, and hold no lock of ours that a fork could leave locked.
        self._part = lru_cache(maxsize=256)(part_of)
        self._chunk = lru_cache(maxsize=max(1, CACHED_BYTES // self._chunk_bytes))(self._read_chunk)

    def gather(self, rows_B: NDArray[np.int64]) -> NDArray[Any]:
        """Copy rows, in the order asked.

        Raises:
            ChecksumError, TruncatedError, ManifestError.
        """
        out = np.empty((len(rows_B), *self._array.row_shape), dtype=self._array.dtype)
        chunk_B, within_B = np.divmod(rows_B, self._shards.rows_per_chunk)
        order = np.argsort(chunk_B, kind="stable")
        chunks, starts = np.unique(chunk_B[order], return_index=True)
        for chunk, wanted in zip(chunks.tolist(), np.split(order, starts[1:]), strict=True):
            out[wanted] = self._chunk(chunk)[within_B[wanted]]
        return out

    def _read_chunk(self, number: int) -> NDArray[Any]:
        shard, chunk = divmod(number, self._shards.rows_per_shard // self._shards.rows_per_chunk)
        part = self._part(shard)
        raw = self._bytes(part.path, *part.span(chunk))
        if raw[-CHECKSUM_BYTES:] != part.checksum(chunk) or not self._is_intact(np.frombuffer(raw, dtype=np.uint8)):
            raise self._damaged(shard, chunk)
        dtype = np.dtype(self._array.dtype)
        try:
            flat = decompress(raw[:-CHECKSUM_BYTES], self._compression, dtype=dtype, size_bytes=self._chunk_bytes)
        except ValueError as error:
            raise self._damaged(shard, chunk) from error
        return flat.view(dtype).reshape(self._shards.rows_per_chunk, *self._array.row_shape)

    def _bytes(self, inside: str, offset: int, size: int) -> bytes:
        path = self._root / inside
        try:
            descriptor = safe_open(self._root, inside)
        except FileNotFoundError as error:
            raise TruncatedError(f"{path} is missing though its shard is committed: run `softlabels repair`") from error
        try:
            length = os.fstat(descriptor).st_size
            # Before anything is allocated: the size comes from a receipt, and may be a lie.
            if length < offset + size:
                raise TruncatedError(
                    f"{path} has {length} bytes where {offset + size} are needed: run `softlabels repair`"
                )
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)


def checked_part(receipt: Receipt, field: str, manifest: Manifest) -> Part:
    """Return the location of a field in a shard.

    Raises:
        ManifestError: the receipt gives none, or one that contradicts the manifest.
    """
    part = receipt.parts.get(field)
    spec, shards = manifest.arrays[field], manifest.shards
    rows = min(shards.rows_per_shard, manifest.rows - receipt.shard * shards.rows_per_shard)
    chunks = chunks_in(rows, shards.rows_per_chunk)
    fits = part is not None and part.rows == rows and len(part.checksums) == 2 * CHECKSUM_BYTES * chunks
    if part is not None and part.sizes is None:
        fits = fits and shards.compression is None and part.stride == chunk_stride(spec, shards.rows_per_chunk)
    elif part is not None and part.sizes is not None:
        fits = fits and shards.compression is not None and min(part.sizes, default=0) > CHECKSUM_BYTES
        fits = fits and len(part.sizes) == chunks
    if part is None or not fits or _overlap(receipt, shards.rows_per_chunk):
        raise ManifestError(
            f"the receipt of shard {receipt.shard} of {manifest.name!r}: parts.{field} contradicts the manifest"
        )
    return part


def _overlap(receipt: Receipt, rows_per_chunk: int) -> bool:
    """Return whether two arrays claim the same bytes of a file."""
    parts = receipt.parts.values()
    spans = sorted((part.path, part.offset, part.offset + part.size_bytes(rows_per_chunk)) for part in parts)
    return any(path == other and begin < end for (path, _, end), (other, begin, _) in pairwise(spans))
