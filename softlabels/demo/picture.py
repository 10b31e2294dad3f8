"""What do soft targets look like? Some digits beside their targets at T = 1 and at a high temperature, as a PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import MissingExtraError
from softlabels.opening import TargetStore
from softlabels.transfer import ArrayTransferSet

SHOWN = 6
"""Digits in the picture."""


def ambiguous_positions(store: TargetStore, data: ArrayTransferSet, *, among: int = 2_000) -> NDArray[np.int64]:
    """Positions of digits worth looking at: of the first `among`, those of highest entropy, each of another class."""
    batch = store.batch(data.ids[:among])
    p_BC = batch.p()
    entropy_B = -(p_BC * np.log(np.maximum(p_BC, 1e-30))).sum(axis=1)
    chosen: list[int] = []
    seen: set[int] = set()
    for position in np.argsort(-entropy_B).tolist():
        guess = int(p_BC[position].argmax())
        if guess not in seen:
            seen.add(guess)
            chosen.append(position)
        if len(chosen) == SHOWN:
            break
    return np.array(chosen, dtype=np.int64)


def draw(store: TargetStore, data: ArrayTransferSet, path: Path, *, high_temperature: float) -> None:
    """Draw digits and their soft targets.

    Args:
        store: keeps targets that re-temper.
        data: the transfer set, with images as inputs.
        path: the PNG to write.
        high_temperature: of the second column of bars; the first is T = 1.
    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "drawing the picture needs matplotlib, which is not installed: pip install 'softlabels[demo]'", extra="demo"
        ) from error
    positions = ambiguous_positions(store, data)
    batch = store.batch(data.ids[positions])
    columns = {"T = 1": batch.p(1.0), f"T = {high_temperature:g}": batch.p(high_temperature)}
    figure = Figure(figsize=(8.5, 1.3 * len(positions)), layout="constrained")
    axes = figure.subplots(len(positions), 3, width_ratios=(1, 3, 3))
    for row, position in enumerate(positions.tolist()):
        image, *bars = axes[row]
        image.imshow(data.inputs[position], cmap="gray_r")
        image.set_axis_off()
        for axis, (title, p_BC) in zip(bars, columns.items(), strict=True):
            axis.bar(range(p_BC.shape[1]), p_BC[row], color="#3b6ea5")
            axis.set_xticks(range(p_BC.shape[1]))
            axis.set_ylim(0, 1.1 * float(p_BC.max()))  # a scale a column: at a high T all bars are near 1/C
            axis.spines[["top", "right"]].set_visible(False)
            if row == 0:
                axis.set_title(title)
    figure.savefig(path, dpi=120)
