"""A small language model that learns next tokens from a served store. Copy this file and change the network.

    python tokens.py http://127.0.0.1:8000/stories stories.npz --epochs 3 --out student.safetensors

A sample of the store is a text, a row is a position: row t is the teachers' distribution over token t + 1. The .npz
holds `tokens` of all texts joined, `offsets` [N + 1] where each text begins, and `ids` [N]. A store of a large
vocabulary is best kept as `topk` or `sampled`; the loss takes either as it comes.

Legend: B texts, L tokens of the longest, R rows of a batch, V tokens of the vocabulary.
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


class Texts:
    """Token ids of many texts in one array.

    Args:
        path: the .npz file.
    """

    def __init__(self, path: str) -> None:
        with np.load(path) as data:
            self.tokens, self.offsets, self.ids = data["tokens"], data["offsets"], data["ids"]
        self._checked: set[int] = set()

    def text(self, number: int) -> NDArray[np.int64]:
        """Return the token ids [length] of a text."""
        whole: NDArray[np.int64] = self.tokens[self.offsets[number] : self.offsets[number + 1]]
        return whole

    def check(self, numbers: list[int], fingerprints: NDArray[np.uint8]) -> None:
        """Raise unless texts are those that the teachers read; each is compared once."""
        for number, expected in zip(numbers, fingerprints, strict=True):
            if number not in self._checked and (sample_fingerprints(self.text(number)[None])[0] != expected).any():
                raise FingerprintMismatchError(f"text {self.ids[number]!r} is not the one that the teachers read")
            self._checked.add(number)


class Student(nn.Module):
    """A recurrent network, which sees the tokens up to a position and none after it."""

    def __init__(self, vocabulary: int, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.memory = nn.GRU(width, width, batch_first=True)
        self.last = nn.Linear(width, vocabulary)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Return logits_BLV."""
        logits_BLV: Tensor = self.last(self.memory(self.embedding(tokens_BL))[0])
        return logits_BLV


def batches(
    store: softlabels.TargetStore, texts: Texts, sampler: EpochSampler
) -> Iterator[tuple[Tensor, Tensor, SoftTargetBatch]]:
    """Yield tokens_BL, padded with 0; a mask of the real tokens [B, L]; their targets [R, V]; one request each."""
    for numbers in sampler:
        targets = store.batch(texts.ids[numbers], fingerprints=True)
        assert targets.fingerprints is not None
        texts.check(numbers, targets.fingerprints)
        rows = [torch.from_numpy(texts.text(number).astype(np.int64)) for number in numbers]
        tokens_BL = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths_B = torch.tensor([len(row) for row in rows])
        real_BL = torch.arange(tokens_BL.shape[1]) < lengths_B[:, None]
        yield tokens_BL, real_BL, SoftTargetBatch.from_soft_targets(targets)


def main(arguments: list[str] | None = None) -> float:
    """Train and save the student; return the last epoch's mean KL to the targets in nats a token."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="URL of a served store, or a folder")
    parser.add_argument("data", help=".npz with tokens, offsets and ids")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--texts", type=int, default=16, help="texts per step")
    parser.add_argument("--learning-rate", type=float, default=0.003)
    parser.add_argument("--out", default="student.safetensors")
    options = parser.parse_args(arguments)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    texts, divergence = Texts(options.data), 0.0
    with softlabels.open(options.store) as store:
        student = Student(store.manifest.classes).to(device)
        optimizer, loss = torch.optim.AdamW(student.parameters(), lr=options.learning_rate), make_loss("kd")
        sampler = EpochSampler(len(texts.ids), digest=store.digest, batch_size=options.texts, seed=0)
        for epoch in range(options.epochs):
            seen, total = 0, torch.zeros((), device=device)
            for tokens_BL, real_BL, targets in Ahead(batches(store, texts, sampler)):
                logits_RV = student(tokens_BL.to(device))[real_BL.to(device)]  # texts in order, as the rows are
                parts = loss.parts(logits_RV, targets.to(device))
                optimizer.zero_grad()
                parts.total.backward()
                optimizer.step()
                seen, total = seen + len(logits_RV), total + parts.kl * len(logits_RV)
            divergence = float(total) / seen
            print(f"epoch {epoch + 1}: {seen} tokens, KL to the targets {divergence:.4f} nats", flush=True)
        save_student(student, options.out, metadata={"softlabels.store": store.digest})
    return divergence


if __name__ == "__main__":
    main()
