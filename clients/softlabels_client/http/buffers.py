"""Where do rows land that come over the network? In memory that is used again once nobody looks at it any more.

Memory just given by the operating system costs as much as filling it: every page is zeroed and mapped at first touch.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SMALLEST = 1 << 16
"""Below this the allocator keeps memory by itself."""

_MOST_KEPT_BYTES = 64 << 20


class Buffers:
    """Lends memory; takes it back when the last view of it is gone. Safe in threads and after fork.

    Args:
        most_kept_bytes: how much is kept that nobody uses.
    """

    def __init__(self, most_kept_bytes: int = _MOST_KEPT_BYTES) -> None:
        self._most = most_kept_bytes
        # Newest last. A deque, and no lock: one held while another thread forks would stay locked in the child.
        self._free: deque[NDArray[np.uint8]] = deque()

    def take(self, size_bytes: int) -> memoryview:
        """Memory of this size, of any content."""
        if size_bytes < _SMALLEST:
            return np.empty(size_bytes, dtype=np.uint8).data
        try:
            memory = self._free.pop()
        except IndexError:
            memory = _allocated(size_bytes)
        # Sizes of a trainer's batches hardly differ; what is too small, or far too large, makes way for what fits.
        if not size_bytes <= len(memory) <= 2 * size_bytes:
            memory = _allocated(size_bytes)
        lent = memory[:size_bytes].view(_Lent)
        lent.memory, lent.owner = memory, self
        return lent.data

    def give_back(self, memory: NDArray[np.uint8]) -> None:
        """Keep memory for the next one who asks."""
        if (len(self._free) + 1) * len(memory) <= self._most:
            self._free.append(memory)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self._most,))


class _Memory(np.ndarray[Any, Any]):
    """What is lent. A class of its own, because an array made of a `_Lent` would refer to plain memory below it.

    NumPy lets a new array refer to the base of what it is a view of, where that base is of the new array's own class;
    the `_Lent` would then go, and its memory be lent again, while the array still looks at it.
    """


def _allocated(size_bytes: int) -> NDArray[np.uint8]:
    return np.empty(size_bytes, dtype=np.uint8).view(_Memory)


class _Lent(np.ndarray[Any, Any]):
    """An array that every view of it keeps alive, and that hands its memory back when it goes."""

    memory: NDArray[np.uint8]
    owner: Buffers | None = None

    def __del__(self) -> None:
        if self.owner is not None:
            self.owner.give_back(self.memory)
