"""What an audit needs of a batch, computed on the device that holds the rows; `softlabels.audit` is the reference.

Legend: B rows, C classes. In float64, as the reference: the KL of a good encoding is below what float32 can tell. That
costs some 60 passes over a row in float64, which beside a teacher is nothing at 1,000 classes and a few per cent at
100,000: of rows with more than `MOST_ENTRIES_A_ROW` classes only every so manyth is measured, by its number in the
store, so that a shard computed again is audited on the same rows. The audit says on how many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabels.audit import RowFigures

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


def unpack_figures(packed: NDArray[np.float64], *, classes: int, temperatures: Sequence[float]) -> RowFigures:
    """The figures that `pack_figures` packed, on the host."""
    kl_TB = packed[_SUMS + classes :].reshape(len(temperatures), -1)
    return RowFigures(
        rows=kl_TB.shape[1],
        top1_agreements=int(packed[0]),
        dropped_mass=float(packed[1]),
        squared_error=float(packed[2]),
        error_C=packed[_SUMS : _SUMS + classes],
        kl_nats_B=dict(zip(temperatures, kl_TB, strict=True)),
    )


def figures_on_device(
    exact_BC: Tensor, decoded_BC: Tensor, *, temperatures: Sequence[float], **known: Any
) -> RowFigures:
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
