"""Address space: files mapped into one reserved run of virtual addresses, each guarded against truncation and writes.

Addresses for all files are reserved at once, which costs no memory; a file is mapped when it is first read.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable

import numpy as np

from softlabels.errors import ManifestError
from softlabels.mapping_guard import MAP_FAILED, MAP_FIXED, bus_errors, changes, file_watch, libc, map_zeros
from softlabels.store.safe_open import OpenFolder, open_committed

MAX_RESERVED_BYTES = 1 << 45
"""x86-64 and arm64 give a process 2^47 bytes of addresses; a quarter for one array leaves room for others."""

ALIGNMENT_BYTES = 2 << 20
"""Size of a huge page. Where the kernel keeps a file in huge pages, it maps them as such only if offset in the file and
address are aligned alike; a random row then misses one level of the processor's address cache (TLB) and not four."""

_PROT_NONE = 0
# Not in the mmap module of Python 3.11; Linux's value on x86-64 and arm64.
_MAP_NORESERVE = 0x4000 if os.uname().sysname == "Linux" else 0


class MappingLock:
    """Lock under which files are mapped: threads that met the same file would clear each other's marks without end.

    Attributes:
        held: the lock; a new one in a child process, where the thread that held it at the fork does not exist.
    """

    def __init__(self) -> None:
        self.held = threading.Lock()

    def after_fork(self) -> None:
        """Make a new lock in a child process."""
        self.held = threading.Lock()


mapping_lock = MappingLock()
os.register_at_fork(after_in_child=mapping_lock.after_fork)


class AddressSpace:
    """A reserved run of addresses that files are mapped into, read-only, with a mark for each block that may be read.

    Args:
        slots: number of files that will be mapped.
        slot_bytes: room for each; rounded up to the alignment.
        blocks_per_slot: parts of a file that are marked one by one.
    Attributes:
        buffer: the whole run, for NumPy; only what is mapped may be read.
        begin: [slots] position in `buffer` of each file's bytes; 0 where the file is not mapped.
        base: [slots × blocks_per_slot] a number other than 0 for each block that may be read; the owner's.
        generation: grows whenever marks of this space are cleared: what was verified meanwhile may have changed.
    Raises:
        ManifestError: more addresses than a process has, or is allowed (a limit on address space).
    """

    def __init__(self, *, slots: int, slot_bytes: int, blocks_per_slot: int) -> None:
        self._pitch = -(-slot_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES + ALIGNMENT_BYTES
        # The addresses before the first slot stay empty: no file begins at 0, so that 0 can mean "not mapped".
        self.size_bytes = ALIGNMENT_BYTES + self._pitch * slots
        if self.size_bytes > MAX_RESERVED_BYTES:
            raise ManifestError(f"{slots} files of {slot_bytes} bytes are more than a process can address")
        self._blocks, self._reserved_bytes = blocks_per_slot, self.size_bytes + ALIGNMENT_BYTES
        self.generation, self._libc = 0, libc
        self._files: dict[int, tuple[OpenFolder, str, int]] = {}
        self._is_guarded = bus_errors.install()
        try:
            # Zeros take no memory until they are written.
            self.begin = np.zeros(slots, dtype=np.int64)
            self.base = np.zeros(slots * blocks_per_slot, dtype=np.int64)
            # Inaccessible and without swap space: only the addresses are taken.
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
            reserved = libc.mmap(None, self._reserved_bytes, _PROT_NONE, flags, -1, 0)
            if reserved == MAP_FAILED:
                raise MemoryError(os.strerror(ctypes.get_errno()))
        except MemoryError as error:
            raise ManifestError(
                f"{slots} files of {slot_bytes} bytes in {blocks_per_slot} chunks each are more than this process may "
                f"address ({error}): see `ulimit -v`, or give shards larger chunks"
            ) from error
        self._reserved = reserved
        self._address = -(-reserved // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        buffer = (ctypes.c_char * self.size_bytes).from_address(self._address)
        # Read-only for NumPy too: a write into these pages, mapped with PROT_READ, would kill the process (SIGSEGV).
        self.buffer = memoryview(buffer).cast("B").toreadonly()
        bus_errors.register(self)

    def map(self, slot: int, folder: OpenFolder, inside: str, *, offset: int, length: int) -> int:
        """Map `length` bytes of a file of a store, from `offset` on, and return their position in `buffer`.

        Raises:
            TruncatedError: the file is missing or too short. ManifestError: it is not a plain file.
        """
        with mapping_lock.held:
            if self.begin[slot]:
                return int(self.begin[slot])  # another thread was first
            # A multiple of the huge page's size: both ends of a mapping must be aligned alike, see ALIGNMENT_BYTES.
            first = offset - offset % ALIGNMENT_BYTES
            descriptor = open_committed(folder, inside, min_bytes=offset + length)
            try:
                assert offset + length - first <= self._pitch, "MAP_FIXED would replace the next slot's mapping"
                begin = ALIGNMENT_BYTES + slot * self._pitch
                # Before the file is read for the first time: a write after that is noticed.
                file_watch.add(descriptor, self, slot)
                self._files[slot] = (folder, inside, offset + length)
                bus_errors.install()
                # No read counts that began on what was mapped here before: its marks were cleared, which `stable_read`
                # sees. And no other read is disturbed, as it would be by a change that is counted.
                size, flags = offset + length - first, mmap.MAP_SHARED | MAP_FIXED
                if libc.mmap(self._address + begin, size, mmap.PROT_READ, flags, descriptor, first) == MAP_FAILED:
                    raise OSError(ctypes.get_errno(), f"mapping {folder / inside}: {os.strerror(ctypes.get_errno())}")
            finally:
                # The mapping itself keeps the file open.
                os.close(descriptor)
            self.begin[slot] = begin + offset - first
            return begin + offset - first

    def invalidate(self, slot: int) -> None:
        """Clear the marks of a file, which has changed: it is opened, mapped and verified again before its next use."""
        # Marks first: a reader that took the old ones finds another count when it is done.
        self.base[slot * self._blocks : (slot + 1) * self._blocks] = 0
        self.begin[slot] = 0
        self.generation += 1
        changes.count += 1

    def invalidate_all(self) -> None:
        """Clear the marks of all files, without touching the memory of those that have none."""
        self.base, self.begin = np.zeros_like(self.base), np.zeros_like(self.begin)
        self.generation += 1
        changes.count += 1

    def mark(self, block: int, base: int, generation: int) -> bool:
        """Mark a block as readable, unless marks were cleared since `generation`; return whether it is."""
        # No call between the two lines: no other thread, nor a handler of a signal, clears the mark in between.
        if self.generation == generation and not changes.replacing:
            self.base[block] = base
            return True
        return False

    def check_sizes(self) -> None:
        """Clear the marks of files that became shorter, where no handler catches a read beyond the end of a file."""
        # One that is truncated between this look and the read still ends the process.
        if self._is_guarded:
            return
        for slot in np.flatnonzero(self.begin).tolist():
            folder, inside, size = self._files[slot]
            try:
                if os.stat(inside, dir_fd=folder.descriptor, follow_symlinks=False).st_size >= size:
                    continue
            except OSError:
                pass
            self.invalidate(slot)

    def replace_lost_page(self, address: int) -> bool:
        """Map a page of zeros at an address beyond the end of its file; return whether the address is in this space."""
        inside = address - self._address
        if not 0 <= inside < self.size_bytes:
            return False
        slot = (inside - ALIGNMENT_BYTES) // self._pitch
        return self._replace(slot, lambda: map_zeros(address))

    def _replace(self, slot: int, replace: Callable[[], bool]) -> bool:
        """Replace a part of a slot's mapping; return whether the system could."""
        # No lock: this may run in the handler of a signal. Marks are cleared before and after, since another thread may
        # verify a block in between and mark it; what is read meanwhile does not count, see `stable_read`.
        try:
            changes.replacing.append(slot)
            self.invalidate(slot)
            return replace()
        finally:
            self.invalidate(slot)
            changes.replacing.pop()

    def __del__(self) -> None:
        # The attribute is missing where `__init__` raised before the reservation.
        if hasattr(self, "_reserved"):
            self._libc.munmap(self._reserved, self._reserved_bytes)
