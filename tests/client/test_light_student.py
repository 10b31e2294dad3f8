"""A student's process needs torch and nothing of the teacher's or the server's world."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from softlabels.store.copies import convert_store

BLOCK = """
import sys
blocked = sys.argv[1].split(",")

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)

sys.meta_path.insert(0, Block())
"""

TRAIN = """
import numpy as np, torch, softlabels
from softlabels.transfer_set import ArrayTransferSet
from softlabels_client import DistillSettings, SoftTargetDataset, distill

torch.set_num_threads(1)
inputs = np.random.default_rng(7).normal(size=(200, 4)).astype(np.float32)
with softlabels.open(sys.argv[2]) as store:
    dataset = SoftTargetDataset(ArrayTransferSet("noise", inputs), store)
    result = distill(torch.nn.Linear(4, 10), dataset, DistillSettings(epochs=2, device="cpu"))
assert result.losses[1] < result.losses[0]
print("trained")
"""

FETCH = """
import softlabels
with softlabels.open(sys.argv[2]) as store:
    print(store.batch([3, 1, 2]).p().shape, "torch" in sys.modules)
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, warnings as errors."""
    command = [sys.executable, "-I", "-W", "error", "-c", BLOCK + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


class TestStudentProcess:
    def test_it_trains_without_the_stores_and_the_servers_libraries(self, served_store: str) -> None:
        """With torch, and with zarr, h5py, crc32c, FastAPI and its kin impossible to import."""
        done = run(TRAIN, "zarr,h5py,fastapi,starlette,uvicorn,pydantic,softlabels_server", served_store)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "trained\n"

    def test_it_fetches_without_torch(self, served_store: str) -> None:
        """NumPy is all that a batch takes."""
        done = run(FETCH, "torch,safetensors,rich,zarr,h5py,fastapi,urllib3", served_store)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "(3, 10) False\n"

    @pytest.mark.parametrize(
        "code",
        [
            "from softlabels_client import SoftTargetDataset",
            "from softlabels_client import distill",
            "import softlabels_client.data.dataset",
            "import softlabels_client.training.trainer",
            "import softlabels_client.data.loader",
            "import softlabels_client.training.step",
            "import softlabels_client.training.checkpoint",
        ],
    )
    def test_without_torch_training_names_the_extra(self, code: str) -> None:
        """The sentence says what to install."""
        done = run(code, "torch,safetensors")
        assert done.returncode == 1
        assert "MissingExtraError" in done.stderr
        assert "softlabels[torch]" in done.stderr

    def test_a_store_on_disk_is_read_without_its_libraries(self, tiny_store: Path) -> None:
        """Chunks are mapped and checked by the base install; only compressed ones need a library."""
        done = run(FETCH, "torch,zarr,h5py,numcodecs,fastapi", str(tiny_store))
        assert (done.returncode, done.stdout) == (0, "(3, 10) False\n"), done.stderr

    def test_a_compressed_store_names_its_extra(self, tiny_store: Path, tmp_path: Path) -> None:
        """The message says what to install."""
        convert_store(tiny_store, tmp_path / "small", compression="zstd")
        done = run(FETCH, "numcodecs", str(tmp_path / "small"))
        assert done.returncode == 1
        assert "softlabels[store]" in done.stderr

    def test_a_name_that_is_not_there(self) -> None:
        """Lazy names do not hide a misspelling."""
        done = run("import softlabels_client; softlabels_client.Datset", "none")
        assert "AttributeError: module 'softlabels_client' has no attribute 'Datset'" in done.stderr


def test_every_lazy_name_is_what_it_says() -> None:
    """`softlabels_client.NAME` is found for each name it promises."""
    import softlabels_client

    found: dict[str, Any] = {name: getattr(softlabels_client, name) for name in softlabels_client.__all__}
    assert {name: value.__name__ for name, value in found.items()} == {name: name for name in found}
