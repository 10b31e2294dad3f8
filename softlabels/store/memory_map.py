"""Memory-mapped arrays: shard files in one run of virtual addresses, so that one NumPy index gathers from all of them.

Addresses for all shards are reserved at once, which costs no memory; a shard's file is mapped when a row of it is first
read. A row's address is then arithmetic, and a batch over any number of shards is one gather without a second copy:
20,000 batches a second of 256 × 2,000 B where `memmap[ids]` makes 16,000.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import ManifestError
from softlabels.manifest import ArraySpec, ShardSpec
from softlabels.store.chunks import CHECKSUM_BYTES, Part, chunk_stride
from softlabels.store.containers import StoreContainer
from softlabels.store.safe_open import open_committed

MAX_RESERVED_BYTES = 1 << 45
"""x86-64 and arm64 give a process 2^47 bytes of addresses; a quarter for one array leaves room for others."""

ALIGNMENT_BYTES = 2 << 20
"""Size of a huge page. Where the kernel keeps a file in huge pages, it maps them as such only if offset in the file and
address are aligned alike; a random row then misses one level of the processor's address cache (TLB) and not four."""

MIN_SUMMED_ROW_BYTES, MAX_SUMMED_ROWS = 256, 1 << 25
"""Sums are kept for rows of at least this size, and at most this many of them: 8 bytes each, 256 MiB in all."""

_PROT_NONE = 0
# Neither flag is in the mmap module of Python 3.11. 0x4000 is Linux's value on x86-64 and arm64; 0x10 is macOS's too.
_MAP_NORESERVE = 0x4000 if os.uname().sysname == "Linux" else 0
_MAP_FIXED = 0x10
# mmap reports an error as MAP_FAILED, (void *) -1, which ctypes returns as an unsigned integer.
_FAILED = ctypes.c_void_p(-1).value


def _libc() -> ctypes.CDLL:
    # Python's mmap module can neither reserve addresses nor map at a given one.
    libc = ctypes.CDLL(None, use_errno=True)
    # Types are declared, since ctypes takes others for C ints: addresses and offsets would be cut to 32 bits.
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


class AddressSpace:
    """A reserved run of addresses that files are mapped into, read-only.

    Args:
        slots: number of files that will be mapped.
        slot_bytes: room for each; rounded up to the alignment.
    Raises:
        MemoryError: the operating system grants no such run (a limit on address space).
    """

    def __init__(self, *, slots: int, slot_bytes: int) -> None:
        self._libc = _libc()
        self.pitch = -(-slot_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        # The addresses before the first slot stay empty: no file begins at 0, so that 0 can mean "not mapped".
        self.size_bytes = ALIGNMENT_BYTES + self.pitch * slots
        self._reserved_bytes = self.size_bytes + ALIGNMENT_BYTES
        # Inaccessible and without swap space: only the addresses are taken.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        reserved = self._libc.mmap(None, self._reserved_bytes, _PROT_NONE, flags, -1, 0)
        if reserved == _FAILED:
            raise MemoryError(f"no {self._reserved_bytes} bytes of addresses: {os.strerror(ctypes.get_errno())}")
        self._reserved: int | None = reserved
        self._address = -(-reserved // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        buffer = (ctypes.c_char * self.size_bytes).from_address(self._address)
        # Every view of these addresses keeps this object, and so the mapping, alive.
        buffer._softlabels_space = self  # type: ignore[attr-defined]
        # Read-only for NumPy too: a write into these pages, mapped with PROT_READ, would kill the process (SIGSEGV).
        self.buffer = memoryview(buffer).cast("B").toreadonly()

    def map(self, slot: int, root: Path, inside: str, *, offset: int, length: int) -> int:
        """Map `length` bytes of a file of the store at `root`, from `offset` on. Mapping it again changes nothing.

        Returns:
            Position of those bytes, relative to the start of the whole run.
        Raises:
            TruncatedError: the file is missing or too short. ManifestError: it is not a plain file.
        """
        # A multiple of the huge page's size: both ends of a mapping must be aligned alike, see ALIGNMENT_BYTES.
        first = offset - offset % ALIGNMENT_BYTES
        # Reading past the end of a mapped file kills the process (SIGBUS), so the size is checked first.
        descriptor = open_committed(root, inside, min_bytes=offset + length)
        try:
            assert self._reserved is not None
            assert offset + length - first <= self.pitch, "MAP_FIXED would replace the next slot's mapping"
            begin = ALIGNMENT_BYTES + slot * self.pitch
            address = self._libc.mmap(
                self._address + begin,
                offset + length - first,
                mmap.PROT_READ,
                mmap.MAP_SHARED | _MAP_FIXED,
                descriptor,
                first,
            )
            if address == _FAILED:
                raise OSError(ctypes.get_errno(), f"mapping {root / inside}: {os.strerror(ctypes.get_errno())}")
        finally:
            # The mapping itself keeps the file open.
            os.close(descriptor)
        return begin + offset - first

    def __del__(self) -> None:
        # The attribute is missing where `__init__` raised before the reservation.
        if getattr(self, "_reserved", None) is not None:
            self._libc.munmap(self._reserved, self._reserved_bytes)
            self._reserved = None


class MappedArray:
    """One array of a store across all its shards.

    Rows are gathered only from verified chunks: mapped, and found to be what was written.

    """

    def __init__(self, spec: ArraySpec, shards: ShardSpec) -> None:
        self._dtype, self._row_shape, self._row_bytes = np.dtype(spec.dtype), spec.row_shape, spec.row_bytes
        self._rows_per_chunk = shards.rows_per_chunk
        self._chunks_per_shard = shards.rows_per_shard // shards.rows_per_chunk
        self._stride = chunk_stride(spec, shards.rows_per_chunk)
        shard_bytes = self._stride * self._chunks_per_shard + ALIGNMENT_BYTES
        if shards.count * (shard_bytes + ALIGNMENT_BYTES) > MAX_RESERVED_BYTES:
            raise ManifestError(f"{shards.count} shards of {shard_bytes} bytes are more than a process can address")
        try:
            self._space = AddressSpace(slots=shards.count, slot_bytes=shard_bytes)
            # Zeros take no memory until they are written; a chunk's address is never zero.
            self._begin = np.zeros(shards.count, dtype=np.int64)
            self._base = np.zeros(shards.count * self._chunks_per_shard, dtype=np.int64)
        except MemoryError as error:
            raise ManifestError(
                f"{shards.count} shards of {shard_bytes} bytes in {self._chunks_per_shard} chunks each are more than "
                f"this process may address ({error}): see `ulimit -v`, or give shards larger chunks"
            ) from error
        summed = self._row_bytes % 8 == 0 and self._row_bytes >= MIN_SUMMED_ROW_BYTES
        rows = shards.count * shards.rows_per_shard
        self._sums = np.zeros(rows, dtype=np.uint64) if summed and rows <= MAX_SUMMED_ROWS else None
        # A row-sized item at every byte address: overlapping on purpose, so that an address is an index.
        count, item = self._space.size_bytes - self._row_bytes + 1, np.dtype((np.void, self._row_bytes))
        self._items: NDArray[Any] = np.ndarray((count,), dtype=item, buffer=self._space.buffer, strides=(1,))
        self._parts: dict[int, Part] = {}

    def verify(self, chunk: int, part_of: Callable[[int], Part], root: Path, container: StoreContainer) -> bool:
        """Allow rows of a chunk, counted through the whole store, to be gathered if it is what was written.

        Args:
            part_of: returns the location of a shard's rows; called when the shard's file is not mapped yet.
        """
        shard, local = divmod(chunk, self._chunks_per_shard)
        # Two threads may do this at once, with the same result. A lock that is held while another thread forks would
        # stay locked in the child.
        if (part := self._parts.get(shard)) is None:
            part = part_of(shard)
            length = part.size_bytes(self._rows_per_chunk)
            self._begin[shard] = self._space.map(shard, root, part.path, offset=part.offset, length=length)
            # After `_begin`, which another thread reads as soon as it finds the part.
            self._parts[shard] = part
        begin = int(self._begin[shard]) + local * self._stride
        found = np.frombuffer(self._space.buffer[begin : begin + self._stride], dtype=np.uint8)
        # Against the receipt as well as against itself: a sound chunk may be a copy of another one.
        if found[-CHECKSUM_BYTES:].tobytes() != part.checksum(local) or not container.is_chunk_intact(found):
            return False
        first = chunk * self._rows_per_chunk
        if self._sums is not None:
            # Sums of the bytes that were verified just now: what is sent later must still add up to them.
            # Words may be unaligned, since 4 bytes of checksum follow each chunk; NumPy reads those correctly.
            words = found[:-CHECKSUM_BYTES].reshape(self._rows_per_chunk, -1).view("<u8")
            self._sums[first : first + self._rows_per_chunk] = words.sum(axis=1, dtype=np.uint64)
        # Last, since another thread gathers from the chunk as soon as its base is set. Less the bytes of all rows
        # before the chunk, so that a row's address is `base[chunk] + row * row_bytes`.
        self._base[chunk] = begin - first * self._row_bytes
        return True

    def unverified(self, rows_B: NDArray[np.int64]) -> list[int]:
        """Return the chunks of these rows that are not verified yet, in order, each once."""
        chunks = np.unique(rows_B // self._rows_per_chunk)
        return [int(chunk) for chunk in chunks[self._base[chunks] == 0]]

    def gather(self, rows_B: NDArray[np.int64]) -> NDArray[Any] | None:
        """Copy rows, in the order asked.

        Args:
            rows_B: row numbers of the store, none below zero.
        Returns:
            [B, *row_shape]; None when one of the rows is in a chunk that is not verified.
        """
        # `take` copies, so that adding in place below does not change the table.
        address_B = self._base.take(rows_B // self._rows_per_chunk)
        if not address_B.all():
            return None
        address_B += rows_B * self._row_bytes
        return self._items[address_B].view(self._dtype).reshape(len(rows_B), *self._row_shape)

    def word_sum(self, rows_B: NDArray[np.int64]) -> int | None:
        """Return the sum of gathered rows' 64-bit words, as they were when verified; None where sums are not kept."""
        return None if self._sums is None else int(self._sums.take(rows_B).sum(dtype=np.uint64))
