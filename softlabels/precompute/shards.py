"""How one shard is computed: inputs in batches through every teacher, averaged, encoded, audited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabels.audit import Audit
from softlabels.encodings import Encoding, draw_keys
from softlabels.ensemble import Combined, combine
from softlabels.errors import EncodingError, NonFiniteLogitsError, TeacherError
from softlabels.ids import IdArray
from softlabels.manifest import Manifest, MeanKind
from softlabels.precompute.device_audit import figures_on_device
from softlabels.precompute.teachers import Teacher
from softlabels.progress import Progress
from softlabels.transfer import Samples, TransferSet, sample_fingerprints

_SHOWN = 5
"""How many sample ids a message spells out."""


@dataclass(frozen=True, kw_only=True)
class ComputedShard:
    """All that a shard's writer needs; arrays are [rows of the shard, …]."""

    ids: IdArray
    encoded: dict[str, NDArray[Any]]
    fingerprints: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    audit: Audit


class ShardComputer:
    """Computes shards of one plan with one set of teachers."""

    def __init__(
        self,
        plan: Manifest,
        transfer_set: TransferSet,
        teachers: Sequence[Teacher],
        *,
        encoding: Encoding,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self._plan, self._transfer_set, self._teachers = plan, transfer_set, teachers
        self._batch_size, self._device = batch_size, device
        self._encoding = encoding

    def compute(self, rows: range, progress: Progress) -> ComputedShard:
        """Compute the targets of these rows of the store.

        Batches start at the shard's first row, so that a shard computed again is computed in the same batches: the
        kernels of some devices round differently for another batch size.

        Raises:
            NonFiniteLogitsError, TeacherError, EncodingError: with the sample ids that are to blame.
        """
        spec = self._plan.temperature
        audit = Audit(audit_temperatures(self._plan))
        pieces: list[tuple[Samples, dict[str, NDArray[Any]], NDArray[np.uint8]]] = []
        for start in range(rows.start, rows.stop, self._batch_size):
            positions = np.arange(start, min(start + self._batch_size, rows.stop), dtype=np.int64)
            samples = self._transfer_set.take(positions)
            answers = ask(self._teachers, samples, self._device)
            logits_RC = rows_to_keep(answers, self._teachers, self._plan)
            on_device = self._encode(logits_RC, samples)
            audit.absorb(
                figures_on_device(
                    logits_RC,
                    self._encoding.decode_torch(on_device),
                    temperatures=audit.temperatures,
                    captured=spec.captured,
                    dropped_mass_B=on_device.get("tail_mass"),
                )
            )
            encoded = {name: tensor.cpu().numpy() for name, tensor in on_device.items()}
            if self._plan.members is not None:
                encoded = {k: v.reshape(len(positions), self._plan.members, *v.shape[1:]) for k, v in encoded.items()}
            pieces.append((samples, encoded, sample_fingerprints(samples.inputs)))
            progress.advance(len(positions))
        return _joined(pieces, audit)

    def _encode(self, logits_RC: Tensor, samples: Samples) -> dict[str, Tensor]:
        keys = draw_keys(self._plan.name, samples.ids)
        try:
            return self._encoding.encode_torch(logits_RC, keys_B=keys)
        except EncodingError as error:
            rows_a_sample = len(logits_RC) // len(samples.ids)
            blamed = samples.ids[sorted({row // rows_a_sample for row in error.context.get("rows", [])})].tolist()
            raise EncodingError(f"{error.message} (sample ids {_listed(blamed)})", ids=blamed) from error


def ask(teachers: Sequence[Teacher], samples: Samples, device: torch.device) -> list[Tensor]:
    """Every teacher's logits of these samples, [B, C] each.

    Raises:
        NonFiniteLogitsError: an answer holds NaN or Inf. TeacherError: another number of rows than samples.
    """
    inputs = torch.from_numpy(np.ascontiguousarray(samples.inputs)).to(device)
    answers = [teacher.logits(inputs) for teacher in teachers]
    for teacher, answer in zip(teachers, answers, strict=True):
        _refuse_unsound(answer, samples, teacher.spec.name)
    return answers


def averaged(answers: Sequence[Tensor], teachers: Sequence[Teacher], mean: MeanKind, temperature: float) -> Combined:
    """The ensemble's mean of its members' answers. Raises TeacherShapeError: the members' shapes differ."""
    return combine(
        answers,
        mean=mean,
        temperature=temperature,
        weights=[teacher.spec.weight for teacher in teachers],
        names=[teacher.spec.name for teacher in teachers],
    )


def rows_to_keep(answers: Sequence[Tensor], teachers: Sequence[Teacher], plan: Manifest) -> Tensor:
    """logits tempered as the plan captures them, each row's largest 0.

    Returns:
        [B, C] of the members' mean; where every member is kept, [B · M, C] with a sample's members side by side.
    """
    spec = plan.temperature
    if plan.members is not None:
        each = [combine([answer], mean="none", temperature=1.0).logits_BC for answer in answers]
        return torch.stack(each, dim=1).flatten(0, 1)
    combined = averaged(answers, teachers, plan.mean, spec.default)
    # Truncated and sampled rows are locked to the job's temperature, so they are taken of rows tempered with it.
    return combined.logits_BC * (combined.captured_temperature / spec.captured)


def audit_temperatures(plan: Manifest) -> tuple[float, ...]:
    """The temperatures at which an encoding's error is measured: those that the store can be asked for most."""
    spec = plan.temperature
    return (spec.captured,) if spec.locked else tuple(sorted({1.0, spec.default}))


def _refuse_unsound(answer: Tensor, samples: Samples, name: str) -> None:
    if answer.ndim == 2 and len(answer) != len(samples.ids):
        raise TeacherError(f"teacher {name!r} answers {len(answer)} rows for {len(samples.ids)} samples")
    finite = answer.isfinite()
    if not bool(finite.all()):
        per_row = finite.reshape(len(answer), -1).all(dim=1).cpu().numpy()
        blamed = samples.ids[~per_row].tolist() if len(per_row) == len(samples.ids) else []
        raise NonFiniteLogitsError(
            f"teacher {name!r} gives NaN or Inf for {len(blamed)} samples (sample ids {_listed(blamed)}): the shard is "
            "refused and nothing of it is kept; look at these inputs, or run the teacher in f32",
            teacher=name,
            ids=blamed,
        )


def _listed(ids: list[Any]) -> str:
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return ", ".join(map(repr, ids[:_SHOWN])) + more


def _joined(pieces: list[tuple[Samples, dict[str, NDArray[Any]], NDArray[np.uint8]]], audit: Audit) -> ComputedShard:
    unlabelled = all(samples.labels is None for samples, _, _ in pieces)
    ids: NDArray[Any] = np.concatenate([samples.ids for samples, _, _ in pieces])
    return ComputedShard(
        ids=ids,
        encoded={name: np.concatenate([encoded[name] for _, encoded, _ in pieces]) for name in pieces[0][1]},
        fingerprints=np.concatenate([fingerprints for _, _, fingerprints in pieces]),
        labels=None if unlabelled else np.concatenate([_labels(samples) for samples, _, _ in pieces]),
        audit=audit,
    )


def _labels(samples: Samples) -> NDArray[np.int64]:
    return np.full(len(samples.ids), -1, dtype=np.int64) if samples.labels is None else samples.labels
