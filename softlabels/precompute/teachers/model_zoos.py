"""How does a teacher come by its name from timm or torchvision, where these are installed?"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from softlabels.errors import JobError, MissingExtraError


@dataclass(frozen=True, kw_only=True)
class ZooModel:
    """A named network, with what its library says of its weights.

    Attributes:
        class_names: in the order of its outputs; None where the library does not say.
    """

    model: nn.Module
    class_names: tuple[str, ...] | None = None


def load_timm(name: str, arguments: Mapping[str, Any], *, has_weights: bool, who: str) -> ZooModel:
    """`timm.create_model(name)`, with timm's pretrained weights unless the job brings others.

    Raises:
        MissingExtraError: timm cannot be imported. JobError: no such model, or weights that cannot be had.
    """
    timm = _library("timm", who)
    try:
        return ZooModel(model=timm.create_model(name, **{"pretrained": not has_weights, **arguments}))
    except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
        raise JobError(f"{who}: timm gives no model {name!r}: {error}") from error


def load_torchvision(name: str, arguments: Mapping[str, Any], *, has_weights: bool, who: str) -> ZooModel:
    """`torchvision.models.get_model(name)`, with its default weights unless the job names or brings others.

    Raises:
        MissingExtraError: torchvision cannot be imported. JobError: no such model, or weights that cannot be had.
    """
    models = _library("torchvision.models", who)
    wanted: dict[str, Any] = {"weights": None if has_weights else "DEFAULT", **arguments}
    try:
        weights = None
        if isinstance(wanted["weights"], str):
            weights = wanted["weights"] = models.get_model_weights(name)[wanted["weights"]]
        model = models.get_model(name, **wanted)
    except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
        raise JobError(f"{who}: torchvision gives no model {name!r}: {error}") from error
    categories = None if weights is None else weights.meta.get("categories")
    return ZooModel(model=model, class_names=None if categories is None else tuple(categories))


def _library(name: str, who: str) -> Any:
    library = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except (
        ImportError,
        RuntimeError,
        OSError,
    ) as error:  # a build for another torch cannot register its operators
        raise MissingExtraError(
            f"{who} comes from {library}, which cannot be imported here ({error}): pip install {library}, in the build "
            "that fits this torch",
            library=library,
        ) from error
