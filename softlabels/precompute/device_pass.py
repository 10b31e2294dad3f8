"""What happens to one batch on the device: inputs in, all teachers, mean, encoding, audit, and one copy out.

A pass has two halves, so that the device always has work: `start` queues the copy of the inputs and the forward passes
and returns at once; `finish` does the rest, beside the next batch's forward passes, and lands the encoded rows in their
place in the shard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from softlabels.encodings import Encoding, Hidden
from softlabels.errors import EncodingError
from softlabels.ids import IdArray
from softlabels.manifest import Manifest
from softlabels.precompute.answers import answers_of, audit_temperatures, listed, refuse_non_finite, rows_to_keep
from softlabels.precompute.device_audit import audited, pack_figures
from softlabels.precompute.lanes import Lanes
from softlabels.precompute.rows import RowBatch, RowMaker
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
                answers = answers_of(self.teachers, uploaded, batch, self._maker)
        return Started(batch=batch, answers=answers, mark=self.lanes.mark())

    def finish(self, started: Started, landing: Landing) -> None:
        """Bring a batch's rows to where they go; on return the copies are on their way.

        Raises:
            NonFiniteLogitsError, TeacherError, EncodingError: with the sample ids that are to blame.
        """
        batch = started.batch
        with torch.inference_mode(), self.lanes.beside(started.mark, started.answers):
            refuse_non_finite(started.answers, self.teachers, batch.ids)
            kept_RC = rows_to_keep(started.answers, self.teachers, self.plan)
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
        exact_AC = kept_RC[chosen]
        if len(exact_AC) == 0:
            return None
        if isinstance(self._encoding, Hidden):  # what is kept are hidden states; what they stand for are their logits
            exact_AC = self._encoding.logits_torch(exact_AC)
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
