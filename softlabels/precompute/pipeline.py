"""How do many shards flow through one device? Inputs are loaded, computed and written by three stages at a time.

    loader thread            this thread                        writer thread
    claim a shard            queue copy and forward passes      wait for the last copy
    take, hash, pin   ──►    of a batch; then mean, encoding,   checksums, files, receipt
    batch by batch    2      audit and copy of the one before   ──► the claim is let go

At most `_CLAIMED` shards are held at a time: one that is written, one that is computed, one whose first inputs are
loaded. A shard is claimed before its first batch is loaded and held until it is committed. Whatever goes wrong in any
stage stops them all; shards that are committed stay, the claims of all others are let go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from torch import Tensor

from softlabels.audit import Audit
from softlabels.errors import ShardClaimedError, TeacherError
from softlabels.precompute.answers import audit_temperatures, host_tensor
from softlabels.precompute.device_pass import DevicePass, Started
from softlabels.precompute.memory import is_out_of_memory, release_cached
from softlabels.precompute.rows import RowBatch, RowMaker
from softlabels.precompute.shards import ShardWork
from softlabels.precompute.stages import Channel, Halt, HaltedError, Slots, Stage
from softlabels.progress import Progress
from softlabels.store.writer import StoreWriter

_CLAIMED = 3
_LOADED_BATCHES = 2
"""Batches that wait for the device: one more than it takes at a time, so that one slow batch does not starve it."""

_PATIENCE_S = 10.0
"""How long a run that stops waits for a transfer set that is in the middle of something."""

Committed = Callable[[ShardWork, Audit], None]
"""Told, in the writer's thread, of every shard as soon as it exists."""

Halved = Callable[[int], None]
"""Told of a batch size that the run went down to."""


def compute_shards(
    writer: StoreWriter,
    maker: RowMaker,
    device_pass: DevicePass,
    shards: Sequence[int],
    *,
    batch_size: int,
    progress: Progress,
    committed: Committed | None,
    halved: Halved,
) -> None:
    """Compute these shards, but for those that other processes hold or have committed.

    Where the device's memory does not do for a batch, the batch size is halved for good and the shards in work begin
    anew with it, so that each shard is computed in batches of one size.

    Args:
        writer: of the store; maker: of its rows; device_pass: of its plan.
        batch_size: inputs of a forward pass.
        progress: rows as they are computed.
        committed: told of every shard that this run wrote, if anybody is.
        halved: told of a batch size that had to be halved.
    Raises:
        SoftLabelsError, OSError: of whichever stage failed first. TeacherError: not even one input fits.
    """
    left, halt = list(shards), Halt()
    try:
        with _Writing(halt, committed) as writing:
            while True:
                with _Loading(writer, maker, device_pass, left, batch_size, writing, halt, progress) as loading:
                    fits = _all_fit(loading, device_pass, writing, progress)
                if fits:
                    break
                batch_size = _halve(batch_size, progress)
                halved(batch_size)
                left = [shard for shard in left if shard not in writing.handed_over]
    except HaltedError:
        halt.raise_error()  # another stage's error is what stopped this one
        raise


def _all_fit(loading: _Loading, device_pass: DevicePass, writing: _Writing, progress: Progress) -> bool:
    """Compute all batches that come; False where the device's memory does not do for one."""
    try:
        _compute_all(loading, device_pass, writing, progress)
    except (RuntimeError, MemoryError, TeacherError) as error:
        if not is_out_of_memory(error):
            raise
    else:
        return True
    return False  # outside of `except`: the error holds on to the very tensors that are too many


def _compute_all(loading: _Loading, device_pass: DevicePass, writing: _Writing, progress: Progress) -> None:
    before: tuple[ShardWork, Started] | None = None

    def finish() -> None:
        if before is not None:
            work, started = before
            device_pass.finish(started, work)
            progress.advance(started.batch.rows)
            if work.complete:
                writing.hand_over(work)

    for loaded in loading:
        try:
            started = device_pass.start(loaded.batch, loaded.inputs)
        except Exception:
            finish()  # what came before the fault is kept
            raise
        finish()
        before = loaded.work, started
    finish()
    loading.raise_error()


def _halve(batch_size: int, progress: Progress) -> int:
    release_cached()
    if batch_size == 1:
        raise TeacherError(
            "the device's memory does not do for a single input: use a device with more of it, half precision "
            "(`precision` of [run]), or a smaller teacher"
        )
    progress.note(f"out of memory: batches of {batch_size // 2} from here on, whose kernels may round differently")
    return batch_size // 2


@dataclass(frozen=True, kw_only=True, eq=False)
class _Loaded:
    """A batch on the host, and the shard that it belongs to."""

    work: ShardWork
    batch: RowBatch
    inputs: Tensor


class _Writing:
    """The writer's stage; left without an error, it waits until everything is committed."""

    def __init__(self, halt: Halt, committed: Committed | None) -> None:
        self._halt, self._committed = halt, committed
        self._shards: Channel[ShardWork] = Channel(_CLAIMED, halt)
        self._given: list[ShardWork] = []
        self.slots = Slots(_CLAIMED, halt)
        self.handed_over: set[int] = set()

    def __enter__(self) -> _Writing:
        self._stage = Stage("writer", self._write, self._halt)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # Shards that are computed are committed whatever became of a later one; Ctrl-C waits only for the one that is
        # being written.
        if error is None or isinstance(error, Exception):
            self._shards.close()
        else:
            self._halt.stop()
        self._stage.join()
        for work in self._given:
            work.release()
        if error is None:
            self._halt.raise_error()

    def hand_over(self, work: ShardWork) -> None:
        """Give a computed shard to the writer."""
        self._given.append(work)
        self.handed_over.add(work.shard)
        self._shards.put(work)

    def _write(self) -> None:
        while (work := self._shards.get()) is not None:
            audit = work.commit()
            self._given.remove(work)
            self.slots.give_back()
            if self._committed is not None:
                self._committed(work, audit)


class _Loading:
    """The loader's stage: gives batches in the order of shards; left, it lets go of shards that are not computed."""

    def __init__(
        self,
        writer: StoreWriter,
        maker: RowMaker,
        device_pass: DevicePass,
        shards: Sequence[int],
        batch_size: int,
        writing: _Writing,
        halt: Halt,
        progress: Progress,
    ) -> None:
        self._writer, self._maker, self._shards, self._batch_size = writer, maker, shards, batch_size
        self._lanes, self._temperatures = device_pass.lanes, audit_temperatures(device_pass.plan)
        self._writing, self._progress = writing, progress
        self._halt = Halt(halt)
        self._batches: Channel[_Loaded] = Channel(_LOADED_BATCHES, self._halt)
        self._claimed: list[ShardWork] = []
        self._error: Exception | None = None

    def __enter__(self) -> _Loading:
        self._stage = Stage("loader", self._load, self._halt)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._halt.stop()
        self._stage.join(_PATIENCE_S)
        for work in self._claimed.copy():
            if work.shard not in self._writing.handed_over:
                self._progress.advance(-work.landed_rows)
                self._let_go(work)

    def __iter__(self) -> Iterator[_Loaded]:
        """The batches, until there are no more or loading one failed."""
        while True:
            began_s = time.perf_counter()
            loaded = self._batches.get()
            self._lanes.starved(time.perf_counter() - began_s)
            if loaded is None:
                return
            yield loaded

    def raise_error(self) -> None:
        """Raise what went wrong after the last batch, if anything did."""
        if self._error is not None:
            raise self._error

    def _load(self) -> None:
        try:
            for shard in self._shards:
                self._writing.slots.take(self._halt)
                work = self._claim(shard)
                if work is not None:
                    self._load_shard(work)
        except HaltedError:
            return
        except Exception as error:  # noqa: BLE001  # raised again by `raise_error`, after the batches before it
            self._error = error
        self._batches.close()

    def _claim(self, shard: int) -> ShardWork | None:
        """Hold a shard; None where another process writes it, or has written it since we looked."""
        try:
            work = ShardWork(
                self._writer.claim(shard),
                self._writer.plan,
                temperatures=self._temperatures,
                pinned=self._lanes.pinned,
            )
        except ShardClaimedError:
            self._progress.note("other processes work on this store too")
            self._writing.slots.give_back()
            return None
        self._claimed.append(work)
        if self._writer.receipt(shard) is None:
            return work
        self._progress.advance(len(work.rows))
        self._let_go(work)
        return None

    def _let_go(self, work: ShardWork) -> None:
        self._claimed.remove(work)
        work.release()
        self._writing.slots.give_back()

    def _load_shard(self, work: ShardWork) -> None:
        rows = 0
        for batch in self._maker.batches(work.rows, self._batch_size):
            inputs = host_tensor(batch.inputs)
            if self._lanes.pinned:
                inputs = inputs.pin_memory()
            self._batches.put(_Loaded(work=work, batch=batch, inputs=inputs))
            rows += batch.rows
        assert rows == len(work.rows), f"{rows} rows were made for the {len(work.rows)} of shard {work.shard}"
