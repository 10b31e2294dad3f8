"""Shards in work: claimed, filled batch by batch from prefetched inputs, committed as a whole or released.

One loader makes the batches in the loader stage's own thread. More of them (`loaders` in [run]) make several batches at
once where every input is a row, so that batches can be cut without reading the data; they still come in order.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabels.audit import Audit
from softlabels.errors import ShapeMismatchError, ShardClaimedError
from softlabels.manifest import Manifest
from softlabels.precompute.pipeline.device import DeviceStreams
from softlabels.precompute.pipeline.device_step import unpack_figures
from softlabels.precompute.pipeline.inference import as_tensor, audit_temperatures
from softlabels.precompute.pipeline.stages import Channel, Slots, Stage, StoppedError, StopSignal
from softlabels.precompute.row_batches import RowBatch, RowLoader
from softlabels.progress import Progress
from softlabels.store.writer import ShardClaim, StoreWriter
from softlabels.transfer_set import UNLABELLED

_ROW_FACTS = ("labels", "fingerprints", "view_parameters", "kept_inputs")

_PREFETCHED_BATCHES = 2
"""Batches ready for the device: one more than it takes at a time, so that one slow batch does not starve it."""

_JOIN_TIMEOUT_S = 10.0
"""How long a run that stops waits for a transfer set in the middle of a read."""


class ClaimedShard:
    """A claimed shard between its first batch and its commit.

    Encoded rows are copied straight into the arrays that the shard is written from, which are pinned where a device
    copies asynchronously. They are allocated with the first rows, so a shard that is only prefetched holds none.

    Args:
        claim: claim context, not entered yet: held from here until `commit` or `release`.
    Attributes:
        shard, rows: number of the shard, and its rows in the store.
        written_rows: how many rows were written so far.
    Raises:
        ShardClaimedError: another writer holds the shard.
    """

    def __init__(self, claim: AbstractContextManager[ShardClaim], plan: Manifest, streams: DeviceStreams) -> None:
        self._held = ExitStack()
        self._claim = self._held.enter_context(claim)
        self._plan, self._streams, self._temperatures = plan, streams, audit_temperatures(plan)
        self.shard, self.rows = self._claim.shard, self._claim.rows
        self.written_rows = 0
        self._done: torch.cuda.Event | None = None
        self._arrays: dict[str, Tensor] = {}
        self._ids: list[NDArray[Any]] = []
        self._facts: dict[str, NDArray[Any]] = {}
        self._figures: list[Tensor] = []

    @property
    def complete(self) -> bool:
        """Return whether all rows were written."""
        return self.written_rows == len(self.rows)

    def write(self, batch: RowBatch, encoded: Mapping[str, Tensor]) -> None:
        """Begin to copy a batch's encoded rows into the shard."""
        if not self._arrays:
            self._arrays = {name: self._empty(name) for name in encoded}
        part = slice(self.written_rows, self.written_rows + batch.rows)
        for name, tensor in encoded.items():
            target = self._arrays[name][part]
            assert tensor.dtype == target.dtype, f"{name}: {tensor.dtype} is not the plan's {target.dtype}"
            # `tensor` may be freed before an asynchronous copy ends: its memory belongs to the copy's stream or is
            # recorded there (`DeviceStreams.encoding`), so it is reused only after the copy.
            target.copy_(tensor.reshape(target.shape), non_blocking=self._streams.pinned)
        self._done = self._streams.copies_done()
        self._keep_facts(part, batch)
        self.written_rows += batch.rows

    def write_figures(self, packed: Tensor) -> None:
        """Begin to copy the audit figures of a batch, from `pack_figures`."""
        on_host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=self._streams.pinned)
        self._figures.append(on_host.copy_(packed, non_blocking=self._streams.pinned))
        self._done = self._streams.copies_done()

    def commit(self) -> Audit:
        """Wait for the last copy, write the shard, release it, and return the audit of its rows.

        Raises:
            ShardConflictError, ShapeMismatchError, OSError: nothing of the shard exists then.
        """
        with self._held:
            if self._done is not None:
                # All copies are in one stream, so the event after the last one comes after all of them.
                self._done.synchronize()
            audit = Audit(self._temperatures)
            for packed in self._figures:
                figures = unpack_figures(packed.numpy(), classes=self._plan.classes, temperatures=self._temperatures)
                audit.add_sums(figures)
            rows_have_ids = self._plan.layout.kind != "sequences"
            self._claim.commit(
                encoded={name: tensor.numpy() for name, tensor in self._arrays.items()},
                ids=np.concatenate(self._ids) if rows_have_ids else None,
                fingerprints=self._facts.get("fingerprints"),
                labels=self._facts.get("labels"),
                view_parameters=self._facts.get("view_parameters"),
                inputs=self._facts.get("kept_inputs"),
                audit=audit.to_json(),
            )
            return audit

    def release(self) -> None:
        """Release the shard without a commit; nothing of it is kept."""
        self._held.close()

    def _empty(self, name: str) -> Tensor:
        spec = self._plan.arrays[name]
        dtype = torch.from_numpy(np.empty(0, dtype=spec.dtype)).dtype
        return torch.empty((len(self.rows), *spec.row_shape), dtype=dtype, pin_memory=self._streams.pinned)

    def _keep_facts(self, part: slice, batch: RowBatch) -> None:
        self._ids.append(batch.ids)
        for name in _ROW_FACTS:
            found: NDArray[Any] | None = getattr(batch, name)
            if found is None or (name == "kept_inputs" and "inputs" not in self._plan.arrays):
                continue
            if name == "kept_inputs":
                self._check_inputs(found, batch)
            if name not in self._facts:
                # Batches without labels among others that have some are unlabelled rows, not rows of class 0.
                blank = UNLABELLED if name == "labels" else 0
                self._facts[name] = np.full((len(self.rows), *found.shape[1:]), blank, dtype=found.dtype)
            self._facts[name][part] = found

    def _check_inputs(self, found: NDArray[Any], batch: RowBatch) -> None:
        # NumPy would cast inputs of another type silently, and they would no longer match their fingerprints.
        spec = self._plan.arrays["inputs"]
        if (found.dtype.str, found.shape[1:]) != (spec.dtype, spec.row_shape):
            raise ShapeMismatchError(
                f"the samples from {batch.ids.tolist()[0]!r} on are {found.dtype}{list(found.shape[1:])}, the first "
                f"ones were {np.dtype(spec.dtype)}{list(spec.row_shape)}: a store keeps inputs of one type and shape"
            )


class ShardClaims:
    """The shards that a run holds: claimed by the loader stage, released by whichever stage is done with them.

    Args:
        slots: one per shard that may be held at a time.
        progress: advanced by rows that other processes computed.
    """

    def __init__(self, writer: StoreWriter, streams: DeviceStreams, slots: Slots, progress: Progress) -> None:
        self._writer, self._progress = writer, progress
        self.streams, self.slots = streams, slots
        self._held: list[ClaimedShard] = []

    def claim(self, shard: int) -> ClaimedShard | None:
        """Claim a shard, in a slot acquired before; None where another process holds it or has committed it by now."""
        try:
            claimed = ClaimedShard(self._writer.claim(shard), self._writer.plan, self.streams)
        except ShardClaimedError:
            self._progress.note("other processes work on this store too")
            self.slots.release()
            return None
        self._held.append(claimed)
        # Under the claim: another process may have committed the shard since this run listed the missing ones.
        if self._writer.ledger.read(shard) is None:
            return claimed
        self._progress.advance(len(claimed.rows))
        self.release(claimed)
        return None

    def release(self, claimed: ClaimedShard) -> None:
        """Release a shard, committed or not."""
        self._held.remove(claimed)
        claimed.release()
        self.slots.release()

    def release_all_but(self, computed: set[int]) -> None:
        """Release all shards but those that wait for the writer; progress goes back by their rows."""
        for claimed in [claimed for claimed in self._held if claimed.shard not in computed]:
            self._progress.advance(-claimed.written_rows)
            self.release(claimed)


@dataclass(frozen=True, kw_only=True, eq=False)
class PrefetchedBatch:
    """A batch on the host and the shard that it belongs to; `inputs` are pinned where the device asks for it."""

    shard: ClaimedShard
    batch: RowBatch
    inputs: Tensor


class Prefetcher:
    """The loader stage: iterates over prefetched batches in the order of shards, and stops when its context is left.

    Args:
        shards: numbers of the shards to load.
        batch_size: inputs per batch.
        loaders: threads that make batches.
        stop: stop signal of the whole run, which leaving this context does not stop.
    """

    def __init__(
        self,
        shards: Sequence[int],
        claims: ShardClaims,
        rows: RowLoader,
        *,
        batch_size: int,
        loaders: int,
        stop: StopSignal,
    ) -> None:
        self._shards, self._claims, self._rows, self._batch_size = shards, claims, rows, batch_size
        self._loaders = loaders if rows.layout.kind != "sequences" else 1
        self._streams = claims.streams
        self._stop = StopSignal(stop)
        self._batches: Channel[PrefetchedBatch] = Channel(_PREFETCHED_BATCHES, self._stop)
        self._error: Exception | None = None

    def __enter__(self) -> Prefetcher:
        self._stage = Stage("loader", self._load, self._stop)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.stop()
        self._stage.join(_JOIN_TIMEOUT_S)

    def __iter__(self) -> Iterator[PrefetchedBatch]:
        """Yield batches until there are no more or loading one failed."""
        while True:
            began_s = time.perf_counter()
            batch = self._batches.get()
            self._streams.add_starved(time.perf_counter() - began_s)
            if batch is None:
                return
            yield batch

    def raise_error(self) -> None:
        """Raise the error that ended loading, if any; batches before it were yielded."""
        if self._error is not None:
            raise self._error

    def _load(self) -> None:
        try:
            if self._loaders == 1:
                self._load_in_order()
            else:
                self._load_in_parallel()
        except StoppedError:
            return
        except Exception as error:  # noqa: BLE001  # raised again by `raise_error`, after the batches before it
            self._error = error
        # Last: the consumer looks for `_error` as soon as the channel ends.
        self._batches.close()

    def _load_in_order(self) -> None:
        for number in self._shards:
            # Before the claim: a shard claimed while waiting for a slot would be withheld from other processes.
            self._claims.slots.acquire(self._stop)
            shard = self._claims.claim(number)
            if shard is not None:
                for batch in self._rows.batches(shard.rows, self._batch_size):
                    self._batches.put(self._on_host(shard, batch))

    def _load_in_parallel(self) -> None:
        ahead: deque[Future[PrefetchedBatch]] = deque()
        pool = ThreadPoolExecutor(self._loaders, thread_name_prefix="softlabels-loader")
        try:
            for number in self._shards:
                # A slot may become free only once what was loaded ahead is computed, so that is handed on first;
                # waiting for the slot while holding it back would be a deadlock.
                while not self._claims.slots.try_acquire():
                    if not ahead:
                        self._claims.slots.acquire(self._stop)
                        break
                    self._batches.put(ahead.popleft().result())
                shard = self._claims.claim(number)
                if shard is None:
                    continue
                for start in range(shard.rows.start, shard.rows.stop, self._batch_size):
                    part = range(start, min(start + self._batch_size, shard.rows.stop))
                    ahead.append(pool.submit(self._make, shard, part))
                    # Bounds memory: beside the channel's, at most one batch more than there are threads is held.
                    if len(ahead) > self._loaders:
                        self._batches.put(ahead.popleft().result())
            while ahead:
                self._batches.put(ahead.popleft().result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _make(self, shard: ClaimedShard, rows: range) -> PrefetchedBatch:
        # Batches of a shard are cut from its first row on, so a batch made alone is the same one.
        (batch,) = self._rows.batches(rows, self._batch_size)
        return self._on_host(shard, batch)

    def _on_host(self, shard: ClaimedShard, batch: RowBatch) -> PrefetchedBatch:
        return PrefetchedBatch(shard=shard, batch=batch, inputs=self._streams.pin(as_tensor(batch.inputs)))
