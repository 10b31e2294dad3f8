"""A vocabulary of 49,152 tokens, a position a row: from a job, over HTTP, into a student's loss."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import softlabels
from softlabels.errors import RequestError
from softlabels.losses import SoftTargetBatch, distillation_loss
from softlabels.precompute import precompute, teacher_from_module
from softlabels.precompute.job import job_from_json
from softlabels.transfer_set import sequence_fingerprints
from softlabels.transfer_sets.ragged import RaggedTransferSet
from softlabels_client import SoftTargetDataset
from softlabels_server import Settings, StoreFolder, create_app
from softlabels_server.process.server import listen, make_server, url_of

VOCABULARY, WIDTH = 49_152, 16
LENGTHS = (20, 5, 31)
ENCODINGS = {
    "topk": {"name": "topk", "k": 100},
    "sampled": {"name": "sampled", "row_bytes": 256},
    "hidden": {"name": "hidden", "kept_as": "f16"},
}


class Model(torch.nn.Module):
    """A row of its embedding a token, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """[B, L, vocabulary]."""
        logits: torch.Tensor = self.head(4 * self.embed(tokens_BL.clamp(min=0)))
        return logits


def texts() -> list[np.ndarray]:
    """Three sequences of token ids."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCABULARY, length).astype(np.int32) for length in LENGTHS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store by each encoding."""
    base = tmp_path_factory.mktemp("stores")
    made = teacher_from_module(Model(), name="model", gives="positions", head="head")
    for name, encoding in ENCODINGS.items():
        job = job_from_json(
            {
                "store": {"path": name},
                "transfer_set": {"source": "x:y"},
                "targets": {"temperature": 1.0, "encoding": encoding},
                "teachers": [{"model": "x:y"}],
                "sequences": {"labels": "next"},
            },
            base=base,
        )
        precompute(
            job, transfer_set=RaggedTransferSet("texts", texts(), ids=np.array(["a", "b", "c"])), teachers=[made]
        )
    return base


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """A server over them."""
    settings = Settings(port=0)
    listener = listen(settings)
    server = make_server(create_app(StoreFolder(folder), settings), settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield url_of(listener)
    server.should_exit = True
    thread.join(timeout=30)


class TestServed:
    @pytest.mark.parametrize("name", ENCODINGS)
    def test_a_student_learns_from_ranges(self, url: str, folder: Path, name: str) -> None:
        """The same rows as from the folder, the fingerprints of its own text, and a gradient in every row."""
        spans = [(3, 20), (0, 4)]
        with softlabels.open(f"{url}/{name}") as far, softlabels.open(folder / name) as near:
            batch = far.batch(["a", "c"], spans=spans, fingerprints=True)
            expected = near.batch(["a", "c"], spans=spans)
            np.testing.assert_array_equal(batch.logits(), expected.logits())
            assert batch.row_offsets is not None
            assert batch.row_offsets.tolist() == [0, 17, 21]
            for row, tokens in zip((0, 1), (texts()[0], texts()[2]), strict=True):
                own = sequence_fingerprints(tokens[None], np.array([len(tokens)]))
                np.testing.assert_array_equal(batch.fingerprints[row : row + 1], own)  # type: ignore[index]
            student = torch.zeros(21, VOCABULARY, requires_grad=True)
            loss = distillation_loss(student, SoftTargetBatch.from_soft_targets(batch), hard_weight=0.1)
            loss.total.backward()
            assert student.grad is not None
            assert (student.grad.abs().sum(dim=1) > 0).all()

    def test_hidden_states_are_the_models_logits_at_any_temperature(self, url: str) -> None:
        """On the client, which fetched the head once."""
        with torch.inference_mode():
            live = Model()(torch.from_numpy(texts()[1])[None])[0]
        with softlabels.open(f"{url}/hidden") as store:
            for temperature in (1.0, 4.0):
                expected = live.div(temperature).softmax(dim=-1).numpy()
                found = store.batch(["b"], temperature=temperature).p()
                np.testing.assert_allclose(found, expected, rtol=0.02, atol=1e-6)

    def test_a_data_set_of_samples_refuses_sequences(self, folder: Path) -> None:
        """A row a sample is what it pairs; the message says how ranges are fetched."""
        tokens = np.zeros((3, 31), dtype=np.int32)
        with softlabels.open(folder / "topk") as store, pytest.raises(RequestError, match="spans="):
            SoftTargetDataset(tokens, store, ids=["a", "b", "c"])
