"""The shard pipeline: inputs are loaded, computed and written by three stages at a time.

    loader thread            calling thread                     writer thread
    claim a shard            queue copy and forward passes      wait for the last copy
    take, hash, pin   ──►    of a batch; then mean, encoding,   checksums, files, receipt
    batch by batch    2      audit and copy of the one before   ──► release the claim

A shard is claimed before its first batch is loaded and held until it is committed. An error in any stage stops them
all; committed shards stay, the claims of all others are released.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from softlabels.audit import Audit
from softlabels.errors import TeacherError
from softlabels.manifest import Manifest
from softlabels.precompute.pipeline.device import DeviceStreams, is_out_of_memory, release_cached
from softlabels.precompute.pipeline.device_step import DeviceStep, StartedBatch
from softlabels.precompute.pipeline.shard_loading import ClaimedShard, Prefetcher, ShardClaims
from softlabels.precompute.pipeline.stages import Channel, Slots, Stage, StoppedError, StopSignal
from softlabels.progress import Progress
from softlabels.store.writer import StoreWriter

_MOST_CLAIMS = 3
"""Shards held at a time: one being written, one being computed, one whose first inputs are loaded."""

OnCommit = Callable[[ClaimedShard, Audit], None]
"""Called in the writer thread for every shard as soon as it exists."""


class RunMetrics:
    """A JSON-lines file of progress figures, one line per committed shard.

    Each line has `time` (seconds since 1970), `store`, `shards` and `rows` committed by this run, `rows_done` and
    `rows_total` of the store (other processes' rows as of the start of this run), `rows_per_s`, `left_s`, `kl_nats`
    (mean by temperature, over this run's rows so far) and `idle_share` (of the time in which no teacher ran).

    Args:
        path: file to append to, so that a resumed run continues it.
        done: rows committed before this run.
    """

    def __init__(self, path: Path, plan: Manifest, *, done: int, streams: DeviceStreams) -> None:
        self._path, self._plan, self._streams = path, plan, streams
        self._done_before, self._rows, self._shards = done, 0, 0
        self._audit = Audit()
        self._began_s = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, shard: ClaimedShard, audit: Audit) -> None:
        """Write the line of a shard that was just committed."""
        self._shards += 1
        self._rows += len(shard.rows)
        self._audit.merge(audit)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._line()) + "\n")

    def _line(self) -> dict[str, Any]:
        rate = self._rows / max(1e-9, time.monotonic() - self._began_s)
        done = self._done_before + self._rows
        kl = self._audit.summary()["kl_nats"]
        return {
            "time": time.time(),
            "store": self._plan.name,
            "shards": self._shards,
            "rows": self._rows,
            "rows_done": done,
            "rows_total": self._plan.rows,
            "rows_per_s": rate,
            "left_s": (self._plan.rows - done) / rate,
            "kl_nats": {temperature: figures["mean"] for temperature, figures in kl.items()},
            "idle_share": self._streams.idle_share(),
        }


def compute_shards(
    writer: StoreWriter,
    step: DeviceStep,
    shards: Sequence[int],
    *,
    batch_size: int,
    loaders: int,
    progress: Progress,
    on_commit: OnCommit | None,
    on_halved: Callable[[int], None],
) -> None:
    """Compute these shards, except those that other processes hold or have committed.

    Where a batch does not fit the device's memory, the batch size is halved for good and the shards in work start again
    with it, so that each shard is computed in batches of one size.

    Args:
        batch_size: inputs per forward pass.
        loaders: threads that make batches.
        progress: advanced by rows as they are computed.
        on_commit: called for every shard that this run wrote.
        on_halved: called with each batch size that the run went down to.
    Raises:
        SoftLabelsError, OSError: from whichever stage failed first. TeacherError: not even one input fits.
    """
    left, stop, rows = list(shards), StopSignal(), step.ensemble.rows
    claims = ShardClaims(writer, step.streams, Slots(_MOST_CLAIMS, stop), progress)
    try:
        with _CommitStage(claims, stop, on_commit) as commits:
            while True:
                batches = Prefetcher(left, claims, rows, batch_size=batch_size, loaders=loaders, stop=stop)
                try:
                    with batches:
                        fits = _all_fit(batches, step, commits, progress)
                finally:
                    # After the loader, which claims shards, was stopped. Those handed to the writer stay claimed until
                    # they are committed.
                    claims.release_all_but(commits.computed)
                if fits:
                    break
                batch_size = _halve(batch_size, progress)
                on_halved(batch_size)
                left = [shard for shard in left if shard not in commits.computed]
    except StoppedError:
        stop.raise_error()  # the error of another stage is what stopped this one
        raise


def _all_fit(batches: Prefetcher, step: DeviceStep, commits: _CommitStage, progress: Progress) -> bool:
    """Compute all batches; return False where one does not fit the device's memory."""
    try:
        _compute_all(batches, step, commits, progress)
    except (RuntimeError, MemoryError, TeacherError) as error:
        if not is_out_of_memory(error):
            raise
    else:
        return True
    return False  # outside of `except`: the error's traceback keeps the very tensors alive that are too many


def _compute_all(batches: Prefetcher, step: DeviceStep, commits: _CommitStage, progress: Progress) -> None:
    before: tuple[ClaimedShard, StartedBatch] | None = None

    def finish() -> None:
        if before is not None:
            shard, started = before
            step.finish(started, shard)
            progress.advance(started.batch.rows)
            if shard.complete:
                commits.put(shard)

    for prefetched in batches:
        try:
            started = step.start(prefetched.batch, prefetched.inputs)
        except Exception:
            finish()  # batches before the fault are kept
            raise
        finish()
        before = prefetched.shard, started
    finish()
    batches.raise_error()


def _halve(batch_size: int, progress: Progress) -> int:
    release_cached()
    if batch_size == 1:
        raise TeacherError(
            "a single input does not fit the device's memory: use a device with more memory, half precision "
            "(`precision` in [run]), or a smaller teacher"
        )
    progress.note(f"out of memory: batches of {batch_size // 2} from here on, whose kernels may round differently")
    return batch_size // 2


class _CommitStage:
    """The writer stage; leaving its context without an error waits until every computed shard is committed.

    Attributes:
        computed: numbers of the shards that were handed to it.
    """

    def __init__(self, claims: ShardClaims, stop: StopSignal, on_commit: OnCommit | None) -> None:
        self._claims, self._stop, self._on_commit = claims, stop, on_commit
        self._shards: Channel[ClaimedShard] = Channel(_MOST_CLAIMS, stop)
        self.computed: set[int] = set()

    def __enter__(self) -> _CommitStage:
        self._stage = Stage("writer", self._commit_all, self._stop)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # Computed shards are committed whatever became of a later one; Ctrl-C waits only for the one being written.
        if error is None or isinstance(error, Exception):
            self._shards.close()
        else:
            self._stop.stop()
        self._stage.join()
        self._claims.release_all_but(set())
        if error is None:
            self._stop.raise_error()

    def put(self, shard: ClaimedShard) -> None:
        """Hand over a computed shard."""
        self.computed.add(shard.shard)
        self._shards.put(shard)

    def _commit_all(self) -> None:
        while (shard := self._shards.get()) is not None:
            audit = shard.commit()
            # The claim ended with `commit`; this frees the slot, so that the loader may claim another shard.
            self._claims.release(shard)
            if self._on_commit is not None:
                self._on_commit(shard, audit)
            del shard  # frees its arrays while the next shard is waited for
