"""How much memory is there for a run, how much did it take, and was it memory that it ran out of?"""

from __future__ import annotations

import gc
import re
from pathlib import Path

import torch

_CPU_WORDS = "can't allocate memory"
"""How torch says it of main memory, in a plain RuntimeError (c10/core/impl/alloc_cpu.cpp)."""

_DEVICE_SHARE = 0.85
"""Of what is free on a device: the rest is lost between blocks, and to libraries that allocate by themselves."""

_MAIN_SHARE = 0.5
"""Of what is free of main memory, which others need too."""


class MemoryMeter:
    """What a run takes of a device's memory; of the process's main memory where the device is the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(device)

    def peak_bytes(self) -> int:
        """The most that was taken so far, weights included."""
        if self._cuda:
            return torch.cuda.max_memory_allocated(self._device)
        # Not `ru_maxrss`: a process that was started by a large one begins with that one's.
        return _kilobytes("/proc/self/status", "VmHWM") * 1024

    def free_bytes(self) -> int:
        """What may be taken in all: what is taken already, and most of what is free."""
        if self._cuda:
            release_cached()
            free, _ = torch.cuda.mem_get_info(self._device)
            return torch.cuda.memory_allocated(self._device) + int(_DEVICE_SHARE * free)
        return self.peak_bytes() + int(_MAIN_SHARE * 1024 * _kilobytes("/proc/meminfo", "MemAvailable"))


def release_cached() -> None:
    """Give back what was freed and is kept for later: memory that a larger batch took comes in the wrong pieces."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, says that there is no memory left."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and _CPU_WORDS in str(error):
            return True
        error = error.__cause__
    return False


def _kilobytes(path: str, name: str) -> int:
    """A figure that Linux gives in kB; see proc(5)."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path(path).read_text(encoding="ascii"))
    assert found is not None, f"{path} says nothing of {name}"
    return int(found.group(1))
