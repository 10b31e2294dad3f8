"""Which networks does the MNIST job use? The paper's: a student of two layers of 800 units, a teacher of two of 1,200.

Each factory takes keyword arguments only, so that a job file can name it as `softlabels.demo.nets:teacher_mlp`.
The nets read the transfer set's own uint8 images and scale them inside: the transfer set stays the bytes that its
fingerprint was taken of.

Legend: B rows, C classes, F features.
Source: Hinton, Vinyals, Dean 2015, section 3; dropout rates: Hinton et al. 2012 (arXiv 1207.0580), appendix A.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

UINT8_MAX = 255.0
BYTE_VALUES = 256
"""Dropout rates are whole 256ths, since one random byte decides over one unit."""


class ByteDropout(nn.Module):
    """Dropout that decides over a unit by one random byte: eight units for one 64-bit draw.

    On a CPU `nn.Dropout` draws one Bernoulli number a unit on one core, which is two thirds of a training step of the
    teacher; this takes a few percent. The rate is rounded to a whole 256th and kept units are scaled by exactly that.

    Args:
        rate: share of units dropped while training, in [0, 1).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"a dropout rate is at least 0 and below 1, not {rate}: it is the share of units dropped")
        self.dropped_bytes = min(round(rate * BYTE_VALUES), BYTE_VALUES - 1)

    def forward(self, units_BF: Tensor) -> Tensor:
        """`units_BF` with about `rate` of its units set to 0 and the rest scaled up; unchanged in eval mode."""
        if not self.training or self.dropped_bytes == 0:
            return units_BF
        count = units_BF.numel()
        words = torch.empty((count + 7) // 8, dtype=torch.int64, device=units_BF.device)
        words.random_(torch.iinfo(torch.int64).min, None)
        kept = words.view(torch.uint8)[:count].view(units_BF.shape) >= self.dropped_bytes
        scale = BYTE_VALUES / (BYTE_VALUES - self.dropped_bytes)
        return units_BF * (kept.to(units_BF.dtype) * scale)

    def extra_repr(self) -> str:
        """The rate as it is applied."""
        return f"rate={self.dropped_bytes / BYTE_VALUES:.4f}"


class Mlp(nn.Module):
    """A network of fully connected layers with ReLU between them.

    Args:
        widths: units a layer, from the input features to the classes.
        input_dropout: share of input features dropped while training.
        hidden_dropout: share of hidden units dropped while training.
    """

    def __init__(self, widths: tuple[int, ...], *, input_dropout: float = 0.0, hidden_dropout: float = 0.0) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(widths))
        self.input_dropout = ByteDropout(input_dropout)
        self.hidden_dropout = ByteDropout(hidden_dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        """logits_BC of a batch [B, ...]: uint8 0..255, or floats that are scaled already."""
        scaled = inputs.float() / UINT8_MAX if inputs.dtype == torch.uint8 else inputs
        units_BF = self.input_dropout(scaled.flatten(1))
        *hidden, last = self.linears
        for linear in hidden:
            units_BF = self.hidden_dropout(torch.relu(linear(units_BF)))
        logits_BC: Tensor = last(units_BF)
        return logits_BC


def student_mlp(*, in_features: int = 784, hidden: int = 800, classes: int = 10) -> Mlp:
    """The paper's student, 784-800-800-10: no dropout, trained without jitter."""
    return Mlp((in_features, hidden, hidden, classes))


def teacher_mlp(
    *,
    in_features: int = 784,
    hidden: int = 1200,
    classes: int = 10,
    input_dropout: float = 0.2,
    hidden_dropout: float = 0.5,
) -> Mlp:
    """The paper's teacher, 784-1200-1200-10, with dropout on the input and on both hidden layers."""
    widths = (in_features, hidden, hidden, classes)
    return Mlp(widths, input_dropout=input_dropout, hidden_dropout=hidden_dropout)
