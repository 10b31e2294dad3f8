"""Receive buffers that are reused once no array refers to them any more.

Memory fresh from the operating system costs as much as filling it: every page is zeroed and mapped at first touch.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SMALLEST = 1 << 16
"""Smallest buffer reused; below it the allocator reuses memory by itself."""

_MOST_KEPT_BYTES = 64 << 20


class Buffers:
    """Pool of buffers; a buffer returns when the last view of it is gone. Safe in threads and after fork.

    Args:
        most_kept_bytes: limit of unused memory.
    """

    def __init__(self, most_kept_bytes: int = _MOST_KEPT_BYTES) -> None:
        self._most = most_kept_bytes
        # Newest last. A deque without a lock: a lock held while another thread forks would stay locked in the child.
        self._free: deque[NDArray[np.uint8]] = deque()

    def take(self, size_bytes: int) -> memoryview:
        """Return a buffer of this size, with arbitrary content."""
        if size_bytes < _SMALLEST:
            return np.empty(size_bytes, dtype=np.uint8).data
        try:
            memory = self._free.pop()
        except IndexError:
            memory = _allocated(size_bytes)
        # A trainer's batches hardly differ in size; a buffer too small or far too large is dropped for one that fits.
        if not size_bytes <= len(memory) <= 2 * size_bytes:
            memory = _allocated(size_bytes)
        lent = memory[:size_bytes].view(_Lent)
        lent.memory, lent.owner = memory, self
        return lent.data

    def give_back(self, memory: NDArray[np.uint8]) -> None:
        """Take a buffer back for later use."""
        if (len(self._free) + 1) * len(memory) <= self._most:
            self._free.append(memory)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self._most,))


class _Memory(np.ndarray[Any, Any]):
    """The memory of a buffer, as a subclass, so that arrays made of a `_Lent` refer to it and not to the memory below.

    NumPy makes a view refer to the base of its parent if that base has the view's own class. With a plain ndarray
    below, a view of a `_Lent` would refer past it; the `_Lent` would be collected and its memory reused under the view.
    """


def _allocated(size_bytes: int) -> NDArray[np.uint8]:
    return np.empty(size_bytes, dtype=np.uint8).view(_Memory)


class _Lent(np.ndarray[Any, Any]):
    """A buffer in use: kept alive by every view of it, and returned to the pool when collected."""

    memory: NDArray[np.uint8]
    owner: Buffers | None = None

    def __del__(self) -> None:
        if self.owner is not None:
            self.owner.give_back(self.memory)
