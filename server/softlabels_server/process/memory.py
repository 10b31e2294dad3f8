"""How is memory for replies kept from going back and forth between process and system, and given back in the end?

By default glibc returns a large block the moment it is freed. A server that gathers half a megabyte a hundred times a
second then has every page of it zeroed and mapped a hundred times a second: half of a batch's cost, measured.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

# malloc.h: what `mallopt` calls its parameters.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

KEPT_BYTES = 64 << 20
"""Free memory that the process keeps at the end of its heap."""

LARGEST_KEPT_BYTES = 16 << 20
"""Blocks up to this size come from the heap; glibc accepts no more than 32 MiB."""


def configure_malloc() -> bool:
    """Have the allocator keep blocks of a reply's size; whether it understood."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False  # another C library than glibc
    return bool(mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES))


class _Mallinfo(ctypes.Structure):
    """malloc.h: `struct mallinfo2`."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


class HeapTrimmer:
    """Freed memory that the allocator holds, given back once there was much of it for a while.

    A thousand streams that end leave holes all over the heap, which glibc alone never returns: it trims the top.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._describe = getattr(library, "mallinfo2", None)  # glibc 2.33
        self._trim = getattr(library, "malloc_trim", None)
        self._was_large = False
        self._stuck_bytes = 0
        if self._describe is not None:
            self._describe.restype = _Mallinfo
            self._describe.argtypes = ()

    def trim_if_idle(self) -> bool:
        """Give it back if it was more than `KEPT_BYTES` the last time too; whether that was done. Takes milliseconds.

        Twice, because memory that is free between two bursts of batches is better kept.
        """
        if self._describe is None or self._trim is None:
            return False
        found = self._describe()
        # Pages that went back already count as free too, so that what is resident has to be looked at. Holes smaller
        # than a page never go back; without what stayed the last time, every other look would trim in vain.
        used_bytes = found.uordblks + found.hblkhd
        idle_bytes = max(0, _resident_bytes() - used_bytes)
        self._stuck_bytes = min(self._stuck_bytes, idle_bytes)
        is_large = min(found.fordblks, idle_bytes - self._stuck_bytes) > KEPT_BYTES
        give_back, self._was_large = is_large and self._was_large, is_large
        if not give_back:
            return False
        self._trim(ctypes.c_size_t(0))
        self._stuck_bytes = max(0, _resident_bytes() - used_bytes)
        return True


def _resident_bytes() -> int:
    """Memory of this process's own that is not swapped out; mapped files left out."""
    with open("/proc/self/statm", encoding="ascii") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * mmap.PAGESIZE
