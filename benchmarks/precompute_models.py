"""Models and data of the precompute benchmarks: residual networks, and images that need no disk."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from softlabels.ids import IdArray
from softlabels.manifest import IdSpec
from softlabels.transfer_set import Samples

_STAGES = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
_MEAN, _SPREAD = 0.45, 0.22


def _normalised(layer: nn.Conv2d) -> tuple[nn.Module, ...]:
    return layer, nn.BatchNorm2d(layer.out_channels)


class Block(nn.Module):
    """A residual block: two 3 × 3 convolutions, or a bottleneck of three (He et al. 2015, figure 5)."""

    def __init__(self, wide_in: int, width: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        out = 4 * width if bottleneck else width

        def convolution(a: int, b: int, size: int, step: int = 1) -> nn.Conv2d:
            return nn.Conv2d(a, b, size, step, size // 2, bias=False)

        if bottleneck:
            layers = [(wide_in, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        else:
            layers = [(wide_in, width, 3, stride), (width, out, 3, 1)]
        parts: list[nn.Module] = []
        for shape in layers:
            parts += [*_normalised(convolution(*shape)), nn.ReLU()]
        self.body = nn.Sequential(*parts[:-1])
        same = stride == 1 and wide_in == out
        self.skip = nn.Identity() if same else nn.Sequential(*_normalised(convolution(wide_in, out, 1, stride)))

    def forward(self, images: Tensor) -> Tensor:
        """Body plus skip, rectified."""
        return torch.relu(self.body(images) + self.skip(images))


class Residual(nn.Module):
    """ResNet-18 or ResNet-50 over pictures of bytes, with random weights: its time does not depend on them."""

    def __init__(self, layers: int, classes: int, *, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        parts: list[nn.Module] = [*_normalised(nn.Conv2d(3, 64, 7, 2, 3, bias=False)), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        wide = 64
        for stage, blocks in enumerate(_STAGES[layers]):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                parts.append(Block(wide, 64 << stage, stride, bottleneck=layers == 50))
                wide = (64 << stage) * (4 if layers == 50 else 1)
        self.body = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, classes))

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits [B, classes] of uint8 pictures [B, 3, height, width]."""
        return self.body((pictures.float() / 255 - _MEAN) / _SPREAD)


class Cheap(nn.Module):
    """A teacher of a few numbers, so that only rows count."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(features, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [B, classes]."""
        return self.layer(inputs)


class Pictures:
    """Random pictures as bytes; many samples are served from a few, so that no disk and little memory is needed."""

    name = "pictures"

    def __init__(self, samples: int, size: int, *, distinct: int = 512) -> None:
        self._samples = samples
        rng = np.random.default_rng(0)
        self._pictures = rng.integers(0, 256, size=(min(samples, distinct), 3, size, size), dtype=np.uint8)

    def __len__(self) -> int:
        return self._samples

    def id_spec(self) -> IdSpec:
        """Ids count up from 0."""
        return IdSpec(kind="int", dense_start=0)

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """The pictures at these positions."""
        return Samples(ids=positions, inputs=self._pictures[positions % len(self._pictures)], labels=None)


class Numbers:
    """A few numbers a sample, made from its position: a transfer set of any size that holds nothing."""

    name = "numbers"

    def __init__(self, samples: int, features: int) -> None:
        self._samples, self._features = samples, features

    def __len__(self) -> int:
        return self._samples

    def id_spec(self) -> IdSpec:
        """Ids count up from 0."""
        return IdSpec(kind="int", dense_start=0)

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """The samples at these positions."""
        ids: IdArray = positions
        inputs = np.sin(positions[:, None] * (1.0 + np.arange(self._features))).astype(np.float32)
        return Samples(ids=ids, inputs=inputs, labels=None)


def random_crop(size: int) -> Callable[..., Tensor]:
    """A view transform: a square of a picture of bytes, anywhere in it."""

    def crop(picture: Tensor, generator: torch.Generator) -> Tensor:
        top, left = torch.randint(0, picture.shape[1] - size + 1, (2,), generator=generator).tolist()
        return picture[:, top : top + size, left : left + size]

    return crop
