"""What happens to one batch on the device: inputs in, all teachers, mean, encoding, audit, and one copy out.

A pass has two halves, so that the device always has work: `start` queues the copy of the inputs and the forward passes
and returns at once; `finish` does the rest, beside the next batch's forward passes, and lands the encoded rows in their
place in the shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from softlabels.encodings import Encoding
from softlabels.errors import EncodingError
from softlabels.ids import IdArray
from softlabels.manifest import Manifest
from softlabels.precompute.answers import answers_of, audit_temperatures, listed, refuse_non_finite, rows_to_keep
from softlabels.precompute.device_audit import audited, pack_figures
from softlabels.precompute.lanes import Lanes
from softlabels.precompute.rows import RowBatch, RowMaker
from softlabels.precompute.shards import ShardWork
from softlabels.precompute.teachers import Teacher


@dataclass(frozen=True, kw_only=True, eq=False)
class Started:
    """A batch whose forward passes are queued.

    Attributes:
        work, first: the shard that its rows belong to, and which of the shard's rows is its first.
        answers: [R, C] a teacher.
        mark: where in the device's work they are done.
    """

    work: ShardWork
    first: int
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
        self.plan, self._maker, self._teachers = plan, maker, teachers
        self._encoding, self.lanes = encoding, lanes
        self._temperatures = audit_temperatures(plan)

    def start(self, work: ShardWork, first: int, batch: RowBatch, inputs: Tensor) -> Started:
        """Queue the forward passes of a batch.

        Args:
            work, first: the shard, and which of its rows is the batch's first.
            batch: whose `inputs` the tensor `inputs` holds, pinned where the lanes ask for it.
        Raises:
            TeacherError: a teacher fails or answers with another shape.
        """
        uploaded = self.lanes.upload(inputs)
        with self.lanes.forward():
            answers = answers_of(self._teachers, uploaded, batch, self._maker)
        return Started(work=work, first=first, batch=batch, answers=answers, mark=self.lanes.mark())

    def finish(self, started: Started) -> None:
        """Bring a batch's rows to their place in the shard; on return the copies are on their way.

        Raises:
            NonFiniteLogitsError, TeacherError, EncodingError: with the sample ids that are to blame.
        """
        batch, work = started.batch, started.work
        with self.lanes.beside(started.mark, started.answers), torch.inference_mode():
            refuse_non_finite(started.answers, self._teachers, batch.ids)
            kept_RC = rows_to_keep(started.answers, self._teachers, self.plan)
            encoded = self._encode(kept_RC, batch)
            work.land(started.first, batch, encoded)
            figures = self._figures(kept_RC, encoded, work.rows.start + started.first)
            if figures is not None:
                work.land_figures(figures)
            work.landed = self.lanes.landed()

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
        chosen = audited(first_row * members, len(kept_RC), kept_RC.shape[1])
        exact_AC = kept_RC[chosen]
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


def _blamed(error: EncodingError, ids: IdArray, rows_an_id: int) -> list[int | str]:
    """The ids of the rows that an encoding refuses, each once."""
    rows = sorted({row // rows_an_id for row in error.context.get("rows", [])})
    return list(dict.fromkeys(ids[rows].tolist()))
