"""A small convolutional network that learns images from a served store. Copy this file and change network and data.

    python vision.py http://127.0.0.1:8000/photographs photographs.npz --epochs 30 --out student.safetensors

The .npz holds `images` [N, H, W, 3] uint8, the same bytes that the teachers saw, and `ids` [N]. Every image is compared
with the fingerprint in the store before it is flipped: another crop or order is an error.

Legend: B images, C classes.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor, nn

import softlabels
from softlabels.losses import make_loss
from softlabels_client import SoftTargetDataset, data_loader, save_student


class Student(nn.Module):
    """Four convolutions. The network scales its inputs, so that they stay what the teachers saw."""

    def __init__(self, classes: int, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for begin, end in ((3, width), (width, 2 * width), (2 * width, 2 * width), (2 * width, 4 * width)):
            layers += [
                nn.Conv2d(begin, end, 3, stride=2 if end > begin > 3 else 1, padding=1),
                nn.BatchNorm2d(end),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits_BC of uint8 images [B, H, W, 3]."""
        logits_BC: Tensor = self.layers(images.permute(0, 3, 1, 2).float() / 127.5 - 1)
        return logits_BC


def flipped(images: Tensor) -> Tensor:
    """Mirror a random half of the images, which hardly changes a teacher's output."""
    mirrored = torch.rand(len(images), device=images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(2), images)


def main(arguments: list[str] | None = None) -> float:
    """Train and save the student; return the last epoch's mean KL to the targets in nats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="URL of a served store, or a folder")
    parser.add_argument("data", help=".npz with images and ids")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--temperature", type=float, help="temperature of the targets (the store's default)")
    parser.add_argument("--out", default="student.safetensors")
    options = parser.parse_args(arguments)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    with softlabels.open(options.store) as store, np.load(options.data) as data:
        dataset = SoftTargetDataset(data["images"], store, ids=data["ids"], temperature=options.temperature)
        student = Student(store.manifest.classes).to(device)
        loader = data_loader(dataset, batch_size=options.batch_size, seed=0, ahead=True)
        loss = make_loss("kd", hard_weight=0.5)
        optimizer = torch.optim.AdamW(student.parameters(), lr=options.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * len(loader))
        divergence = 0.0
        for epoch in range(options.epochs):
            total = torch.zeros((), device=device)
            for batch in loader:  # targets are prefetched by a thread
                batch = batch.to(device)
                parts = loss.parts(student(flipped(batch.inputs)), batch.targets)
                optimizer.zero_grad()
                parts.total.backward()
                optimizer.step()
                schedule.step()
                total += parts.kl * len(batch)
            divergence = float(total) / len(dataset)
            print(f"epoch {epoch + 1}: KL to the targets {divergence:.4f} nats", flush=True)
        save_student(student, options.out, metadata={"softlabels.store": store.digest})
    return divergence


if __name__ == "__main__":
    main()
