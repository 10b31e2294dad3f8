"""How are a kornia augmentation's random numbers written down, and given back? As named columns of float64.

kornia draws all parameters of an augmentation before it applies them, and applies those that it is handed: nothing
random is left in a replay. They are drawn for batches of one sample, so that a view does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabels.errors import JobError
from softlabels.views.transforms import libraries_of, seeded, transform_identity

_EXACT = 1 << 53
"""Whole numbers up to here are float64 exactly; float32 and bool always are."""


class RecordedTransform:
    """A kornia augmentation, or an `AugmentationSequential` of them, with the parameters of every view recorded.

    Args:
        augmentation: takes float tensors [1, channels, height, width]; the samples are [channels, height, width],
            float or uint8, which becomes 0 … 1.
        arguments: that it was made with; they count for its identity.
    """

    needs_main_thread = False

    def __init__(self, augmentation: Any, *, arguments: Mapping[str, Any] | None = None) -> None:
        if not hasattr(augmentation, "forward_parameters"):
            raise JobError(
                f"kornia's {type(augmentation).__name__} does not say what it draws, so its views cannot be recorded: "
                "use an AugmentationSequential of augmentations"
            )
        self._augmentation = augmentation
        self.identity = transform_identity(augmentation, arguments or {})
        self.libraries = libraries_of(augmentation)
        self._columns: tuple[str, ...] | None = None
        self._like: Any = None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the columns; known once a first view was drawn or `probe` was called."""
        if self._columns is None:
            raise JobError("what this augmentation draws is known when it has seen a sample: call `probe` first")
        return self._columns

    def probe(self, sample: Tensor) -> None:
        """Find out what is drawn for a sample of this shape."""
        if self._columns is None:
            with seeded(0):
                self._like = self._drawn(sample)
            self._columns = tuple(name for name, _ in _leaves(self._like))

    def draw(self, sample: Tensor, seed: int) -> NDArray[np.float64]:
        """The parameters of the view with this seed, [parameters].

        Raises:
            JobError: another number of them than for the samples before, or numbers that float64 does not hold.
        """
        self.probe(sample)
        with seeded(seed):
            drawn = dict(_leaves(self._drawn(sample)))
        if tuple(drawn) != self._columns:
            raise JobError(
                "this augmentation draws other parameters for another sample (random_apply, or inputs of several "
                "sizes), which no store of equal rows holds: wrap it in a function, and its views are seeded instead"
            )
        return np.array([_exact(name, value) for name, value in drawn.items()], dtype=np.float64)

    def view(self, sample: Tensor, *, seed: int, parameters: NDArray[np.float64]) -> Tensor:
        """The view of a sample that these parameters make."""
        self.probe(sample)
        columns: tuple[str, ...] = self.parameters
        given = _filled(self._like, dict(zip(columns, parameters.tolist(), strict=True)))
        with torch.no_grad():
            made: Tensor = self._augmentation(_as_image(sample)[None], params=given)
        return made[0]

    def _drawn(self, sample: Tensor) -> Any:
        return self._augmentation.forward_parameters(torch.Size((1, *_as_image(sample).shape)))


def _as_image(sample: Tensor) -> Tensor:
    if sample.ndim != 3 or not (sample.is_floating_point() or sample.dtype == torch.uint8):
        raise JobError(
            f"kornia augments images [channels, height, width], float or uint8; a sample is {sample.dtype} "
            f"{list(sample.shape)}: have the transfer set give such images"
        )
    return sample.float() / 255 if sample.dtype == torch.uint8 else sample


def _leaves(drawn: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every single number of what kornia drew, by the name of its column."""
    if isinstance(drawn, Tensor):
        for place, value in enumerate(drawn.flatten().tolist()):
            yield f"{path}.{place}", float(value)
    elif isinstance(drawn, Mapping):
        for name in sorted(drawn):
            yield from _leaves(drawn[name], f"{path}/{name}" if path else str(name))
    elif isinstance(drawn, list):
        for item in drawn:
            yield from _leaves(item.data, f"{path}/{item.name}" if path else str(item.name))
    elif drawn is not None:
        raise JobError(f"kornia drew a {type(drawn).__name__} for {path!r}, which no column of numbers holds")


def _filled(like: Any, values: Mapping[str, float], path: str = "") -> Any:
    """What kornia drew, with other numbers in the same places."""
    if isinstance(like, Tensor):
        numbers = [values[f"{path}.{place}"] for place in range(like.numel())]
        return torch.tensor(numbers, dtype=torch.float64).to(like.dtype).reshape(like.shape)
    if isinstance(like, Mapping):
        return {name: _filled(like[name], values, f"{path}/{name}" if path else str(name)) for name in like}
    if isinstance(like, list):
        return [
            item._replace(data=_filled(item.data, values, f"{path}/{item.name}" if path else str(item.name)))
            for item in like
        ]
    return like


def _exact(name: str, value: float) -> float:
    if value.is_integer() and abs(value) > _EXACT:
        raise JobError(
            f"{name} is {value:g}, which float64 does not hold exactly: this augmentation cannot be recorded"
        )
    return value
