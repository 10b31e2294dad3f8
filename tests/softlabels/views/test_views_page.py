"""docs/views.md: its job table and its transform, run as they are printed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

import softlabels
from softlabels.precompute import load_job, precompute
from softlabels.transfer_set import ArrayTransferSet
from softlabels.wire import all_error_classes
from softlabels_client.data.dataset import ViewDataset

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "views.md").read_text(encoding="utf-8")

PARTS = """
import numpy as np, torch
from softlabels.transfer_set import ArrayTransferSet

def photographs():
    pixels = np.random.default_rng(0).integers(0, 255, (20, 3, 32, 32), dtype=np.uint8)
    return ArrayTransferSet("photographs", pixels)

def teacher():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 24 * 24, 4))
"""

REST = """
[store]
path = "store"
[transfer_set]
source = "parts.py:photographs"
[targets]
temperature = 4
[[teachers]]
model = "parts.py:teacher"
"""


class TestThePage:
    """What it says works."""

    def test_the_table_and_the_transform_make_a_store_of_views(self, tmp_path: Path) -> None:
        """With fewer views than fifty, and each of them made again."""
        torch.set_num_threads(1)
        table = re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)
        transform = re.search(r"<!-- file: augment.py -->\n```python\n(.*?)```", PAGE, re.DOTALL)
        assert table is not None
        assert transform is not None
        (tmp_path / "augment.py").write_text(transform[1])
        (tmp_path / "parts.py").write_text(PARTS)
        (tmp_path / "job.toml").write_text(REST + table[1].replace("count = 50", "count = 3"))
        manifest = precompute(load_job(tmp_path / "job.toml"))
        assert (manifest.samples, manifest.rows) == (20, 60)
        data = softlabels.references.load_reference("parts.py:photographs", base=tmp_path)()
        assert isinstance(data, ArrayTransferSet)
        dataset = ViewDataset(data, softlabels.open(tmp_path / "store"), base=tmp_path, check="always")
        for epoch in range(3):
            dataset.show_epoch(epoch)
            assert dataset.__getitems__(list(range(20))).inputs.shape == (20, 3, 24, 24)
        assert np.dtype(manifest.arrays["fingerprints"].dtype) == np.uint8

    def test_its_errors_exist(self) -> None:
        """Every code that the table names is one of the product's."""
        codes = set(re.findall(r"\| `([a-z-]+)`", PAGE)) - {"generator"}
        known = {cls.code for cls in all_error_classes()}
        assert codes
        assert codes <= known
