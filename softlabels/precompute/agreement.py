"""Do the teachers still say what the store keeps? Sampled rows computed again and compared."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softlabels.encodings import draw_keys
from softlabels.errors import JobError
from softlabels.precompute.answers import ask, rows_to_keep
from softlabels.precompute.job import Job
from softlabels.precompute.planning import choose_device, load_teachers, load_transfer_set
from softlabels.precompute.rows import SingleRows
from softlabels.store.faults import Fault, Report, ShowProgress, silent
from softlabels.store.rows import LocalRows

SAMPLED_ROWS = 256
LEAST_COSINE = 0.9999
"""Between the target kept and the target computed again: other kernels round differently, other weights do not pass."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How well the teachers agree with the store.

    Attributes:
        samples: how many were asked about.
        least_cosine, mean_cosine: between kept and fresh targets, both through the store's encoding.
    """

    samples: int
    least_cosine: float
    mean_cosine: float

    def to_json(self) -> dict[str, object]:
        """The figures as JSON-able facts."""
        return asdict(self)


def check_agreement(
    where: Path,
    job: Job,
    report: Report,
    *,
    samples: int = SAMPLED_ROWS,
    seed: int = 0,
    show: ShowProgress = silent,
) -> Agreement:
    """Run the job's teachers on random samples and compare with what the store keeps; faults go into the report.

    Args:
        where: the store, one row a sample.
        job: names the teachers and the transfer set; its store is not looked at.
        report: of `verify`; a sample whose input or target differs is added as a fault with its row.
        samples: how many to draw.
        seed: of the draw.
    Raises:
        JobError: the store keeps views or sequences, or the job has other teachers in number.
    """
    rows, device = LocalRows(where), choose_device(job.run.device)
    manifest = rows.manifest
    if manifest.layout.kind != "single":
        raise JobError(
            f"{manifest.name!r} keeps {manifest.layout.kind}: only one row a sample can be computed again yet"
        )
    data, teachers = load_transfer_set(job), load_teachers(job, device)
    if len(teachers) != len(manifest.teachers):
        raise JobError(f"the job has {len(teachers)} teachers, the store was made by {len(manifest.teachers)}")
    count = min(samples, manifest.samples, len(data))
    positions = np.sort(np.random.default_rng(seed).choice(min(manifest.samples, len(data)), count, replace=False))
    cosines: list[float] = []
    maker = SingleRows(data, store=manifest.name)
    with show(count, "ask the teachers again", "samples") as progress:
        for drawn in maker.samples(positions.astype(np.int64), job.run.pilot_batch_size):
            chosen = positions[len(cosines) : len(cosines) + drawn.rows]
            kept = rows.fetch(drawn.ids, (*rows.encoding.fields, "fingerprints"))
            assert drawn.fingerprints is not None  # one row a sample has one
            other = (drawn.fingerprints != kept["fingerprints"]).any(axis=1)
            report.faults += [
                _fault(int(row), "its input is not the one that the teachers saw") for row in chosen[other]
            ]
            found = _cosines(
                rows, kept, rows_to_keep(ask(teachers, drawn, maker, device), teachers, manifest), drawn.ids
            )
            for position, cosine in zip(chosen, found.tolist(), strict=True):
                if cosine < LEAST_COSINE:
                    report.faults.append(
                        _fault(int(position), f"the teachers say something else by now (cosine {cosine:.6f})")
                    )
            cosines += found.tolist()
            progress.advance(len(chosen))
    return Agreement(samples=count, least_cosine=min(cosines), mean_cosine=float(np.mean(cosines)))


def _cosines(rows: LocalRows, kept: dict[str, Any], fresh_RC: torch.Tensor, ids: Any) -> Any:
    """Cosine of kept and fresh target of each sample; the fresh one goes through the same encoding, with its error."""
    encoding, members = rows.encoding, rows.manifest.members or 1
    keys = draw_keys(rows.manifest.name, ids) if members == 1 else None
    again = encoding.decode_torch(encoding.encode_torch(fresh_RC, keys_B=keys)).double().softmax(dim=-1)
    axes = 1 if rows.manifest.members is None else 2
    flat = {name: kept[name].reshape(-1, *kept[name].shape[axes:]) for name in encoding.fields}
    before = torch.from_numpy(encoding.decode(flat)).to(again.device).double().softmax(dim=-1)
    cosine_R = torch.nn.functional.cosine_similarity(before, again, dim=-1)
    return cosine_R.reshape(-1, members).amin(dim=1).cpu().numpy()


def _fault(row: int, message: str) -> Fault:
    return Fault(kind="contents", message=message, rows=(row, row))
