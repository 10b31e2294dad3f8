"""The compute device: its choice, its CUDA streams and idle time, and its memory."""

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

from softlabels.errors import JobError

_CPU_ALLOCATOR_MESSAGE = "can't allocate memory"
"""torch's words for main memory, in a plain RuntimeError (c10/core/impl/alloc_cpu.cpp)."""

_DEVICE_SHARE = 0.85
"""Usable share of a device's free memory: the rest is lost to fragmentation and to libraries that allocate directly."""

_MAIN_SHARE = 0.5
"""Usable share of free main memory, which other processes need too."""


def choose_device(name: str) -> torch.device:
    """Return the device of that name; `auto` takes an accelerator where there is one.

    Raises:
        JobError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        # A device that is not here is refused only when something is allocated on it; a torch built without CUDA then
        # raises AssertionError.
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise JobError(f"device {name!r} cannot be used here: {error}") from error
    return device


class DeviceStreams:
    """The streams of one device, and the time in which no teacher ran.

    On CUDA there are three: inputs are copied in one, teachers run in the device's current stream, and what follows
    (mean, encoding, audit, the copy to the host) runs in a third, beside the next batch's forward passes: a wait for
    the device there does not leave it idle. On other devices everything runs in order and these methods do nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pinned = self._cuda = device.type == "cuda"  # copies from pinned memory overlap with the device's work
        self._copy = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]
        self._encode = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]
        self._last_end: torch.cuda.Event | None = None
        self._gaps: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._began_s = time.perf_counter()
        self._idle_s = 0.0

    def pin(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the host pinned, where that lets copies overlap with the device's work."""
        return tensor.pin_memory() if self.pinned else tensor

    def upload(self, inputs: Tensor) -> Tensor:
        """Copy inputs to the device in the copy stream; the current stream waits for them."""
        if self._copy is None:
            return inputs.to(self.device)
        main = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copy):
            copied = inputs.to(self.device, non_blocking=True)
        main.wait_stream(self._copy)
        # Else the allocator could hand this memory to the next upload while the teachers still read it.
        copied.record_stream(main)
        return copied

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Enclose the forward passes of one batch; the time between two of these counts as idle."""
        if not self._cuda:
            yield
            return
        main = torch.cuda.current_stream(self.device)
        started = _record(main, timed=True)
        yield
        if self._last_end is not None:
            self._gaps.append((self._last_end, started))
            self._count_gaps()
        self._last_end = _record(main, timed=True)

    def mark(self) -> torch.cuda.Event | None:
        """Return an event in the teachers' stream, for `encoding` to wait for."""
        return _record(torch.cuda.current_stream(self.device)) if self._cuda else None

    @contextmanager
    def encoding(self, after: torch.cuda.Event | None, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Run what is enclosed in the encoding stream, after an event of the teachers' stream.

        Args:
            tensors: outputs of the teachers' stream that are read here.
        """
        if self._encode is None or after is None:
            yield
            return
        self._encode.wait_event(after)
        # As in `upload`: these were allocated in the teachers' stream, which could reuse their memory while this stream
        # still reads it.
        for tensor in tensors:
            tensor.record_stream(self._encode)
        with torch.cuda.stream(self._encode):
            yield

    def copies_done(self) -> torch.cuda.Event | None:
        """Return an event after all copies to the host that were begun so far, for the host to wait for."""
        return None if self._encode is None else _record(self._encode)

    def synchronize(self) -> None:
        """Wait for all streams."""
        if self._cuda:
            torch.cuda.synchronize(self.device)

    def add_starved(self, seconds: float) -> None:
        """Count time in which the host had no batch ready; on CUDA the device's own clock measures that."""
        if not self._cuda:
            self._idle_s += seconds

    def idle_share(self) -> float:
        """Return the share of the time so far in which no teacher ran, not counting the last few batches."""
        return min(1.0, self._idle_s / max(1e-9, time.perf_counter() - self._began_s))

    def _count_gaps(self) -> None:
        # Finished events alone: `elapsed_time` raises for others, and waiting for them would stall the host.
        while self._gaps and self._gaps[0][1].query():  # type: ignore[no-untyped-call]
            ended, started = self._gaps.popleft()
            self._idle_s += max(0.0, ended.elapsed_time(started)) / 1e3


class MemoryMeter:
    """Measures a device's memory; the process's main memory where the device is the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(device)

    def peak_bytes(self) -> int:
        """Return the most that was allocated so far, weights included."""
        if self._cuda:
            return torch.cuda.max_memory_allocated(self._device)
        # Not `ru_maxrss`: a process that a large one forked begins with the peak of that one.
        return _kilobytes("/proc/self/status", "VmHWM") * 1024

    def limit_bytes(self) -> int:
        """Return how much may be allocated in all: what is allocated already, and most of what is free."""
        if self._cuda:
            # To CUDA, memory in torch's cache is not free.
            release_cached()
            free, _ = torch.cuda.mem_get_info(self._device)
            return torch.cuda.memory_allocated(self._device) + int(_DEVICE_SHARE * free)
        return self.peak_bytes() + int(_MAIN_SHARE * 1024 * _kilobytes("/proc/meminfo", "MemAvailable"))


def release_cached() -> None:
    """Return cached memory to the device: blocks that a larger batch left behind do not fit a smaller one."""
    # First, because `empty_cache` returns no memory of tensors that a reference cycle still keeps alive.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, says that memory ran out."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and _CPU_ALLOCATOR_MESSAGE in str(error):
            return True
        error = error.__cause__
    return False


def _record(stream: torch.cuda.Stream, *, timed: bool = False) -> torch.cuda.Event:
    """Return an event after all that the stream was given so far."""
    event = torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def _kilobytes(path: str, name: str) -> int:
    """Return a figure that Linux gives in kB; see proc(5)."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path(path).read_text(encoding="ascii"))
    assert found is not None, f"{path} has no line {name}"
    return int(found.group(1))
