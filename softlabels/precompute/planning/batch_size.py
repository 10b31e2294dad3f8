"""How many inputs does a forward pass take? Found on the device, by doubling: as few as are nearly as fast as any.

A size is tried as the run itself would use it, two batches in flight, through mean, encoding and copy. Doubling ends
where memory would not do for the next size, where the first shard has no more inputs, or where two doublings in a row
made nothing faster.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from softlabels.errors import JobError, TeacherError
from softlabels.precompute.pipeline.device import MemoryMeter, is_out_of_memory, release_cached
from softlabels.precompute.pipeline.device_step import DevicePass, Started
from softlabels.precompute.pipeline.inference import host_tensor
from softlabels.precompute.row_batches import RowBatch, RowMaker
from softlabels.store.chunks import shard_rows

_GAIN = 1.03
"""What a doubling must bring to count as faster: less is the noise of a busy machine."""

_NEARLY = 0.95
"""Of the best speed found: the smallest size that reaches it is taken, since it holds less memory."""

_MEASURED_S = 0.05
"""A size is measured for about so long, so that neither clock nor scheduler decides."""

_WARM_S = 2.0
"""A first pass that took so long is measured well enough: what warming up it did is small beside it."""

_MOST_PASSES = 1000


def find_batch_size(device_pass: DevicePass, maker: RowMaker, *, limit_gib: float | None) -> int:
    """The batch size of a run.

    Args:
        device_pass: of the run, with its teachers.
        maker: of the run's rows; inputs are those of the first shard.
        limit_gib: what the run may take of the device's memory (on the CPU: the process, of main memory), peaks
            included; most of what is free when None.
    Raises:
        JobError: one input takes more than the limit. TeacherError: more than there is.
    """
    meter = MemoryMeter(device_pass.lanes.device)
    limit = meter.free_bytes() if limit_gib is None else int(limit_gib * (1 << 30))
    before, speeds, size = meter.peak_bytes(), dict[int, float](), 1
    while (batch := _batch(device_pass, maker, size)) is not None:
        inputs_per_s = _speed_if_it_fits(device_pass, batch)
        peak = meter.peak_bytes()
        if inputs_per_s is None or peak > limit:
            break
        speeds[size] = inputs_per_s
        # What a size takes beyond the weights doubles with it: the next one is not begun where it cannot fit.
        if 2 * peak - before > limit or _stalls(list(speeds.values())):
            break
        size *= 2
    if not speeds:
        asked = f"the limit of {limit_gib} GiB (memory_limit_gib of [run])" if limit_gib else "what is free"
        raise (JobError if limit_gib else TeacherError)(
            f"a single input takes more memory than {asked}: allow more, use half precision (`precision` of [run]), or "
            "a smaller teacher"
        )
    return min(size for size, speed in speeds.items() if speed >= _NEARLY * max(speeds.values()))


class _Nowhere:
    """Where the rows of a trial go: to the host, and no further."""

    def land(self, batch: RowBatch, encoded: Mapping[str, Tensor]) -> int:
        """Copied and dropped."""
        for tensor in encoded.values():
            tensor.cpu()
        return 0

    def land_figures(self, packed: Tensor) -> None:
        """Copied and dropped."""
        packed.cpu()

    def landing(self, done: torch.cuda.Event | None) -> None:
        """Nobody waits."""


def _batch(device_pass: DevicePass, maker: RowMaker, size: int) -> RowBatch | None:
    """The first batch of this size; None where the first shard has no such one."""
    batch = next(maker.batches(shard_rows(device_pass.plan, 0), size))
    return batch if len(batch.inputs) == size else None


def _speed_if_it_fits(device_pass: DevicePass, batch: RowBatch) -> float | None:
    """Inputs a second; None where memory does not do."""
    try:
        return _speed(device_pass, batch)
    except (RuntimeError, MemoryError, TeacherError) as error:
        if not is_out_of_memory(error):
            raise
    release_cached()
    return None


def _speed(device_pass: DevicePass, batch: RowBatch) -> float:
    inputs = host_tensor(batch.inputs)
    if device_pass.lanes.pinned:
        inputs = inputs.pin_memory()
    spent_s = _seconds(device_pass, batch, inputs, passes=1)
    if spent_s > _WARM_S:
        return len(batch.inputs) / spent_s
    spent_s = _seconds(device_pass, batch, inputs, passes=2)  # the first one warmed up
    passes = min(_MOST_PASSES, math.ceil(2 * _MEASURED_S / spent_s))
    return passes * len(batch.inputs) / _seconds(device_pass, batch, inputs, passes=passes)


def _seconds(device_pass: DevicePass, batch: RowBatch, inputs: Tensor, *, passes: int) -> float:
    began_s = time.perf_counter()
    before: Started | None = None
    for _ in range(passes):
        started = device_pass.start(batch, inputs)
        if before is not None:
            device_pass.finish(before, _Nowhere())
        before = started
    if before is not None:
        device_pass.finish(before, _Nowhere())
    device_pass.lanes.synchronize()
    return time.perf_counter() - began_s


def _stalls(speeds: list[float]) -> bool:
    return len(speeds) > 2 and speeds[-1] < _GAIN * speeds[-2] and speeds[-2] < _GAIN * speeds[-3]
