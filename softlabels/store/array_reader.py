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
from softlabels.manifest import Manifest
from softlabels.store.chunks import CHECKSUM_BYTES, Part, chunk_stride, chunks_in, decompress, shard_rows
from softlabels.store.containers import container_of
from softlabels.store.ledger import Ledger, Receipt
from softlabels.store.memory_map import MappedArray
from softlabels.store.safe_open import open_committed

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
        self._decoded: dict[str, Callable[[int], NDArray[Any]]] = {}

    def gather(self, field: str, rows_B: NDArray[np.int64]) -> NDArray[Any]:
        """Copy rows of one array, in the order asked.

        Args:
            field: array name, one that the store has.
            rows_B: row numbers, each inside the store.
        Raises:
            RowsNotCommittedError, ChecksumError, TruncatedError, ManifestError.
        """
        if self._manifest.shards.compression is not None:
            return self._gather_compressed(field, rows_B)
        array = self._mapped.get(field)
        if array is None:
            made = MappedArray(self._manifest.arrays[field], self._manifest.shards)
            array = self._mapped.setdefault(field, made)
        found = array.gather(rows_B)
        if found is None:
            for chunk in array.unverified(rows_B):
                if not array.verify(chunk, lambda shard: self._part(shard, field), self._root, self._container):
                    raise self._damaged(field, chunk)
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
        self._decoded.clear()

    def _gather_compressed(self, field: str, rows_B: NDArray[np.int64]) -> NDArray[Any]:
        """Copy rows from compressed chunks, which are read, verified and decoded whole; the latest ones are cached."""
        spec, shards = self._manifest.arrays[field], self._manifest.shards
        chunk_of = self._decoded.get(field)
        if chunk_of is None:
            # lru_cache is safe under threads, and holds no lock of ours that a fork could leave locked.
            cached = lru_cache(maxsize=max(1, CACHED_BYTES // (spec.row_bytes * shards.rows_per_chunk)))
            part_of = lru_cache(maxsize=256)(lambda shard: self._part(shard, field))
            chunk_of = self._decoded.setdefault(field, cached(lambda number: self._decode(field, number, part_of)))
        out = np.empty((len(rows_B), *spec.row_shape), dtype=spec.dtype)
        chunk_B, within_B = np.divmod(rows_B, shards.rows_per_chunk)
        # Grouped by chunk, so that a batch decodes each chunk once even where the cache holds fewer.
        order = np.argsort(chunk_B, kind="stable")
        chunks, starts = np.unique(chunk_B[order], return_index=True)
        for chunk, wanted in zip(chunks.tolist(), np.split(order, starts[1:]), strict=True):
            out[wanted] = chunk_of(chunk)[within_B[wanted]]
        return out

    def _decode(self, field: str, number: int, part_of: Callable[[int], Part]) -> NDArray[Any]:
        """Return the rows of a compressed chunk, counted through the whole store: [rows_per_chunk, *row_shape]."""
        spec, shards = self._manifest.arrays[field], self._manifest.shards
        assert shards.compression is not None
        shard, chunk = divmod(number, shards.rows_per_shard // shards.rows_per_chunk)
        part = part_of(shard)
        offset, size = part.span(chunk)
        # The file's size is checked before anything is allocated: these numbers come from a receipt, and may be wrong.
        descriptor = open_committed(self._root, part.path, min_bytes=offset + size)
        try:
            raw = os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
        expected = raw[-CHECKSUM_BYTES:] == part.checksum(chunk)
        if not expected or not self._container.is_chunk_intact(np.frombuffer(raw, dtype=np.uint8)):
            raise self._damaged(field, number)
        dtype, size_bytes = np.dtype(spec.dtype), spec.row_bytes * shards.rows_per_chunk
        try:
            flat = decompress(raw[:-CHECKSUM_BYTES], shards.compression, dtype=dtype, size_bytes=size_bytes)
        except ValueError as error:
            raise self._damaged(field, number) from error
        return flat.view(dtype).reshape(shards.rows_per_chunk, *spec.row_shape)

    def _damaged(self, field: str, number: int) -> ChecksumError:
        shards = self._manifest.shards
        shard, chunk = divmod(number, shards.rows_per_shard // shards.rows_per_chunk)
        first = number * shards.rows_per_chunk
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
        receipt, name = self._ledger.read(shard), self._manifest.name
        if receipt is not None:
            return checked_part(receipt, field, self._manifest)
        if self._manifest.finished:
            raise TruncatedError(
                f"{name!r}: the receipt of shard {shard} is missing from a finished store; run `softlabels repair`, "
                "then `softlabels resume`",
                shard=shard,
            )
        first = shard * self._manifest.shards.rows_per_shard
        raise RowsNotCommittedError(
            f"{name!r} is unfinished: shard {shard} (rows from {first} on) is not committed; run `softlabels resume`",
            shard=shard,
        )


def checked_part(receipt: Receipt, field: str, manifest: Manifest) -> Part:
    """Return the location of a field in a shard.

    Raises:
        ManifestError: the receipt gives none, or one that contradicts the manifest.
    """
    part, spec, shards = receipt.parts.get(field), manifest.arrays[field], manifest.shards
    rows = len(shard_rows(manifest, receipt.shard))
    chunks = chunks_in(rows, shards.rows_per_chunk)
    fits = part is not None and part.rows == rows and len(part.checksums) == 2 * CHECKSUM_BYTES * chunks
    if part is None or not fits:
        fits = False
    elif part.sizes is None:
        fits = shards.compression is None and part.stride == chunk_stride(spec, shards.rows_per_chunk)
    else:
        fits = shards.compression is not None and len(part.sizes) == chunks and min(part.sizes) > CHECKSUM_BYTES
    # Two arrays may not claim the same bytes of a file.
    ends = sorted((p.path, p.offset, p.offset + p.size_bytes(shards.rows_per_chunk)) for p in receipt.parts.values())
    fits = fits and not any(path == other and begin < end for (path, _, end), (other, begin, _) in pairwise(ends))
    if part is None or not fits:
        raise ManifestError(
            f"the receipt of shard {receipt.shard} of {manifest.name!r}: parts.{field} contradicts the manifest"
        )
    return part
