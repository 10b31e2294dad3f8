"""Image preprocessing of a teacher as a table in the job file: layout, resize, crop, scale, normalise.

Shapes: B images, H rows, W columns; channels last (`HWC`), first (`CHW`), or one grey channel (`HW`).
"""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import torch
from msgspec import Meta
from torch import Tensor
from torch.nn import functional

from softlabels.documents import Document

MAX_EDGE = 1 << 14
"""Pixels. No teacher takes a longer side, and a typing error must not fill the memory."""

Edge = Annotated[int, Meta(ge=1, le=MAX_EDGE)]
# Not tuple[Edge, Edge]: msgspec 0.23 crashes the interpreter on a bounded int in a union with a fixed tuple.
Size = Edge | Annotated[list[Edge], Meta(min_length=2, max_length=2)]

# Bounded by the largest float, so that infinity and NaN are refused.
Finite = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
Positive = Annotated[float, Meta(gt=0, le=sys.float_info.max)]


class ImagePreprocessing(Document, frozen=True, kw_only=True):
    """The `preprocess` table of a teacher; steps run in the order of these attributes.

    Attributes:
        layout: layout of the transfer set's images.
        resize: length of the shorter side, or [height, width]; None keeps the size.
        interpolation: of resizing.
        antialias: whether shrinking averages over the pixels that it merges, as Pillow does.
        crop: side of the centre crop, or [height, width]; None keeps all.
        divide_by: divisor of every value before mean and std: 255 where those are of values from 0 to 1.
        mean, std: subtracted, then divided by; one number for all channels or one each.
    """

    layout: Literal["HWC", "CHW", "HW"] = "HWC"
    resize: Size | None = None
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    antialias: bool = True
    crop: Size | None = None
    divide_by: Positive = 1.0
    mean: Finite | Annotated[list[Finite], Meta(min_length=1)] = 0.0
    std: Positive | Annotated[list[Positive], Meta(min_length=1)] = 1.0

    def __call__(self, images: Tensor) -> Tensor:
        """Return float32 [B, channels, H, W] of images of any number type.

        Raises:
            ValueError: images have other dimensions than the layout, or are smaller than the crop.
        """
        expected = 1 + len(self.layout)
        if images.ndim != expected:
            raise ValueError(f"images of layout {self.layout!r} have {expected} axes, these {list(images.shape)}")
        if self.layout == "HW":
            x = images.unsqueeze(1).float()
        else:
            x = (images if self.layout == "CHW" else images.permute(0, 3, 1, 2)).float()
        if self.resize is not None:
            x = self._resized(x)
            if not images.is_floating_point():  # bicubic interpolation overshoots the range of the integer type
                x = x.clamp(torch.iinfo(images.dtype).min, torch.iinfo(images.dtype).max)
        if self.crop is not None:
            x = _centre_crop(x, _pair(self.crop))
        return (x / self.divide_by - _per_channel(self.mean, x)) / _per_channel(self.std, x)

    def _resized(self, x: Tensor) -> Tensor:
        assert self.resize is not None
        height, width = x.shape[-2:]
        if isinstance(self.resize, int):
            short = min(height, width)
            size = (round(height * self.resize / short), round(width * self.resize / short))
        else:
            size = _pair(self.resize)
        if size == (height, width):
            return x
        smooth = self.interpolation != "nearest"
        return functional.interpolate(
            x,
            size=size,
            mode=self.interpolation,
            align_corners=False if smooth else None,
            antialias=self.antialias and smooth,
        )


def _pair(size: int | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _centre_crop(x: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = x.shape[-2:]
    if height < size[0] or width < size[1]:
        raise ValueError(f"a crop of {size[0]} × {size[1]} does not fit into {height} × {width} pixels: resize first")
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    return x[..., top : top + size[0], left : left + size[1]]


def _per_channel(values: float | list[float], x: Tensor) -> Tensor:
    each = torch.tensor(values if isinstance(values, list) else [values], dtype=x.dtype, device=x.device)
    if len(each) not in (1, x.shape[1]):
        raise ValueError(f"mean or std has {len(each)} numbers, the images {x.shape[1]} channels")
    return each.reshape(1, -1, 1, 1)
