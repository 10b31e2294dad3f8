"""How is memory for replies kept from going back and forth between the process and the operating system?

By default glibc returns a large block the moment it is freed. A server that gathers half a megabyte a hundred times a
second then has every page of it zeroed and mapped a hundred times a second: half of a batch's cost, measured.
"""

from __future__ import annotations

import ctypes
import sys

# malloc.h: what `mallopt` calls its parameters.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

KEPT_BYTES = 64 << 20
"""Free memory that the process keeps at the end of its heap."""

LARGEST_KEPT_BYTES = 16 << 20
"""Blocks up to this size come from the heap; glibc accepts no more than 32 MiB."""


def keep_freed_memory() -> bool:
    """Have the allocator keep blocks of a reply's size; whether it understood."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False  # another C library than glibc
    return bool(mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES))
