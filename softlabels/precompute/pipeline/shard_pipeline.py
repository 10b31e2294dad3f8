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

from collections.abc import Callable, Sequence
from types import TracebackType

from softlabels.audit import Audit
from softlabels.errors import TeacherError
from softlabels.precompute.pipeline.device import is_out_of_memory, release_cached
from softlabels.precompute.pipeline.device_step import DevicePass, Started
from softlabels.precompute.pipeline.shard_loading import Claims, Loading, ShardWork
from softlabels.precompute.pipeline.stages import Channel, Halt, HaltedError, Slots, Stage
from softlabels.precompute.row_batches import RowMaker
from softlabels.progress import Progress
from softlabels.store.writer import StoreWriter

_CLAIMED = 3

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
    loaders: int,
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
        loaders: threads that make batches.
        progress: rows as they are computed.
        committed: told of every shard that this run wrote, if anybody is.
        halved: told of a batch size that had to be halved.
    Raises:
        SoftLabelsError, OSError: of whichever stage failed first. TeacherError: not even one input fits.
    """
    left, halt, lanes = list(shards), Halt(), device_pass.lanes
    claims = Claims(writer, lanes, Slots(_CLAIMED, halt), progress)
    try:
        with _Writing(claims, halt, committed) as writing:
            while True:
                loading = Loading(left, claims, maker, batch_size=batch_size, loaders=loaders, lanes=lanes, halt=halt)
                try:
                    with loading:
                        fits = _all_fit(loading, device_pass, writing, progress)
                finally:
                    claims.let_go_unless(writing.computed)
                if fits:
                    break
                batch_size = _halve(batch_size, progress)
                halved(batch_size)
                left = [shard for shard in left if shard not in writing.computed]
    except HaltedError:
        halt.raise_error()  # another stage's error is what stopped this one
        raise


def _all_fit(loading: Loading, device_pass: DevicePass, writing: _Writing, progress: Progress) -> bool:
    """Compute all batches that come; False where the device's memory does not do for one."""
    try:
        _compute_all(loading, device_pass, writing, progress)
    except (RuntimeError, MemoryError, TeacherError) as error:
        if not is_out_of_memory(error):
            raise
    else:
        return True
    return False  # outside of `except`: the error holds on to the very tensors that are too many


def _compute_all(loading: Loading, device_pass: DevicePass, writing: _Writing, progress: Progress) -> None:
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


class _Writing:
    """The writer's stage; left without an error, it waits until everything is committed.

    Attributes:
        computed: numbers of the shards that were given to it.
    """

    def __init__(self, claims: Claims, halt: Halt, committed: Committed | None) -> None:
        self._claims, self._halt, self._committed = claims, halt, committed
        self._shards: Channel[ShardWork] = Channel(_CLAIMED, halt)
        self.computed: set[int] = set()

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
        self._claims.let_go_unless(set())
        if error is None:
            self._halt.raise_error()

    def hand_over(self, work: ShardWork) -> None:
        """Give a computed shard to the writer."""
        self.computed.add(work.shard)
        self._shards.put(work)

    def _write(self) -> None:
        while (work := self._shards.get()) is not None:
            audit = work.commit()
            self._claims.let_go(work)
            if self._committed is not None:
                self._committed(work, audit)
            del work  # its arrays are not needed while the next shard is waited for
