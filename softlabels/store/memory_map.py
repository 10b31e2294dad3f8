"""Memory-mapped arrays: shard files in one run of virtual addresses, so that one NumPy index gathers from all of them.

A row's address is arithmetic, and a batch over any number of shards is one gather without a second copy: 20,000 batches
a second of 256 × 2,000 B where `memmap[ids]` makes 16,000.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.manifest import ArraySpec, Manifest
from softlabels.row_sums import masks
from softlabels.store.address_space import ALIGNMENT_BYTES, AddressSpace
from softlabels.store.chunks import Part, chunk_stride, sums_path
from softlabels.store.containers import StoreContainer
from softlabels.store.ledger import Receipt
from softlabels.store.safe_open import OpenFolder

_SUM_BYTES = 4


class MappedRows:
    """Rows of equal size across the shards of a store, gathered by row number from the blocks that are marked.

    Args:
        row_bytes: size of a row.
        rows_per_block, blocks_per_shard: rows that are marked together, and how many such blocks a shard has.
        block_bytes: distance from one block to the next in a file.
    """

    def __init__(
        self, shards: int, *, row_bytes: int, rows_per_block: int, blocks_per_shard: int, block_bytes: int
    ) -> None:
        self._row_bytes, self._rows_per_block, self._block_bytes = row_bytes, rows_per_block, block_bytes
        self._blocks_per_shard = blocks_per_shard
        # The first block may begin anywhere in a huge page.
        slot_bytes = block_bytes * blocks_per_shard + ALIGNMENT_BYTES
        self._space = AddressSpace(slots=shards, slot_bytes=slot_bytes, blocks_per_slot=blocks_per_shard)
        # A row-sized item at every byte address: overlapping on purpose, so that an address is an index.
        count, item = self._space.size_bytes - row_bytes + 1, np.dtype((np.void, row_bytes))
        self._items: NDArray[Any] = np.ndarray((count,), dtype=item, buffer=self._space.buffer, strides=(1,))

    def unmarked(self, rows_B: NDArray[np.int64]) -> list[int]:
        """Return the blocks of these rows that may not be read yet, in order, each once."""
        blocks = np.unique(rows_B // self._rows_per_block)
        return [int(block) for block in blocks[self._space.base[blocks] == 0]]

    def unmark(self, rows_B: NDArray[np.int64]) -> None:
        """Clear the marks of these rows' blocks, so that they are verified again."""
        self._space.base[rows_B // self._rows_per_block] = 0

    def gather(self, rows_B: NDArray[np.int64]) -> NDArray[np.void] | None:
        """Copy rows, [B], in the order asked; None when one of them may not be read. To be called by `stable_read`.

        Args:
            rows_B: row numbers of the store, none below zero.
        """
        self._space.check_sizes()
        # `take` copies, so that adding in place below does not change the table.
        address_B = self._space.base.take(rows_B // self._rows_per_block)
        if not address_B.all():
            return None
        address_B += rows_B * self._row_bytes
        return self._items[address_B]

    def _mark(self, block: int, begin: int, generation: int) -> bool:
        # Less the bytes of all rows before the block, so that a row's address is `base[block] + row * row_bytes`.
        return self._space.mark(block, begin - block * self._rows_per_block * self._row_bytes, generation)


class MappedArray(MappedRows):
    """One array of a store across all its shards; a chunk is marked once it was found to be what was written."""

    def __init__(self, spec: ArraySpec, manifest: Manifest) -> None:
        self._dtype, self._row_shape, shards = np.dtype(spec.dtype), spec.row_shape, manifest.shards
        super().__init__(
            shards.count,
            row_bytes=spec.row_bytes,
            rows_per_block=shards.rows_per_chunk,
            blocks_per_shard=shards.rows_per_shard // shards.rows_per_chunk,
            block_bytes=chunk_stride(spec, shards.rows_per_chunk),
        )

    def verify(self, chunk: int, part: Part, folder: OpenFolder, container: StoreContainer) -> bool:
        """Mark a chunk, counted through the whole store, if it is what was written; return whether it is.

        A file that changes meanwhile is neither: the chunk stays unmarked, and True is returned.
        """
        shard, local = divmod(chunk, self._blocks_per_shard)
        if not self._space.begin[shard]:
            # Two threads may do this at once, with the same result. A lock that is held while another thread forks
            # would stay locked in the child.
            self._space.map(shard, folder, part.path, offset=part.offset, length=part.size_bytes(self._rows_per_block))
        generation = self._space.generation
        # After the generation: a file that is invalidated in between is not mapped.
        begin = int(self._space.begin[shard])
        if not begin:
            return True
        begin += local * self._block_bytes
        found = np.frombuffer(self._space.buffer[begin : begin + self._block_bytes], dtype=np.uint8)
        intact = container.is_as_written(found, part, local)
        if intact:
            self._mark(chunk, begin, generation)
        return intact or self._space.generation != generation

    def rows(self, rows_B: NDArray[np.int64]) -> NDArray[Any] | None:
        """Copy rows, [B, *row_shape]; None as in `gather`."""
        found = self.gather(rows_B)
        return None if found is None else found.view(self._dtype).reshape(len(rows_B), *self._row_shape)


class MappedSums(MappedRows):
    """CRC-32C of every row of every array, as computed when the rows were written; see docs/format.md.

    A sum is not verified itself: it fits the bytes of its own row and no others.
    """

    def __init__(self, manifest: Manifest) -> None:
        shards = manifest.shards
        self._salts = np.zeros(shards.count, dtype=np.uint32)
        row_bytes = _SUM_BYTES * len(manifest.row_sum_names)
        super().__init__(
            shards.count,
            row_bytes=row_bytes,
            rows_per_block=shards.rows_per_shard,
            blocks_per_shard=1,
            block_bytes=row_bytes * shards.rows_per_shard,
        )

    def open_shard(self, receipt: Receipt, folder: OpenFolder) -> None:
        """Map the sums of a shard; raise ManifestError, TruncatedError."""
        shard, path = receipt.shard, sums_path(receipt.shard)
        assert receipt.salt is not None, "the ledger refuses receipts without sums"
        self._salts[shard] = receipt.salt
        begin = self._space.map(shard, folder, path, offset=0, length=receipt.files[path].size)
        self._mark(shard, begin, self._space.generation)

    def sums(self, rows_B: NDArray[np.int64]) -> NDArray[np.uint32] | None:
        """Return the CRC-32C of each array of each row, [B, arrays by name]; None as in `gather`."""
        found = self.gather(rows_B)
        if found is None:
            return None
        salts_B = self._salts.take(rows_B // self._rows_per_block)
        return found.view("<u4").reshape(len(rows_B), self._row_bytes // _SUM_BYTES) ^ masks(salts_B, rows_B)[:, None]
