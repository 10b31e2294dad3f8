"""Which coefficients bring a basis nearest to rows where it matters?"""

from __future__ import annotations

from softlabels.encodings.arrays import Array, Ops


def weighted_fit(ops: Ops, basis_RC: Array, y: Array, weights_BC: Array, q_BR: Array, steps: int) -> Array:
    """Lessen Σ_c w_c (y - q B)²_c row by row from a first guess. Source: Hestenes and Stiefel 1952, with scaling."""
    scale_R = (basis_RC * basis_RC).sum(-1) + 1e-20
    rest = ((y - q_BR @ basis_RC) * weights_BC) @ basis_RC.T
    scaled = rest / scale_R
    direction = scaled
    size_B1 = ops.sum(rest * scaled)
    for _ in range(steps):
        image = ((direction @ basis_RC) * weights_BC) @ basis_RC.T
        length_B1 = size_B1 / (ops.sum(direction * image) + 1e-20)
        q_BR = q_BR + length_B1 * direction
        rest = rest - length_B1 * image
        scaled = rest / scale_R
        next_size_B1 = ops.sum(rest * scaled)
        direction = scaled + (next_size_B1 / (size_B1 + 1e-20)) * direction
        size_B1 = next_size_B1
    return q_BR
