"""One shard in work: claimed, filled batch by batch, committed as a whole or given up."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabels.audit import Audit
from softlabels.errors import ShapeMismatchError
from softlabels.manifest import Manifest
from softlabels.precompute.device_audit import unpack_figures
from softlabels.precompute.rows import RowBatch
from softlabels.store.writer import ShardClaim
from softlabels.transfer import UNLABELLED

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
                audit.absorb(
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
