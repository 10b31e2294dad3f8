"""One job with teachers of every kind: a mean of unlike architectures, described in the manifest, verified again."""

from __future__ import annotations

import warnings
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import softlabels
from softlabels.manifest import Manifest
from softlabels.precompute import load_job, precompute
from softlabels.precompute.checks.verify_teachers import verify_against_teachers
from softlabels.softmath import mean_geometric, soften
from softlabels.store.verify import verify

JOB = """
[store]
path = "store"

[transfer_set]
source = "data.py:rows"

[targets]
temperature = 2
encoding = "f32"

[[teachers]]
model = "nets.py:Net"
weights = "net.safetensors"

[[teachers]]
model = "torchscript:net.pt"
weight = 2.0

[[teachers]]
model = "export:net.pt2"

[[teachers]]
model = "transformers:vit"
preprocess = "data.py:as_image"
"""

DATA = """
def rows():
    import numpy as np
    from softlabels.transfer_set import ArrayTransferSet
    return ArrayTransferSet("rows", np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32))


def as_image(x):
    return x.repeat(1, 2).reshape(-1, 3, 2, 2)
"""


class TestEnsemble:
    def test_teachers_of_four_kinds(self, load, net: nn.Module, tmp_path: Path) -> None:
        """Their weighted mean is kept, the manifest says what each is, and the live teachers agree."""
        transformers = pytest.importorskip("transformers", reason="one of the teachers is its")
        save_file(net.state_dict(), tmp_path / "net.safetensors")
        torch.manual_seed(1)
        other = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 5)).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.script(other), str(tmp_path / "net.pt"))
        third = nn.Sequential(nn.Linear(6, 5), nn.LogSoftmax(dim=1)).eval()
        shapes = ({0: torch.export.Dim("batch")},)
        torch.export.save(torch.export.export(third, (torch.randn(4, 6),), dynamic_shapes=shapes), tmp_path / "net.pt2")
        small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = transformers.ViTConfig(**small, image_size=2, patch_size=1, num_labels=5)
        vit = transformers.ViTForImageClassification(config).eval()
        vit.save_pretrained(tmp_path / "vit")
        load()  # writes nets.py
        (tmp_path / "data.py").write_text(DATA)
        (tmp_path / "job.toml").write_text(JOB)

        job = load_job(tmp_path / "job.toml")
        precompute(job)
        inputs = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32))
        with torch.no_grad():
            answers = [model(inputs) for model in (net, other, third)]
            answers.append(vit(pixel_values=inputs.repeat(1, 2).reshape(-1, 3, 2, 2)).logits)
        expected = soften(mean_geometric(torch.stack(answers).numpy(), weights_M=[1, 2, 1, 1]), temperature=2.0)
        with softlabels.open(tmp_path / "store") as store:
            np.testing.assert_allclose(store.batch(range(40)).p(), expected, atol=1e-5)
            teachers = store.manifest.teachers
            assert [teacher.kind for teacher in teachers] == ["python", "torchscript", "export", "transformers"]
            assert teachers[3].libraries == {"transformers": metadata.version("transformers")}
            assert all(len(teacher.weights_sha256 or "") == 64 for teacher in teachers)
            assert Manifest.from_json(store.manifest.to_json()).digest == store.manifest.digest
        report = verify(tmp_path / "store")
        agreement = verify_against_teachers(tmp_path / "store", job, report)
        assert report.sound
        assert agreement.least_cosine > 0.9999
