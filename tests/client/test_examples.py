"""The example trainers in clients/examples, end to end: a store precomputed, served, and learnt from."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from softlabels.errors import FingerprintMismatchError
from softlabels.precompute import precompute
from softlabels.precompute.job import job_from_json
from softlabels.precompute.teachers import teacher_from_module
from softlabels.transfer_set import ArrayTransferSet
from softlabels.transfer_sets.ragged import PADDING, RaggedTransferSet

EXAMPLES = Path(__file__).resolve().parents[2] / "clients" / "examples"
MOST_LINES = 120


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two cores are shared with servers and other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def example(name: str) -> ModuleType:
    """An example's module, from its file."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def job(root: Path, **tables: Any) -> Any:
    """What a job file of these stores would say."""
    document = {
        "store": {"path": f"stores/{root.name}"},
        "transfer_set": {"source": "x:y"},
        "targets": {"temperature": 2.0, "encoding": "f16"},
        "teachers": [{"model": "x:y"}],
        **tables,
    }
    return job_from_json(document, base=root.parent)


class Frames(nn.Module):
    """A teacher of six senones that listens to one frame at a time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.last = nn.Linear(8, 6)

    def forward(self, features_BLD: Tensor) -> Tensor:
        """logits_BLC; what is padding means nothing."""
        logits_BLC: Tensor = 3 * self.last(features_BLD.nan_to_num())
        return logits_BLC


class Tokens(nn.Module):
    """A teacher of a vocabulary of twelve: what comes next depends on the last token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.table = nn.Embedding(12, 12)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """logits_BLV."""
        logits_BLV: Tensor = 3 * self.table(tokens_BL.clamp(min=0))
        return logits_BLV


def ragged(path: Path, rows: list[np.ndarray], **names: Any) -> None:
    """The .npz that an example of sequences reads."""
    offsets = np.cumsum([0, *map(len, rows)])
    np.savez(path, offsets=offsets, **{key: np.concatenate(rows) for key in names["joined"]}, ids=names["ids"])


class TestVision:
    def test_a_convnet_learns_pictures(self, tmp_path: Path, serve: Any, make_store: Any) -> None:
        """KL falls epoch by epoch, the student is kept, and shuffled pictures are refused."""
        rng = np.random.default_rng(0)
        colours = rng.integers(0, 256, (120, 1, 1, 3))
        images = np.clip(colours + rng.integers(-20, 20, (120, 8, 8, 3)), 0, 255).astype(np.uint8)
        logits_BC = (colours[:, 0, 0] / 40).astype(np.float32)
        ids = 1000 + np.arange(120)
        make_store(tmp_path / "stores" / "photographs", ArrayTransferSet("photographs", images, ids=ids), logits_BC)
        np.savez(tmp_path / "data.npz", images=images, ids=ids)
        url = f"{serve(tmp_path / 'stores')}/photographs"
        vision, out = example("vision"), str(tmp_path / "s.safetensors")
        given = [url, str(tmp_path / "data.npz"), "--batch-size", "20", "--out", out]
        first = vision.main([*given, "--epochs", "1"])
        assert vision.main([*given, "--epochs", "4"]) < first / 2
        assert load_file(out)["layers.14.weight"].shape == (3, 128)
        np.savez(tmp_path / "data.npz", images=images[::-1], ids=ids)
        with pytest.raises(FingerprintMismatchError):
            vision.main(given)


class TestFrames:
    def test_an_acoustic_model_learns_senones(self, tmp_path: Path, serve: Any) -> None:
        """From windows of utterances of different lengths, some shorter than a window."""
        rng = np.random.default_rng(0)
        rows = [rng.normal(size=(length, 8)).astype(np.float32) for length in (5, 80, 30, 64, 100, 17, 90, 41)]
        ids = np.array([f"utterance-{n}" for n in range(8)])
        precompute(
            job(tmp_path / "speech", sequences={}),
            transfer_set=RaggedTransferSet("speech", rows, ids=ids),
            teachers=[teacher_from_module(Frames(), name="frames", gives="positions")],
        )
        ragged(tmp_path / "data.npz", rows, joined=("features",), ids=ids)
        url = f"{serve(tmp_path / 'stores')}/speech"
        frames, out = example("frames"), str(tmp_path / "s.safetensors")
        given = [url, str(tmp_path / "data.npz"), "--utterances", "3", "--frames", "30", "--out", out]
        first = frames.main([*given, "--epochs", "1"])
        assert frames.main([*given, "--epochs", "25"]) < first / 2
        assert load_file(out)["0.weight"].shape == (512, 88)
        ragged(tmp_path / "data.npz", rows[::-1], joined=("features",), ids=ids[::-1].copy())
        frames.main([*given, "--epochs", "1"])  # in another order, each still with its own id
        ragged(tmp_path / "data.npz", [*rows[:7], rows[7] + 1], joined=("features",), ids=ids)
        with pytest.raises(FingerprintMismatchError, match="utterance-7"):
            frames.main(given)


class TestTokens:
    def test_a_language_model_learns_next_tokens(self, tmp_path: Path, serve: Any) -> None:
        """From texts of different lengths in one batch; row t of the targets meets the answer at position t."""
        rng = np.random.default_rng(0)
        rows = [rng.integers(0, 12, length).astype(np.int32) for length in (3, 40, 17, 25, 31, 8, 22, 1)]
        assert all((row != PADDING).all() for row in rows)
        precompute(
            job(tmp_path / "stories", sequences={}),
            transfer_set=RaggedTransferSet("stories", rows),
            teachers=[teacher_from_module(Tokens(), name="tokens", gives="positions")],
        )
        ragged(tmp_path / "data.npz", rows, joined=("tokens",), ids=np.arange(8))
        url = f"{serve(tmp_path / 'stores')}/stories"
        tokens, out = example("tokens"), str(tmp_path / "s.safetensors")
        given = [url, str(tmp_path / "data.npz"), "--texts", "3", "--out", out]
        first = tokens.main([*given, "--epochs", "1"])
        assert tokens.main([*given, "--epochs", "15"]) < first / 10
        assert load_file(out)["last.weight"].shape == (12, 128)
        ragged(tmp_path / "data.npz", rows[1:] + rows[:1], joined=("tokens",), ids=np.arange(8))
        with pytest.raises(FingerprintMismatchError, match="text"):
            tokens.main(given)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path: Path) -> None:
    """One can read it before copying it."""
    assert len(path.read_text().splitlines()) <= MOST_LINES
