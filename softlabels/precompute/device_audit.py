"""What an audit needs of a batch, computed on the device that holds the rows; `softlabels.audit` is the reference.

Legend: B rows, C classes. In float64, as the reference: the KL of a good encoding is below what float32 can tell.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from softlabels.audit import RowFigures


@torch.no_grad()
def figures_on_device(
    exact_BC: Tensor,
    decoded_BC: Tensor,
    *,
    temperatures: Sequence[float],
    captured: float,
    dropped_mass_B: Tensor | None = None,
) -> RowFigures:
    """The figures of these rows; only they, a few bytes a row, leave the device.

    Args:
        exact_BC, decoded_BC: logits tempered at `captured`, as they went into the encoding and came out of it.
        temperatures: what KL is measured at.
        captured: see there.
        dropped_mass_B: what the encoding cut off and knows of; left out, the mass of classes that came back as -inf.
    """
    wide, narrow = exact_BC.double(), decoded_BC.double()
    p_BC = torch.softmax(wide, dim=-1)
    error_BC = torch.softmax(narrow, dim=-1) - p_BC
    dropped = p_BC[decoded_BC.isneginf()] if dropped_mass_B is None else dropped_mass_B
    kl = {
        temperature: _kl(wide * (captured / temperature), narrow * (captured / temperature))
        for temperature in temperatures
    }
    return RowFigures(
        rows=len(exact_BC),
        top1_agreements=int((exact_BC.argmax(dim=1) == decoded_BC.argmax(dim=1)).sum()),
        dropped_mass=float(dropped.sum(dtype=torch.float64)),
        squared_error=float(error_BC.square().sum()),
        error_C=error_BC.sum(dim=0).cpu().numpy(),
        kl_nats_B={temperature: kl_B.cpu().numpy() for temperature, kl_B in kl.items()},
    )


def _kl(exact_BC: Tensor, decoded_BC: Tensor) -> Tensor:
    # As `softmath.kl_divergence`: p log(p/q) - p + q, whose terms are never negative and cancel no digits.
    logp, logq = torch.log_softmax(exact_BC, dim=-1), torch.log_softmax(decoded_BC, dim=-1)
    p, q, gap = logp.exp(), logq.exp(), logq - logp
    near = p * (torch.expm1(gap) - gap)
    far = q - p - torch.where(p == 0, torch.zeros_like(p), p * gap)
    return torch.where(gap.abs() < 1, near, far).sum(dim=-1)
