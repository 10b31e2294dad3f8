"""Batch-size search: doubling on the device, to the smallest size that is nearly as fast as any.

Each size is tried as the run would use it: two batches in flight, through mean, encoding and copy. Doubling ends where
the next size would not fit in memory, where the first shard has no more inputs, or where two doublings in a row made
nothing faster.
"""

from __future__ import annotations

import math
import time
from itertools import pairwise

from torch import Tensor

from softlabels.errors import JobError, TeacherError
from softlabels.precompute.pipeline.device import MemoryMeter, is_out_of_memory, release_cached
from softlabels.precompute.pipeline.device_step import DeviceStep
from softlabels.precompute.pipeline.inference import as_tensor
from softlabels.precompute.row_batches import RowBatch
from softlabels.store.chunks import shard_rows

_GAIN = 1.03
"""Speed-up that counts for a doubling: less is noise on a busy machine."""

_NEARLY = 0.95
"""Share of the best speed to accept: the smallest size that reaches it needs the least memory."""

_MEASURED_S = 0.05
"""Time to measure a size for, long enough that neither clock nor scheduler decides."""

_LONG_PASS_S = 2.0
"""A first pass this long is measured well enough: its warm-up is small beside it."""

_MOST_PASSES = 1000


def find_batch_size(step: DeviceStep, *, limit_gib: float | None) -> int:
    """Return the batch size for a run, measured on inputs of the first shard.

    Args:
        step: device step of the run.
        limit_gib: most device memory to use (on the CPU: of the process), peaks included; most of what is free when
            None.
    Raises:
        JobError: one input exceeds the limit. TeacherError: one input exceeds the memory there is.
    """
    meter = MemoryMeter(step.streams.device)
    limit = meter.limit_bytes() if limit_gib is None else int(limit_gib * (1 << 30))
    before, speeds, size = meter.peak_bytes(), dict[int, float](), 1
    while True:
        batch = next(step.ensemble.rows.batches(shard_rows(step.plan, 0), size))
        if len(batch.inputs) < size:
            break  # the first shard has no more inputs
        inputs_per_s = _speed_if_it_fits(step, batch)
        peak = meter.peak_bytes()
        if inputs_per_s is None or peak > limit:
            break
        speeds[size] = inputs_per_s
        # Memory beyond the weights doubles with the size: a size that cannot fit is not tried.
        if 2 * peak - before > limit or _stalls([*speeds.values()][-3:]):
            break
        size *= 2
    if not speeds:
        asked = f"the limit of {limit_gib} GiB (memory_limit_gib in [run])" if limit_gib else "what is free"
        raise (JobError if limit_gib else TeacherError)(
            f"a single input takes more memory than {asked}: allow more, use half precision (`precision` in [run]), or "
            "a smaller teacher"
        )
    return min(size for size, speed in speeds.items() if speed >= _NEARLY * max(speeds.values()))


def _speed_if_it_fits(step: DeviceStep, batch: RowBatch) -> float | None:
    """Return inputs per second, or None where memory does not suffice."""
    try:
        return _speed(step, batch)
    except (RuntimeError, MemoryError, TeacherError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside of `except`, where the error's traceback would keep the tensors alive.
    release_cached()
    return None


def _speed(step: DeviceStep, batch: RowBatch) -> float:
    inputs = step.streams.pin(as_tensor(batch.inputs))
    spent_s = _time_passes(step, batch, inputs, passes=1)
    if spent_s > _LONG_PASS_S:
        return len(batch.inputs) / spent_s
    spent_s = _time_passes(step, batch, inputs, passes=2)  # the first one was the warm-up
    passes = min(_MOST_PASSES, math.ceil(2 * _MEASURED_S / spent_s))
    return passes * len(batch.inputs) / _time_passes(step, batch, inputs, passes=passes)


def _time_passes(step: DeviceStep, batch: RowBatch, inputs: Tensor, *, passes: int) -> float:
    began_s = time.perf_counter()
    before = step.start(batch, inputs)
    for _ in range(passes - 1):
        started = step.start(batch, inputs)
        step.finish(before, None)
        before = started
    step.finish(before, None)
    step.streams.synchronize()
    return time.perf_counter() - began_s


def _stalls(speeds: list[float]) -> bool:
    return len(speeds) == 3 and all(after < _GAIN * before for before, after in pairwise(speeds))
