"""What happens to one batch on the device: inputs in, all teachers, mean, encoding, audit, and one copy out.

A pass has two halves, so that the device always has work: `start` queues the copy of the inputs and the forward passes
and returns at once; `finish` does the rest, beside the next batch's forward passes, and lands the encoded rows in their
place in the shard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabels.audit import ErrorSums
from softlabels.encodings import Encoding
from softlabels.errors import EncodingError
from softlabels.ids import IdArray
from softlabels.manifest import Manifest
from softlabels.precompute.pipeline.device import Lanes
from softlabels.precompute.pipeline.inference import (
    answers_of,
    audit_temperatures,
    listed,
    refuse_non_finite,
    rows_to_keep,
)
from softlabels.precompute.row_batches import RowBatch, RowMaker
from softlabels.precompute.teachers import Teacher


class Landing(Protocol):
    """Where the encoded rows of a batch go."""

    def land(self, batch: RowBatch, encoded: Mapping[str, Tensor]) -> int:
        """Begin to copy a batch's rows to the host; returns the number of its first row in the store."""
        ...

    def land_figures(self, packed: Tensor) -> None:
        """Begin to copy the audit's figures of a batch."""
        ...

    def landing(self, done: torch.cuda.Event | None) -> None:
        """All that was begun is there when `done` is; at once, where it is None."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Started:
    """A batch whose forward passes are queued.

    Attributes:
        answers: [R, C] a teacher.
        mark: where in the device's work they are done.
    """

    batch: RowBatch
    answers: list[Tensor]
    mark: torch.cuda.Event | None


class DevicePass:
    """All that one plan does on one device.

    Args:
        plan: what is kept.
        maker: how rows follow from inputs.
        teachers: on `lanes.device`.
        encoding: with what it learnt.
        lanes: of the device.
    """

    def __init__(
        self, plan: Manifest, maker: RowMaker, teachers: Sequence[Teacher], *, encoding: Encoding, lanes: Lanes
    ) -> None:
        self.plan, self._maker = plan, maker
        self.teachers = [_on_device(teacher, lanes.device) for teacher in teachers]
        self._encoding, self.lanes = encoding, lanes
        self._temperatures = audit_temperatures(plan)

    def by(self, teachers: Sequence[Teacher]) -> DevicePass:
        """The same pass by other teachers."""
        return DevicePass(self.plan, self._maker, teachers, encoding=self._encoding, lanes=self.lanes)

    def start(self, batch: RowBatch, inputs: Tensor) -> Started:
        """Queue the forward passes of a batch.

        Args:
            batch: whose `inputs` the tensor `inputs` holds, pinned where the lanes ask for it.
        Raises:
            TeacherError: a teacher fails or answers with another shape.
        """
        with torch.inference_mode():
            uploaded = self.lanes.upload(inputs)
            with self.lanes.forward():
                answers = answers_of(self.teachers, uploaded, batch, self._maker, row_kind=self._encoding.row_kind)
        return Started(batch=batch, answers=answers, mark=self.lanes.mark())

    def finish(self, started: Started, landing: Landing) -> None:
        """Bring a batch's rows to where they go; on return the copies are on their way.

        Raises:
            NonFiniteLogitsError, TeacherError, EncodingError: with the sample ids that are to blame.
        """
        batch = started.batch
        with torch.inference_mode(), self.lanes.beside(started.mark, started.answers):
            refuse_non_finite(started.answers, self.teachers, batch.ids)
            kept_RC = rows_to_keep(started.answers, self.teachers, self.plan, row_kind=self._encoding.row_kind)
            encoded = self._encode(kept_RC, batch)
            first_row = landing.land(batch, encoded)
            figures = self._figures(kept_RC, encoded, first_row)
            if figures is not None:
                landing.land_figures(figures)
            landing.landing(self.lanes.landed())

    def _encode(self, kept_RC: Tensor, batch: RowBatch) -> dict[str, Tensor]:
        # A store of members keeps no encoding that draws, and its rows outnumber the keys.
        keys = batch.keys if self.plan.members is None else None
        try:
            return self._encoding.encode_torch(kept_RC, keys_B=keys)
        except EncodingError as error:
            blamed = _blamed(error, batch.ids, self.plan.members or 1)
            raise EncodingError(f"{error.message} (sample ids {listed(blamed)})", ids=blamed) from error

    def _figures(self, kept_RC: Tensor, encoded: dict[str, Tensor], first_row: int) -> Tensor | None:
        members = self.plan.members or 1
        chosen = audited(first_row * members, len(kept_RC), self.plan.classes)
        exact_AC = self._encoding.logits_of_torch(kept_RC[chosen])
        if len(exact_AC) == 0:
            return None
        measured = encoded if len(exact_AC) == len(kept_RC) else {k: v[chosen].contiguous() for k, v in encoded.items()}
        return pack_figures(
            exact_AC,
            self._encoding.decode_torch(measured),
            temperatures=self._temperatures,
            captured=self.plan.temperature.captured,
            dropped_mass_B=measured.get("tail_mass"),
        )


def _on_device(teacher: Teacher, device: torch.device) -> Teacher:
    """The teacher with its order of classes on the device: copied there for every batch, it would stall each."""
    return teacher if teacher.order_C is None else replace(teacher, order_C=teacher.order_C.to(device))


def _blamed(error: EncodingError, ids: IdArray, rows_an_id: int) -> list[int | str]:
    """The ids of the rows that an encoding refuses, each once."""
    rows = sorted({row // rows_an_id for row in error.context.get("rows", [])})
    return list(dict.fromkeys(ids[rows].tolist()))


# MERGED from softlabels.precompute.pipeline.device_step: What an audit needs of a batch, computed on the device that holds the rows; `softlabels.audit` is the reference.
#
# Legend: B rows, C classes. In float64, as the reference: the KL of a good encoding is below what float32 can tell. That
# costs some 60 passes over a row in float64, which beside a teacher is nothing at 1,000 classes and a few per cent at
# 100,000: of rows with more than `MOST_ENTRIES_A_ROW` classes only every so manyth is measured, by its number in the
# store, so that a shard computed again is audited on the same rows. The audit says on how many.


MOST_ENTRIES_A_ROW = 1 << 14
"""Classes up to which every row is audited; above, one row in classes / 8,192."""

_STRIDE_ENTRIES = 1 << 13
_BLOCK_ENTRIES = 1 << 22
"""Entries that are measured at once: 32 MiB a float64 temporary, of which there are some ten."""

_SUMS = 3


def audited(first_row: int, rows: int, classes: int) -> slice:
    """Which rows of a batch are measured.

    Args:
        first_row: number of the batch's first row in the store; `rows`: of the batch.
        classes: a row.
    """
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
    """The figures of these rows as one float64 tensor, which takes one copy to the host and nobody waits for.

    Args:
        exact_BC, decoded_BC: logits tempered at `captured`, as they went into the encoding and came out of it.
        temperatures: what KL is measured at.
        captured: see there.
        dropped_mass_B: what the encoding cut off and knows of; left out, the mass of classes that came back as -inf.
    Returns:
        [3 + C + B · temperatures], for `unpack_figures`.
    """
    block = max(1, _BLOCK_ENTRIES // max(1, exact_BC.shape[1]))
    pieces = [
        _figures(
            exact_BC[start : start + block],
            decoded_BC[start : start + block],
            temperatures,
            captured,
            None if dropped_mass_B is None else dropped_mass_B[start : start + block],
        )
        for start in range(0, len(exact_BC), block)
    ]
    totals = pieces[0][0]
    for piece in pieces[1:]:
        totals = totals + piece[0]
    return torch.cat([totals, torch.cat([kl_TB for _, kl_TB in pieces], dim=1).flatten()])


def unpack_figures(packed: NDArray[np.float64], *, classes: int, temperatures: Sequence[float]) -> ErrorSums:
    """The figures that `pack_figures` packed, on the host."""
    kl_TB = packed[_SUMS + classes :].reshape(len(temperatures), -1)
    return ErrorSums(
        rows=kl_TB.shape[1],
        top1_agreements=int(packed[0]),
        dropped_mass=float(packed[1]),
        squared_error=float(packed[2]),
        error_C=packed[_SUMS : _SUMS + classes],
        kl_nats_B=dict(zip(temperatures, kl_TB, strict=True)),
    )


def figures_on_device(
    exact_BC: Tensor, decoded_BC: Tensor, *, temperatures: Sequence[float], **known: Any
) -> ErrorSums:
    """The figures of these rows, of which only a few bytes a row leave the device; arguments as of `pack_figures`."""
    packed = pack_figures(exact_BC, decoded_BC, temperatures=temperatures, **known)
    return unpack_figures(packed.cpu().numpy(), classes=exact_BC.shape[1], temperatures=temperatures)


def _figures(
    exact_BC: Tensor, decoded_BC: Tensor, temperatures: Sequence[float], captured: float, known_B: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sums over the rows, [3 + C], and the KL of each at each temperature, [T, B]."""
    wide, narrow = exact_BC.double(), decoded_BC.double()
    p_BC = torch.softmax(wide, dim=-1)
    error_BC = torch.softmax(narrow, dim=-1) - p_BC
    dropped = torch.where(decoded_BC.isneginf(), p_BC, 0.0) if known_B is None else known_B
    agreements = (exact_BC.argmax(dim=1) == decoded_BC.argmax(dim=1)).sum(dtype=torch.float64)
    sums = torch.stack([agreements, dropped.sum(dtype=torch.float64), error_BC.square().sum()])
    kl = [_kl(wide * (captured / t), narrow * (captured / t)) for t in temperatures]
    return torch.cat([sums, error_BC.sum(dim=0)]), torch.stack(kl)


def _kl(exact_BC: Tensor, decoded_BC: Tensor) -> Tensor:
    # As `softmath.kl_divergence`: p log(p/q) - p + q, whose terms are never negative and cancel no digits.
    logp, logq = torch.log_softmax(exact_BC, dim=-1), torch.log_softmax(decoded_BC, dim=-1)
    p, q, gap = logp.exp(), logq.exp(), logq - logp
    near = p * (torch.expm1(gap) - gap)
    far = q - p - torch.where(p == 0, torch.zeros_like(p), p * gap)
    return torch.where(gap.abs() < 1, near, far).sum(dim=-1)
