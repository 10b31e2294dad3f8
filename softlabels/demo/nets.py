"""Networks of the paper's MNIST experiment: a student of two layers of 800 units, a teacher of two layers of 1,200.

A job file names a factory as `softlabels.demo.nets:teacher_mlp`; all arguments are keywords. The networks take the
transfer set's uint8 images and scale them inside, since fingerprints are taken of the transfer set's own bytes.

Legend: B rows, C classes, F features.
Source: Hinton, Vinyals, Dean 2015, section 3; dropout rates: Hinton et al. 2012 (arXiv 1207.0580), appendix A.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

UINT8_MAX = 255.0
BYTE_VALUES = 256
"""Dropout rates are multiples of 1/256, since one random byte decides over one unit."""


class ByteDropout(nn.Module):
    """Dropout of a fraction `rate` of the units, 0 ≤ rate < 1, by one random byte a unit: one 64-bit draw for eight.

    On a CPU `nn.Dropout` draws one Bernoulli number per unit on one core, which is two thirds of the teacher's
    training step; this takes a few percent.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"a dropout rate is at least 0 and below 1, not {rate}: it is the fraction dropped")
        self.dropped_bytes = min(round(rate * BYTE_VALUES), BYTE_VALUES - 1)

    def forward(self, units_BF: Tensor) -> Tensor:
        """Return units_BF with about `rate` of its units set to 0 and the rest scaled up; unchanged in eval mode."""
        if not self.training or self.dropped_bytes == 0:
            return units_BF
        count = units_BF.numel()
        words = torch.empty((count + 7) // 8, dtype=torch.int64, device=units_BF.device)
        words.random_(torch.iinfo(torch.int64).min, None)
        kept = words.view(torch.uint8)[:count].view(units_BF.shape) >= self.dropped_bytes
        scale = BYTE_VALUES / (BYTE_VALUES - self.dropped_bytes)
        return units_BF * (kept.to(units_BF.dtype) * scale)

    def extra_repr(self) -> str:
        """Return the rate that is applied."""
        return f"rate={self.dropped_bytes / BYTE_VALUES:.4f}"


class Mlp(nn.Module):
    """Fully connected layers with ReLU between them; `widths` are from the input features to the classes."""

    def __init__(self, widths: tuple[int, ...], *, input_dropout: float = 0.0, hidden_dropout: float = 0.0) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(widths))
        self.input_dropout = ByteDropout(input_dropout)
        self.hidden_dropout = ByteDropout(hidden_dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits_BC of inputs [B, ...]: uint8 0 … 255, or floats that are already scaled."""
        scaled = inputs.float() / UINT8_MAX if inputs.dtype == torch.uint8 else inputs
        units_BF = self.input_dropout(scaled.flatten(1))
        *hidden, last = self.linears
        for linear in hidden:
            units_BF = self.hidden_dropout(torch.relu(linear(units_BF)))
        logits_BC: Tensor = last(units_BF)
        return logits_BC


def student_mlp(*, in_features: int = 784, hidden: int = 800, classes: int = 10) -> Mlp:
    """Return the paper's student, 784-800-800-10, without dropout."""
    return Mlp((in_features, hidden, hidden, classes))


def teacher_mlp(
    *,
    in_features: int = 784,
    hidden: int = 1200,
    classes: int = 10,
    input_dropout: float = 0.2,
    hidden_dropout: float = 0.5,
) -> Mlp:
    """Return the paper's teacher, 784-1200-1200-10, with dropout on the input and on both hidden layers."""
    widths = (in_features, hidden, hidden, classes)
    return Mlp(widths, input_dropout=input_dropout, hidden_dropout=hidden_dropout)
