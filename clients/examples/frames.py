"""An acoustic model that learns senones from a served store. Copy this file and change the network and features.

    python frames.py http://127.0.0.1:8000/speech speech.npz --epochs 10 --out student.safetensors

A sample of the store is an utterance, a row is a frame: a distribution over senones. The .npz holds `features`
[frames of all utterances, D], `offsets` [U + 1] where each utterance begins, and `ids` [U]. A step takes a random
window of frames from each of several utterances; the network sees each frame with its neighbours on both sides.

Legend: U utterances, R frames of a batch, C senones, D features a frame.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import softlabels
from softlabels.errors import FingerprintMismatchError
from softlabels.losses import SoftTargetBatch, make_loss
from softlabels.transfer_set import sample_fingerprints
from softlabels_client import EpochSampler, save_student
from softlabels_client.data.prefetch import Ahead

NEIGHBOURS = 5
"""Frames of context on either side of the classified one."""


class Speech:
    """Utterances in one array.

    Args:
        path: the .npz file.
    """

    def __init__(self, path: str) -> None:
        with np.load(path) as data:
            self.features, self.offsets, self.ids = data["features"], data["offsets"], data["ids"]
        self._checked: set[int] = set()

    def utterance(self, number: int) -> NDArray[np.float32]:
        """Return the features [frames, D] of an utterance."""
        whole: NDArray[np.float32] = self.features[self.offsets[number] : self.offsets[number + 1]]
        return whole

    def window(self, number: int, begin: int, end: int) -> NDArray[np.float32]:
        """Return frames with their neighbours, [end - begin, (2 NEIGHBOURS + 1) D]; the edge frames are repeated."""
        frames = np.pad(self.utterance(number), ((NEIGHBOURS, NEIGHBOURS), (0, 0)), mode="edge")
        return np.stack([frames[t : t + 2 * NEIGHBOURS + 1].ravel() for t in range(begin, end)])

    def check(self, numbers: list[int], fingerprints: NDArray[np.uint8]) -> None:
        """Raise unless utterances are those that the teachers heard; each is compared once."""
        for number, expected in zip(numbers, fingerprints, strict=True):
            if number not in self._checked and (sample_fingerprints(self.utterance(number)[None])[0] != expected).any():
                raise FingerprintMismatchError(f"utterance {self.ids[number]!r} is not the one that the teachers heard")
            self._checked.add(number)


def batches(
    store: softlabels.TargetStore, speech: Speech, sampler: EpochSampler, frames: int, rng: np.random.Generator
) -> Iterator[tuple[Tensor, SoftTargetBatch]]:
    """Yield windows of an epoch's utterances, [R, inputs], with the targets of their frames; one request each."""
    lengths = np.diff(speech.offsets)
    for numbers in sampler:
        begins = rng.integers(0, np.maximum(lengths[numbers] - frames, 0) + 1)
        spans = np.stack([begins, np.minimum(begins + frames, lengths[numbers])], axis=1)
        targets = store.batch(speech.ids[numbers], spans=spans, fingerprints=True)
        assert targets.fingerprints is not None
        speech.check(numbers, targets.fingerprints)
        windows = [speech.window(number, *span) for number, span in zip(numbers, spans.tolist(), strict=True)]
        yield torch.from_numpy(np.concatenate(windows)), SoftTargetBatch.from_soft_targets(targets)


def main(arguments: list[str] | None = None) -> float:
    """Train and save the student; return the last epoch's mean KL to the targets in nats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="URL of a served store, or a folder")
    parser.add_argument("data", help=".npz with features, offsets and ids")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--utterances", type=int, default=16, help="utterances per step")
    parser.add_argument("--frames", type=int, default=64, help="frames of each utterance, at most")
    parser.add_argument("--learning-rate", type=float, default=0.003)
    parser.add_argument("--out", default="student.safetensors")
    options = parser.parse_args(arguments)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    speech, rng, divergence = Speech(options.data), np.random.default_rng(0), 0.0
    with softlabels.open(options.store) as store:
        inputs = (2 * NEIGHBOURS + 1) * speech.features.shape[1]
        student = nn.Sequential(nn.Linear(inputs, 512), nn.ReLU(), nn.Linear(512, store.manifest.classes)).to(device)
        optimizer, loss = torch.optim.AdamW(student.parameters(), lr=options.learning_rate), make_loss("kd")
        sampler = EpochSampler(len(speech.ids), digest=store.digest, batch_size=options.utterances, seed=0)
        for epoch in range(options.epochs):
            seen, total = 0, torch.zeros((), device=device)
            for features, targets in Ahead(batches(store, speech, sampler, options.frames, rng)):
                parts = loss.parts(student(features.to(device)), targets.to(device))
                optimizer.zero_grad()
                parts.total.backward()
                optimizer.step()
                seen, total = seen + len(features), total + parts.kl * len(features)
            divergence = float(total) / seen
            print(f"epoch {epoch + 1}: {seen} frames, KL to the targets {divergence:.4f} nats", flush=True)
        save_student(student, options.out, metadata={"softlabels.store": store.digest})
    return divergence


if __name__ == "__main__":
    main()
