"""Array reader: a store's arrays by row number, from committed shards only, each chunk verified when first read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import ChecksumError, ManifestError
from softlabels.manifest import Manifest
from softlabels.mapping_guard import stable_read
from softlabels.row_sums import join_sums, sum_of_array, sums_of_rows
from softlabels.store.chunks import CHECKSUM_BYTES, Part, chunk_stride, chunks_in, decompress, shard_rows
from softlabels.store.containers import container_of
from softlabels.store.ledger import Receipt
from softlabels.store.memory_map import MappedArray, MappedSums
from softlabels.store.safe_open import open_committed
from softlabels.store.snapshot import Snapshot

CACHED_BYTES = 64 << 20
"""Decoded chunks of a compressed array that are kept."""


class ArrayReader:
    """Every array of one version of a store. Safe under threads and after fork."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._manifest, self._folder = snapshot.manifest, snapshot.folder
        self._container = container_of(snapshot.manifest)
        # All arrays of a shard are first read together. No lock guards these tables: a lock held by another thread
        # during a fork would stay locked in the child. Two threads may build the same array at once; `setdefault` keeps
        # one.
        self._receipt = lru_cache(maxsize=8)(snapshot.receipt)
        self._parts: dict[tuple[str, int], Part] = {}
        self._mapped: dict[str, MappedArray] = {}
        self._decoded: dict[str, Callable[[int], NDArray[Any]]] = {}
        self._sums: MappedSums | None = None
        self.refused: Mapping[int | None, str] = {}
        self._sum_columns = {name: column for column, name in enumerate(snapshot.manifest.row_sum_names)}

    def gather(self, fields: Iterable[str], rows_B: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Copy rows of arrays, in the order asked.

        Args:
            fields: names of arrays that the store has.
            rows_B: row numbers, each inside the store.
        Raises:
            RowsNotCommittedError, ChecksumError, TruncatedError, ManifestError.
        """
        if self.refused:
            self._check_refused(rows_B)
        if self._manifest.shards.compression is not None:
            return {field: self._gather_compressed(field, rows_B) for field in fields}
        return stable_read(lambda: {field: self._gather_mapped(field, rows_B) for field in fields})

    def _check_refused(self, rows_B: NDArray[np.int64]) -> None:
        for shard, message in self.refused.items():
            if shard is None or (rows_B // self._manifest.shards.rows_per_shard == shard).any():
                raise ChecksumError(message, shard=shard)

    def _gather_mapped(self, field: str, rows_B: NDArray[np.int64]) -> NDArray[Any]:
        array = self._mapped.get(field)
        if array is None:
            array = self._mapped.setdefault(field, MappedArray(self._manifest.arrays[field], self._manifest))
        while (found := array.rows(rows_B)) is None:
            for chunk in array.unmarked(rows_B):
                shard = chunk * self._manifest.shards.rows_per_chunk // self._manifest.shards.rows_per_shard
                part = self._parts.get((field, shard))
                if part is None:
                    part = self._parts[field, shard] = checked_part(self._receipt(shard), field, self._manifest)
                if not array.verify(chunk, part, self._folder, self._container):
                    raise self._damaged(field, chunk)
        return found

    def row_sums(self, rows_B: NDArray[np.int64]) -> NDArray[np.uint32] | None:
        """Return the CRC-32C of each array of each row, [B, arrays by name]; None in stores of format version 1."""
        if not self._manifest.row_sum_names:
            return None
        if self._sums is None:
            self._sums = MappedSums(self._manifest)
        sums = self._sums

        def found() -> NDArray[np.uint32]:
            while (found := sums.sums(rows_B)) is None:
                for shard in sums.unmarked(rows_B):
                    sums.open_shard(self._receipt(shard), self._folder)
            return found

        return stable_read(found)

    def verify_rows(self, rows_B: NDArray[np.int64], found: dict[str, NDArray[Any]]) -> None:
        """Compare rows that were gathered with their kept sums; where there are none, verify their chunks again.

        Args:
            found: the rows by array name; those of a chunk that has changed are replaced by intact ones.
        Raises:
            ChecksumError: they are not what was written.
        """
        sums = self.row_sums(rows_B)
        for field, rows in found.items():
            kept_B = None if sums is None else sums[:, self._sum_columns[field]]
            if kept_B is not None and join_sums(kept_B, rows[:1].nbytes) == sum_of_array(rows):
                continue
            # The chunk's own checksum says whether it is the rows that changed, or their sums.
            if (array := self._mapped.get(field)) is not None:
                array.unmark(rows_B)
                found[field] = self.gather((field,), rows_B)[field]
            if kept_B is not None and (wrong := sums_of_rows(found[field]) != kept_B).any():
                row = int(rows_B[wrong][0])
                raise ChecksumError(
                    f"{self._manifest.name!r}: row {row} of array {field!r} does not have the sum that was kept when "
                    "it was written; run `softlabels verify`, then `softlabels repair` and `softlabels resume`",
                    field=field,
                    rows=[row, row],
                )

    def close(self) -> None:
        """Release the mapped files."""
        self._mapped.clear()
        self._decoded.clear()
        self._sums = None

    def _gather_compressed(self, field: str, rows_B: NDArray[np.int64]) -> NDArray[Any]:
        """Copy rows from compressed chunks, which are read, verified and decoded whole; the latest ones are cached."""
        spec, shards = self._manifest.arrays[field], self._manifest.shards
        chunk_of = self._decoded.get(field)
        if chunk_of is None:
            # lru_cache is safe under threads, and holds no lock of ours that a fork could leave locked.
            cached = lru_cache(maxsize=max(1, CACHED_BYTES // (spec.row_bytes * shards.rows_per_chunk)))
            part_of = lru_cache(maxsize=256)(lambda shard: checked_part(self._receipt(shard), field, self._manifest))
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
        descriptor = open_committed(self._folder, part.path, min_bytes=offset + size)
        try:
            raw = os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
        if not self._container.is_as_written(np.frombuffer(raw, dtype=np.uint8), part, chunk):
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


def checked_part(receipt: Receipt, field: str, manifest: Manifest) -> Part:
    """Return the location of a field in a shard.

    Raises:
        ManifestError: the receipt gives none, or one that contradicts the manifest.
    """
    part, spec, shards = receipt.parts.get(field), manifest.arrays[field], manifest.shards
    rows = len(shard_rows(manifest, receipt.shard))
    chunks = chunks_in(rows, shards.rows_per_chunk)
    # In Zarr `checksums` are CRC-32C themselves. A receipt without any would have a weaker sum believed.
    crc32c = 2 * CHECKSUM_BYTES * chunks if manifest.container == "hdf5" and manifest.format_version >= 2 else 0
    fits = part is not None and part.rows == rows and len(part.checksums) == 2 * CHECKSUM_BYTES * chunks
    if part is None or not fits or len(part.crc32c or "") != crc32c:
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
