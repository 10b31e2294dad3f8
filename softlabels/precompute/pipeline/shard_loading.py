"""One shard in work: claimed, filled batch by batch, committed as a whole or given up."""

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
from softlabels.precompute.pipeline.device import Lanes
from softlabels.precompute.pipeline.device_step import unpack_figures
from softlabels.precompute.pipeline.inference import audit_temperatures, host_tensor
from softlabels.precompute.pipeline.stages import Channel, Halt, HaltedError, Slots, Stage
from softlabels.precompute.row_batches import RowBatch, RowMaker
from softlabels.progress import Progress
from softlabels.store.writer import ShardClaim, StoreWriter
from softlabels.transfer_set import UNLABELLED

_FACTS = ("labels", "fingerprints", "view_parameters", "kept_inputs")


class ShardWork:
    """A claimed shard on its way to a commit.

    Encoded rows land where they are written from: in the shard's own arrays, pinned for a device that copies into them
    by itself. They are made when the first rows land, so that a shard whose inputs are loaded ahead holds none.

    Args:
        claim: the claim's context, not entered yet: it is held from here until `commit` or `release`.
        plan: of the store.
        temperatures: of the audit.
        pinned: whether a device copies into the arrays.
    Attributes:
        shard, rows: its number and its rows in the store.
        landed_rows: how many of its rows were brought so far.
    Raises:
        ShardClaimedError: another writer holds it.
    """

    def __init__(
        self,
        claim: AbstractContextManager[ShardClaim],
        plan: Manifest,
        *,
        temperatures: tuple[float, ...],
        pinned: bool,
    ) -> None:
        self._held = ExitStack()
        self._claim = self._held.enter_context(claim)
        self._plan, self._temperatures, self._pinned = plan, temperatures, pinned
        self.shard, self.rows = self._claim.shard, self._claim.rows
        self.landed_rows = 0
        self._done: torch.cuda.Event | None = None
        self._arrays: dict[str, Tensor] = {}
        self._ids: list[NDArray[Any]] = []
        self._facts: dict[str, NDArray[Any]] = {}
        self._figures: list[Tensor] = []

    @property
    def complete(self) -> bool:
        """Whether all rows were brought."""
        return self.landed_rows == len(self.rows)

    def land(self, batch: RowBatch, encoded: Mapping[str, Tensor]) -> int:
        """Begin to copy the shard's next rows into it; returns the first one's number in the store."""
        if not self._arrays:
            self._arrays = {name: self._host_array(name) for name in encoded}
        first = self.rows.start + self.landed_rows
        part = slice(self.landed_rows, self.landed_rows + batch.rows)
        for name, tensor in encoded.items():
            target = self._arrays[name][part]
            assert tensor.dtype == target.dtype, f"{name}: {tensor.dtype} is not the plan's {target.dtype}"
            target.copy_(tensor.reshape(target.shape), non_blocking=self._pinned)
        self._keep_facts(part, batch)
        self.landed_rows += batch.rows
        return first

    def land_figures(self, packed: Tensor) -> None:
        """Begin to copy the audit's figures of a batch."""
        target = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=self._pinned)
        target.copy_(packed, non_blocking=self._pinned)
        self._figures.append(target)

    def landing(self, done: torch.cuda.Event | None) -> None:
        """What was begun so far is there when `done` is."""
        self._done = done

    def commit(self) -> Audit:
        """Wait for the last copy, write the shard, and let go of it.

        Returns:
            the audit of its rows.
        Raises:
            ShardConflictError, ShapeMismatchError, OSError: nothing of the shard exists then.
        """
        with self._held:
            if self._done is not None:
                self._done.synchronize()
            audit = Audit(self._temperatures)
            for packed in self._figures:
                audit.add_sums(
                    unpack_figures(packed.numpy(), classes=self._plan.classes, temperatures=self._temperatures)
                )
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
        """Let go of the shard without a commit; nothing of it is kept."""
        self._held.close()

    def _host_array(self, name: str) -> Tensor:
        spec = self._plan.arrays[name]
        dtype = torch.from_numpy(np.empty(0, dtype=spec.dtype)).dtype
        return torch.empty((len(self.rows), *spec.row_shape), dtype=dtype, pin_memory=self._pinned)

    def _keep_facts(self, part: slice, batch: RowBatch) -> None:
        self._ids.append(batch.ids)
        for name in _FACTS:
            found: NDArray[Any] | None = getattr(batch, name)
            if found is None or (name == "kept_inputs" and "inputs" not in self._plan.arrays):
                continue
            if name == "kept_inputs":
                self._refuse_other_inputs(found, batch)
            if name not in self._facts:
                # Rows of batches without labels, among others that have some, are unlabelled.
                blank = UNLABELLED if name == "labels" else 0
                self._facts[name] = np.full((len(self.rows), *found.shape[1:]), blank, dtype=found.dtype)
            self._facts[name][part] = found

    def _refuse_other_inputs(self, found: NDArray[Any], batch: RowBatch) -> None:
        """Inputs of another type than the plan's would be cast in silence, and no longer fit their fingerprints."""
        spec = self._plan.arrays["inputs"]
        if (found.dtype.str, found.shape[1:]) != (spec.dtype, spec.row_shape):
            raise ShapeMismatchError(
                f"the samples from {batch.ids.tolist()[0]!r} on are {found.dtype}{list(found.shape[1:])}, the first "
                f"ones were {np.dtype(spec.dtype)}{list(spec.row_shape)}: a store keeps inputs of one type and shape"
            )


# MERGED from softlabels.precompute.pipeline.shard_loading: How do inputs get to the device in time? A stage that claims shards and gives their batches in order.
#
# One loader makes the batches in this stage's own thread. More of them (`loaders` of [run]) make several batches at once,
# where every input is a row and batches can be cut from a shard without looking; they still come in order.


_LOADED_BATCHES = 2
"""Batches that wait for the device: one more than it takes at a time, so that one slow batch does not starve it."""

_PATIENCE_S = 10.0
"""How long a run that stops waits for a transfer set that is in the middle of something."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Loaded:
    """A batch on the host, and the shard that it belongs to; `inputs` are pinned where the lanes ask for it."""

    work: ShardWork
    batch: RowBatch
    inputs: Tensor


class Claims:
    """The shards that a run holds: taken by the loader, let go by whoever is done with them.

    Args:
        writer: of the store.
        lanes: of the device that fills them.
        slots: how many may be held at a time.
        progress: told of rows that others computed.
    """

    def __init__(self, writer: StoreWriter, lanes: Lanes, slots: Slots, progress: Progress) -> None:
        self._writer, self._lanes, self._progress = writer, lanes, progress
        self._temperatures = audit_temperatures(writer.plan)
        self.slots = slots
        self._held: list[ShardWork] = []

    def take(self, shard: int) -> ShardWork | None:
        """Hold a shard, in a slot taken before; None where another process writes it, or wrote it since we looked."""
        try:
            work = ShardWork(
                self._writer.claim(shard),
                self._writer.plan,
                temperatures=self._temperatures,
                pinned=self._lanes.pinned,
            )
        except ShardClaimedError:
            self._progress.note("other processes work on this store too")
            self.slots.give_back()
            return None
        self._held.append(work)
        if self._writer.receipt(shard) is None:
            return work
        self._progress.advance(len(work.rows))
        self.let_go(work)
        return None

    def let_go(self, work: ShardWork) -> None:
        """Done with a shard, committed or not."""
        self._held.remove(work)
        work.release()
        self.slots.give_back()

    def let_go_unless(self, computed: set[int]) -> None:
        """Let go of all shards but those that are computed and wait for the writer; their rows do not count."""
        for work in [work for work in self._held if work.shard not in computed]:
            self._progress.advance(-work.landed_rows)
            self.let_go(work)


class Loading:
    """The loader's stage: iterates over batches, in the order of shards; left, it stops.

    Args:
        shards: what to load.
        claims: how a shard is taken.
        maker: of its rows.
        batch_size: inputs a batch.
        loaders: threads that make batches.
        lanes: of the device.
        halt: of the whole run.
    """

    def __init__(
        self,
        shards: Sequence[int],
        claims: Claims,
        maker: RowMaker,
        *,
        batch_size: int,
        loaders: int,
        lanes: Lanes,
        halt: Halt,
    ) -> None:
        self._shards, self._claims, self._maker, self._batch_size = shards, claims, maker, batch_size
        self._loaders = loaders if maker.layout.kind != "sequences" else 1
        self._lanes = lanes
        self._halt = Halt(halt)
        self._batches: Channel[Loaded] = Channel(_LOADED_BATCHES, self._halt)
        self._error: Exception | None = None

    def __enter__(self) -> Loading:
        self._stage = Stage("loader", self._load, self._halt)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._halt.stop()
        self._stage.join(_PATIENCE_S)

    def __iter__(self) -> Iterator[Loaded]:
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
            if self._loaders == 1:
                self._load_one_by_one()
            else:
                self._load_many_at_once()
        except HaltedError:
            return
        except Exception as error:  # noqa: BLE001  # raised again by `raise_error`, after the batches before it
            self._error = error
        self._batches.close()

    def _load_one_by_one(self) -> None:
        for shard in self._shards:
            self._claims.slots.take(self._halt)
            work = self._claims.take(shard)
            if work is not None:
                for batch in self._maker.batches(work.rows, self._batch_size):
                    self._batches.put(self._on_host(work, batch))

    def _load_many_at_once(self) -> None:
        ahead: deque[Future[Loaded]] = deque()
        pool = ThreadPoolExecutor(self._loaders, thread_name_prefix="softlabels-loader")
        try:
            for shard in self._shards:
                # A slot may only come free when what was loaded ahead is computed: that is handed on first.
                while not self._claims.slots.take_now():
                    if not ahead:
                        self._claims.slots.take(self._halt)
                        break
                    self._batches.put(ahead.popleft().result())
                work = self._claims.take(shard)
                if work is None:
                    continue
                for start in range(work.rows.start, work.rows.stop, self._batch_size):
                    part = range(start, min(start + self._batch_size, work.rows.stop))
                    ahead.append(pool.submit(self._make, work, part))
                    if len(ahead) > self._loaders:
                        self._batches.put(ahead.popleft().result())
            while ahead:
                self._batches.put(ahead.popleft().result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _make(self, work: ShardWork, rows: range) -> Loaded:
        """The one batch of these rows; batches of a shard are cut from its first row on, so it is the same alone."""
        (batch,) = self._maker.batches(rows, self._batch_size)
        return self._on_host(work, batch)

    def _on_host(self, work: ShardWork, batch: RowBatch) -> Loaded:
        inputs = host_tensor(batch.inputs)
        return Loaded(work=work, batch=batch, inputs=inputs.pin_memory() if self._lanes.pinned else inputs)
