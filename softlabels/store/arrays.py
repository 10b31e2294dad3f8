"""How a store's arrays are read by row number: shards where the ledger has them, chunks verified at first touch."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import ChecksumError, ManifestError, RowsNotCommittedError, TruncatedError
from softlabels.manifest import ArraySpec, Manifest
from softlabels.store.compressed import CompressedArray
from softlabels.store.container import container_of
from softlabels.store.geometry import CHECKSUM_BYTES, Part, chunk_stride, chunks_in, part_bytes
from softlabels.store.ledger import Ledger, Receipt
from softlabels.store.mapping import MappedArray


class StoreArrays:
    """Every array of the store at `root`. Safe under threads and after fork.

    Args:
        plan_sha256: digest of the plan that the store's receipts name.
    """

    def __init__(self, root: Path, manifest: Manifest, *, plan_sha256: str) -> None:
        self._root, self._manifest = root, manifest
        self._ledger = Ledger(root, plan_sha256=plan_sha256)
        self._container = container_of(manifest)
        self._mapped: dict[str, MappedArray] = {}
        self._compressed: dict[str, CompressedArray] = {}

    def gather(self, field: str, rows_B: NDArray[np.int64]) -> NDArray[Any]:
        """Copy rows of an array out, in the order asked.

        Args:
            field: an array of the store.
            rows_B: row numbers, each inside the store.
        Raises:
            RowsNotCommittedError, ChecksumError, TruncatedError, ManifestError.
        """
        if self._manifest.shards.compression is not None:
            return self._compressed_array(field).gather(rows_B)
        array = self._mapped.get(field) or self._mapped_array(field)
        found = array.gather(rows_B)
        if found is None:
            self._admit(field, array, array.unadmitted(rows_B))
            found = array.gather(rows_B)
        assert found is not None, "every chunk was admitted just now"
        return found

    def word_sum(self, field: str, rows_B: NDArray[np.int64]) -> int | None:
        """The sum of the 64-bit words of rows that were gathered, modulo 2⁶⁴; None where it has to be added up."""
        array = self._mapped.get(field)
        return None if array is None else array.word_sum(rows_B)

    def run(self, field: str, chunk: int) -> NDArray[Any]:
        """The rows of one chunk, counted through the whole store; raises as `gather` does.

        Read-only, and a view of the mapped file unless the store is compressed.
        """
        size = self._manifest.shards.rows_per_chunk
        first, last = chunk * size, min((chunk + 1) * size, self._manifest.rows)
        if self._manifest.shards.compression is not None:
            return self._compressed_array(field).gather(np.arange(first, last))
        array = self._mapped.get(field) or self._mapped_array(field)
        found = array.run(chunk)
        if found is None:
            self._admit(field, array, [chunk])
            found = array.run(chunk)
        assert found is not None, "the chunk was admitted just now"
        return found[: last - first]

    def close(self) -> None:
        """Let go of the mapped files; views that were handed out keep theirs."""
        self._mapped.clear()
        self._compressed.clear()

    def _mapped_array(self, field: str) -> MappedArray:
        array = self._mapped.get(field)
        if array is None:
            spec, shards = self._manifest.arrays[field], self._manifest.shards
            array = MappedArray(
                dtype=np.dtype(spec.dtype),
                row_shape=spec.row_shape,
                shards=shards.count,
                rows_per_shard=shards.rows_per_shard,
                rows_per_chunk=shards.rows_per_chunk,
            )
            array = self._mapped.setdefault(field, array)
        return array

    def _compressed_array(self, field: str) -> CompressedArray:
        array = self._compressed.get(field)
        if array is None:
            array = CompressedArray(
                self._root,
                array=self._manifest.arrays[field],
                shards=self._manifest.shards,
                part_of=lambda shard: self._part(shard, field),
                is_sound=self._container.chunk_is_sound,
                damaged=lambda shard, chunk: self._damaged(field, shard, chunk),
            )
            array = self._compressed.setdefault(field, array)
        return array

    def _admit(self, field: str, array: MappedArray, chunks: list[int]) -> None:
        per_shard = self._manifest.shards.rows_per_shard // self._manifest.shards.rows_per_chunk
        for number in chunks:
            shard, chunk = divmod(number, per_shard)
            if not array.is_mapped(shard):
                array.map(shard, self._part(shard, field), self._root)
            found = array.chunk(shard, chunk)
            in_place = found[-CHECKSUM_BYTES:].tobytes() == array.checksum(shard, chunk)
            if not in_place or not self._container.chunk_is_sound(found):
                raise self._damaged(field, shard, chunk)
            array.admit(number)

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
                f"{self._manifest.name!r}: the receipt of shard {shard} is gone from a finished store; run `softlabels "
                "repair`, then `softlabels resume`",
                shard=shard,
            )
        first = shard * self._manifest.shards.rows_per_shard
        return RowsNotCommittedError(
            f"{self._manifest.name!r} is unfinished: shard {shard} (rows from {first} on) is not committed; run "
            "`softlabels resume`",
            shard=shard,
        )


def checked_part(receipt: Receipt, field: str, manifest: Manifest) -> Part:
    """Where a field of a shard lies, if the receipt says so soundly.

    Raises:
        ManifestError: it names no place, or one that contradicts the manifest.
    """
    part = receipt.parts.get(field)
    spec: ArraySpec = manifest.arrays[field]
    shards = manifest.shards
    rows = min(shards.rows_per_shard, manifest.rows - receipt.shard * shards.rows_per_shard)
    chunks = chunks_in(rows, shards.rows_per_chunk)
    fits = part is not None and part.rows == rows and len(part.checksums) == 2 * CHECKSUM_BYTES * chunks
    if part is not None and part.sizes is None:
        fits = fits and shards.compression is None and part.stride == chunk_stride(spec, shards.rows_per_chunk)
    elif part is not None and part.sizes is not None:
        fits = fits and shards.compression is not None and min(part.sizes, default=0) > CHECKSUM_BYTES
        fits = fits and len(part.sizes) == chunks
    if part is None or not fits or _overlap(receipt, shards.rows_per_chunk):
        raise ManifestError(f"the receipt of shard {receipt.shard} of {manifest.name!r} contradicts the manifest")
    return part


def _overlap(receipt: Receipt, rows_per_chunk: int) -> bool:
    """Whether two arrays claim the same bytes of a file."""
    parts = receipt.parts.values()
    spans = sorted((part.path, part.offset, part.offset + part_bytes(part, rows_per_chunk)) for part in parts)
    return any(path == other and begin < end for (path, _, end), (other, begin, _) in pairwise(spans))
