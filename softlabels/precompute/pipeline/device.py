"""In which streams does a device work, so that its forward passes never wait for anything else?

On a CUDA device there are three lanes: inputs are copied in one, the teachers run in the device's current stream, and
all that follows (mean, encoding, audit, the copy to the host) runs in a third, beside the next batch's forward passes.
What waits for the device there, waits while it is busy. Elsewhere everything runs in order and the lanes do nothing.
"""

from __future__ import annotations

import gc
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor


class Lanes:
    """The streams of one device, and how long its teachers stood idle."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cuda = device.type == "cuda"
        self._copies = _stream(device) if self._cuda else None
        self._beside = _stream(device) if self._cuda else None
        self._ended: torch.cuda.Event | None = None
        self._gaps: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._began_s = time.perf_counter()
        self._idle_s = 0.0

    @property
    def pinned(self) -> bool:
        """Whether host memory is to be pinned, so that copies to and from it run beside the device's work."""
        return self._cuda

    def upload(self, inputs: Tensor) -> Tensor:
        """The inputs on the device: copied beside what runs there, and there before anything that follows needs it."""
        if self._copies is None:
            return inputs.to(self.device)
        main = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copies):
            copied = inputs.to(self.device, non_blocking=True)
        main.wait_stream(self._copies)
        copied.record_stream(main)
        return copied

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around the teachers' forward passes of one batch; the time between two of these is counted as idle."""
        if not self._cuda:
            yield
            return
        main = torch.cuda.current_stream(self.device)
        started = _point(main, timed=True)
        yield
        if self._ended is not None:
            self._gaps.append((self._ended, started))
            self._count_gaps()
        self._ended = _point(main, timed=True)

    def mark(self) -> torch.cuda.Event | None:
        """A point in the teachers' lane that `beside` can start from."""
        if not self._cuda:
            return None
        return _point(torch.cuda.current_stream(self.device))

    @contextmanager
    def beside(self, mark: torch.cuda.Event | None, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Run what follows after `mark`, beside later forward passes; `tensors` are what it needs of their lane."""
        if self._beside is None or mark is None:
            yield
            return
        self._beside.wait_event(mark)
        for tensor in tensors:
            tensor.record_stream(self._beside)
        with torch.cuda.stream(self._beside):
            yield

    def landed(self) -> torch.cuda.Event | None:
        """A point that the host can wait for: all copies to it that were begun so far are done then."""
        return None if self._beside is None else _point(self._beside)

    def synchronize(self) -> None:
        """Wait until all lanes are done."""
        if self._cuda:
            torch.cuda.synchronize(self.device)

    def starved(self, seconds: float) -> None:
        """Count time in which the host had no batch to give; on CUDA the device's own clock tells that."""
        if not self._cuda:
            self._idle_s += seconds

    def idle_share(self) -> float:
        """Share of the time so far in which no teacher ran, but for the last few batches."""
        return min(1.0, self._idle_s / max(1e-9, time.perf_counter() - self._began_s))

    def _count_gaps(self) -> None:
        while self._gaps and self._gaps[0][1].query():  # type: ignore[no-untyped-call]
            ended, started = self._gaps.popleft()
            self._idle_s += max(0.0, ended.elapsed_time(started)) / 1e3


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _point(stream: torch.cuda.Stream, *, timed: bool = False) -> torch.cuda.Event:
    """A point in what a stream has been given so far."""
    event = torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


# MERGED from softlabels.precompute.pipeline.device: How much memory is there for a run, how much did it take, and was it memory that it ran out of?


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
