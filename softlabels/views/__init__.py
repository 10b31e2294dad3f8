"""Views of samples: augmentations that precompute makes once and trainers replay exactly."""

from __future__ import annotations

from softlabels.views.replay import ViewReplay
from softlabels.views.transforms import (
    SeededTransform,
    ViewTransform,
    as_view_transform,
    load_view_transform,
    view_seeds,
)

__all__ = ["SeededTransform", "ViewReplay", "ViewTransform", "as_view_transform", "load_view_transform", "view_seeds"]
