"""One batch on the device: inputs in, all teachers, mean, encoding, audit figures, and one copy out.

A step has two halves, so that the device always has work: `start` queues the copy of the inputs and the forward passes
and returns at once; `finish` does the rest, beside the next batch's forward passes, and writes the encoded rows into
their shard.

Legend: B or R rows, C classes, A audited rows, T temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabels.audit import ErrorSums
from softlabels.encodings import Encoding
from softlabels.errors import EncodingError
from softlabels.ids import IdArray
from softlabels.manifest import Manifest
from softlabels.precompute.pipeline.device import DeviceStreams
from softlabels.precompute.pipeline.inference import TeacherEnsemble, audit_temperatures, format_ids
from softlabels.precompute.row_batches import RowBatch

if TYPE_CHECKING:
    from softlabels.precompute.pipeline.shard_loading import ClaimedShard

MOST_ENTRIES_A_ROW = 1 << 14
"""Classes up to which every row is audited; above, one row in classes / 8,192.

The audit makes some 60 passes over a row in float64 (the KL of a good encoding is below what float32 can resolve):
nothing beside a teacher at 1,000 classes, a few per cent of the run at 100,000."""

_STRIDE_ENTRIES = 1 << 13

_BLOCK_ENTRIES = 1 << 22
"""Entries measured at once: 32 MiB per float64 temporary, of which there are about ten."""

_SUMS = 3
"""Scalars at the head of a packed tensor: top-1 agreements, dropped mass, squared error."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StartedBatch:
    """A batch whose forward passes are queued: each teacher's rows, and an event after them."""

    batch: RowBatch
    outputs: list[Tensor]
    mark: torch.cuda.Event | None


class DeviceStep:
    """Runs batches of one plan on the device of `streams`, where the teachers of `ensemble` are."""

    def __init__(
        self, plan: Manifest, ensemble: TeacherEnsemble, *, encoding: Encoding, streams: DeviceStreams
    ) -> None:
        self.plan, self.streams, self._encoding = plan, streams, encoding
        # The order of classes is moved here once: copied to the device for every batch, it would stall each.
        orders = [None if t.order_C is None else t.order_C.to(streams.device) for t in ensemble.teachers]
        teachers = [replace(t, order_C=order_C) for t, order_C in zip(ensemble.teachers, orders, strict=True)]
        self.ensemble = replace(ensemble, teachers=teachers)
        self._temperatures = audit_temperatures(plan)

    def start(self, batch: RowBatch, inputs: Tensor) -> StartedBatch:
        """Queue the forward passes of a batch, whose `inputs` are pinned where the streams ask for it.

        Raises:
            TeacherError: a teacher fails or returns another shape.
        """
        with torch.inference_mode():
            uploaded = self.streams.upload(inputs)
            with self.streams.forward():
                outputs = self.ensemble.forward(uploaded, batch, row_kind=self._encoding.row_kind)
        return StartedBatch(batch=batch, outputs=outputs, mark=self.streams.mark())

    def finish(self, started: StartedBatch, shard: ClaimedShard | None) -> None:
        """Encode a batch's rows and begin to copy them into their shard; None copies and drops them, for trials.

        Raises:
            NonFiniteLogitsError, TeacherError, EncodingError: with the sample ids at fault.
        """
        batch = started.batch
        with torch.inference_mode(), self.streams.encoding(started.mark, started.outputs):
            self.ensemble.check_finite(started.outputs, batch.ids)
            rows_RC = self.ensemble.rows_to_store(started.outputs, self.plan, row_kind=self._encoding.row_kind)
            encoded = self._encode(rows_RC, batch)
            # Rows are copied first: the copy then overlaps with what the host queues for the audit.
            if shard is not None:
                shard.write(batch, encoded)
            else:
                for tensor in encoded.values():
                    tensor.cpu()
            figures = self._figures(rows_RC, encoded, int(batch.numbers[0]))
            if shard is not None and figures is not None:
                shard.write_figures(figures)

    def _encode(self, rows_RC: Tensor, batch: RowBatch) -> dict[str, Tensor]:
        # A store of members has no encoding that draws, and more rows than keys.
        keys = batch.keys if self.plan.members is None else None
        try:
            return self._encoding.encode_torch(rows_RC, keys_B=keys)
        except EncodingError as error:
            blamed = _blamed_ids(error, batch.ids, self.plan.members or 1)
            raise EncodingError(f"{error.message} (sample ids {format_ids(blamed)})", ids=blamed) from error

    def _figures(self, rows_RC: Tensor, encoded: dict[str, Tensor], first_row: int) -> Tensor | None:
        members = self.plan.members or 1
        chosen = audited_rows(first_row * members, len(rows_RC), self.plan.classes)
        exact_AC = self._encoding.logits_of_torch(rows_RC[chosen])
        if len(exact_AC) == 0:
            return None
        measured = encoded if len(exact_AC) == len(rows_RC) else {k: v[chosen].contiguous() for k, v in encoded.items()}
        return pack_figures(
            exact_AC,
            self._encoding.decode_torch(measured),
            temperatures=self._temperatures,
            captured=self.plan.temperature.captured,
            dropped_mass_B=measured.get("tail_mass"),
        )


def audited_rows(first_row: int, rows: int, classes: int) -> slice:
    """Return which rows of a batch are audited: by row number, so that a shard computed again is audited alike."""
    stride = 1 if classes <= MOST_ENTRIES_A_ROW else classes // _STRIDE_ENTRIES
    return slice(-first_row % stride, rows, stride)


@torch.no_grad()
def pack_figures(
    exact_BC: Tensor,
    decoded_BC: Tensor,
    *,
    temperatures: Sequence[float],
    captured: float,
    dropped_mass_B: Tensor | None = None,
) -> Tensor:
    """Return the audit figures of rows as one float64 tensor: one asynchronous copy to the host.

    `softlabels.audit.Audit.add` is the reference; arguments as there, KL is measured at `temperatures`.

    Returns:
        [3 + C + T · B], for `unpack_figures`.
    """
    classes = exact_BC.shape[1]
    sums = torch.zeros(_SUMS + classes, dtype=torch.float64, device=exact_BC.device)
    kl_TB: list[Tensor] = []
    step = max(1, _BLOCK_ENTRIES // max(1, classes))
    for start in range(0, len(exact_BC), step):
        part = slice(start, start + step)
        exact, decoded = exact_BC[part].double(), decoded_BC[part].double()
        p_BC = torch.softmax(exact, dim=-1)
        error_BC = torch.softmax(decoded, dim=-1) - p_BC
        dropped = p_BC.where(decoded.isneginf(), 0.0) if dropped_mass_B is None else dropped_mass_B[part]
        agreements = exact_BC[part].argmax(dim=1) == decoded_BC[part].argmax(dim=1)
        scalars = [each.sum(dtype=torch.float64) for each in (agreements, dropped, error_BC.square())]
        sums += torch.cat([torch.stack(scalars), error_BC.sum(dim=0)])
        kl_TB.append(torch.stack([_kl(exact * (captured / t), decoded * (captured / t)) for t in temperatures]))
    return torch.cat([sums, torch.cat(kl_TB, dim=1).flatten()])


def unpack_figures(packed: NDArray[np.float64], *, classes: int, temperatures: Sequence[float]) -> ErrorSums:
    """Return the figures that `pack_figures` packed."""
    kl_TB = packed[_SUMS + classes :].reshape(len(temperatures), -1)
    return ErrorSums(
        rows=kl_TB.shape[1],
        top1_agreements=int(packed[0]),
        dropped_mass=float(packed[1]),
        squared_error=float(packed[2]),
        error_C=packed[_SUMS : _SUMS + classes],
        kl_nats_B=dict(zip(temperatures, kl_TB, strict=True)),
    )


def _kl(exact_BC: Tensor, decoded_BC: Tensor) -> Tensor:
    # As `softmath.kl_divergence`: p log(p/q) - p + q, whose terms are never negative and cancel no digits.
    logp, logq = torch.log_softmax(exact_BC, dim=-1), torch.log_softmax(decoded_BC, dim=-1)
    p, q, gap = logp.exp(), logq.exp(), logq - logp
    small_gap = p * (torch.expm1(gap) - gap)
    # `where`, because p = 0 times an infinite gap would be NaN.
    large_gap = q - p - torch.where(p == 0, torch.zeros_like(p), p * gap)
    return torch.where(gap.abs() < 1, small_gap, large_gap).sum(dim=-1)


def _blamed_ids(error: EncodingError, ids: IdArray, rows_per_id: int) -> list[int | str]:
    """Return the ids of the rows that an encoding refuses, each once."""
    rows = sorted({row // rows_per_id for row in error.context.get("rows", [])})
    return list(dict.fromkeys(ids[rows].tolist()))
