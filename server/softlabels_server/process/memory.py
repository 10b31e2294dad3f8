"""Memory of a serving process: reply-sized blocks stay with the allocator and are returned when idle for a while.

By default glibc returns a large block to the system as soon as it is freed. A server that gathers half a megabyte a
hundred times a second then has every page of it mapped and zeroed each time: half of a batch's cost, measured.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

# malloc.h: parameters of `mallopt`.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

KEPT_BYTES = 64 << 20
"""Free memory that the process keeps at the end of its heap."""

MAX_HEAP_BLOCK_BYTES = 16 << 20
"""Blocks up to this size come from the heap; glibc accepts no more than 32 MiB."""


def configure_malloc() -> bool:
    """Make the allocator keep freed blocks of a reply's size; return whether it can."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False  # a C library other than glibc
    return bool(mallopt(_M_MMAP_THRESHOLD, MAX_HEAP_BLOCK_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES))


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
    """Returns freed memory to the system once much of it was idle for a while.

    A thousand streams that end leave holes all over the heap, which glibc alone never returns: it trims only the top.
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
        """Trim if more than `KEPT_BYTES` are free now and were at the last call; return whether it trimmed.

        Twice in a row, because memory that is free between two bursts of batches is better kept. Takes milliseconds.
        """
        if self._describe is None or self._trim is None:
            return False
        found = self._describe()
        # mallinfo counts pages already returned as free, so resident memory has to be compared too. Holes smaller than
        # a page are never returned; without subtracting what stayed last time, every other call would trim in vain.
        used_bytes = found.uordblks + found.hblkhd
        idle_bytes = max(0, _resident_bytes() - used_bytes)
        self._stuck_bytes = min(self._stuck_bytes, idle_bytes)
        is_large = min(found.fordblks, idle_bytes - self._stuck_bytes) > KEPT_BYTES
        must_trim, self._was_large = is_large and self._was_large, is_large
        if not must_trim:
            return False
        self._trim(ctypes.c_size_t(0))
        self._stuck_bytes = max(0, _resident_bytes() - used_bytes)
        return True


def _resident_bytes() -> int:
    """Return this process's own memory that is not swapped out, without mapped files."""
    with open("/proc/self/statm", encoding="ascii") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * mmap.PAGESIZE
