"""Was it memory that a batch ran out of?"""

from __future__ import annotations

import torch

_CPU_WORDS = "can't allocate memory"
"""How torch says it of main memory, in a plain RuntimeError (c10/core/impl/alloc_cpu.cpp)."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, says that the device has no memory left."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and _CPU_WORDS in str(error):
            return True
        error = error.__cause__
    return False
