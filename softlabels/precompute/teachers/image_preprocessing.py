"""What comes between a picture as it is kept and a vision model: layout, resizing, cropping, scaling, in the job file.

Shapes: B pictures, H rows, W columns, channels last (`HWC`), first (`CHW`), or one grey channel (`HW`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from softlabels.documents import Document
from softlabels.errors import JobError

MAX_EDGE = 1 << 14
"""Pixels; no teacher takes more a side, and a typing error must not fill the memory."""


class PicturePreparation(Document):
    """The `preprocess` table of a teacher; steps run in the order of these attributes.

    Attributes:
        layout: how the transfer set keeps a picture.
        resize: the shorter side's length, or [height, width]; None leaves pictures as they are.
        interpolation: of resizing.
        antialias: whether shrinking averages over the pixels that it merges, as Pillow does.
        crop: side of the square, or [height, width], taken from the middle; None takes all.
        divide_by: every value, before mean and std: 255 where those are of values from 0 to 1.
        mean, std: subtracted, then divided by; one for all channels or one each.
    """

    layout: Literal["HWC", "CHW", "HW"] = "HWC"
    resize: int | list[int] | None = None
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    antialias: bool = True
    crop: int | list[int] | None = None
    divide_by: float = 1.0
    mean: float | list[float] = 0.0
    std: float | list[float] = 1.0

    def __call__(self, pictures: Tensor) -> Tensor:
        """float32 [B, channels, H, W] of pictures of any number type.

        Raises:
            ValueError: pictures of other dimensions than the layout has, or smaller than the crop.
        """
        expected = 1 + len(self.layout)
        if pictures.ndim != expected:
            raise ValueError(f"pictures of layout {self.layout!r} have {expected} axes, these {list(pictures.shape)}")
        if self.layout == "HW":
            x = pictures.unsqueeze(1).float()
        else:
            x = (pictures if self.layout == "CHW" else pictures.permute(0, 3, 1, 2)).float()
        if self.resize is not None:
            x = self._resized(x)
            if not pictures.is_floating_point():  # bicubic curves overshoot; whole numbers had bounds
                x = x.clamp(torch.iinfo(pictures.dtype).min, torch.iinfo(pictures.dtype).max)
        if self.crop is not None:
            x = _middle(x, _pair(self.crop))
        return (x / self.divide_by - _each(self.mean, x)) / _each(self.std, x)

    def _resized(self, x: Tensor) -> Tensor:
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


def check_preparation(found: PicturePreparation, where: str) -> PicturePreparation:
    """The table, if its numbers can be used. Raises JobError."""
    for label, size in (("resize", found.resize), ("crop", found.crop)):
        sides = [size] if isinstance(size, int) else size
        if sides is not None and (
            len(sides) not in (1, 2)
            or (isinstance(size, list) and len(sides) != 2)
            or not all(type(side) is int and 1 <= side <= MAX_EDGE for side in sides)
        ):
            raise JobError(f"{where}: {label} is {size!r}, it must be a length in pixels or [height, width]")
    for label, values in (("divide_by", found.divide_by), ("mean", found.mean), ("std", found.std)):
        each = values if isinstance(values, list) else [values]
        if not each or not all(type(value) in (int, float) and abs(value) < float("inf") for value in each):
            raise JobError(f"{where}: {label} is {values!r}, it must be a number or one number a channel")
        if label != "mean" and not all(value > 0 for value in each):
            raise JobError(f"{where}: {label} is {values!r}: pixels are divided by it, so it must be above 0")
    return found


def _pair(size: int | list[int] | None) -> tuple[int, int]:
    assert size is not None
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _middle(x: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = x.shape[-2:]
    if height < size[0] or width < size[1]:
        raise ValueError(f"a crop of {size[0]} × {size[1]} does not fit into {height} × {width} pixels: resize first")
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    return x[..., top : top + size[0], left : left + size[1]]


def _each(values: float | list[float], x: Tensor) -> Tensor:
    each = torch.tensor(values if isinstance(values, list) else [values], dtype=x.dtype, device=x.device)
    if len(each) not in (1, x.shape[1]):
        raise ValueError(f"mean or std has {len(each)} numbers, the pictures {x.shape[1]} channels")
    return each.reshape(1, -1, 1, 1)
