"""The built wheel in an empty environment: what it holds, what it brings along, and that it alone fetches a batch."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import softlabels

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"softlabels": ROOT, "softlabels_server": ROOT / "server", "softlabels_client": ROOT / "clients"}

FETCH = """
import json, sys
import softlabels

with softlabels.open(sys.argv[1]) as store:
    batch = store.batch(json.loads(sys.argv[2]))
heavy = {"torch", "zarr", "h5py", "fastapi"} & set(sys.modules)
print(json.dumps({"ids": batch.ids.tolist(), "p": batch.p().tolist(), "heavy": sorted(heavy)}))
"""

OPEN_A_FOLDER = """
import sys
import softlabels

with softlabels.open(sys.argv[1]) as store:
    print(len(store.batch([3, 0, 3, 1]).p()))
"""


def run(*command: str | Path, explain: str) -> str:
    """Run a command to its end and return what it printed; a failure tells `explain` and all of its output."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{explain}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as `make wheel` builds it, from this tree."""
    out = tmp_path_factory.mktemp("dist")
    run(
        *(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out),
        explain="the wheel does not build",
    )
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of executables of an environment that holds the wheel and what it requires, nothing else."""
    environment = tmp_path_factory.mktemp("bare") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment, explain="no virtual environment can be made")
    run(
        *(sys.executable, "-m", "pip", "--python", environment, "install", "--quiet", "--no-input", "--retries", "1"),
        *("-c", ROOT / "constraints.txt", wheel),
        explain="NumPy cannot be installed beside the wheel: this needs a package index or pip's cache",
    )
    return environment / "bin"


class TestContents:
    def test_it_holds_the_three_packages_and_nothing_else(self, wheel: Path) -> None:
        """No tests, no experiments, and none of the folder names that mean nothing once installed."""
        top = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
        assert top == {*PACKAGES, f"softlabels-{softlabels.__version__}.dist-info"}

    def test_every_source_file_is_in_it(self, wheel: Path) -> None:
        """What imports here imports there."""
        packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
        sources = {
            path.relative_to(parent).as_posix()
            for name, parent in PACKAGES.items()
            for path in parent.glob(f"{name}/**/*.py")
        }
        assert packed == sources

    @pytest.mark.parametrize("package", PACKAGES)
    def test_each_package_says_that_it_is_typed(self, wheel: Path, package: str) -> None:
        """Type checkers of users read the annotations only where `py.typed` lies."""
        assert f"{package}/py.typed" in zipfile.ZipFile(wheel).namelist()

    def test_the_licence_comes_along(self, wheel: Path) -> None:
        """Apache-2.0 asks for its text in every copy."""
        assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


class TestBareInstall:
    def test_it_brings_light_libraries_only(self, bare: Path) -> None:
        """The base install is the light client and the command line: pure Python beside NumPy and msgspec."""
        listing = run(
            *(sys.executable, "-m", "pip", "--python", bare.parent, "list", "--format", "json"),
            explain="pip list fails",
        )
        names = {package["name"].lower().replace("_", "-") for package in json.loads(listing)}
        assert names == {
            *("softlabels", "numpy", "msgspec", "crc32c", "urllib3"),
            *("cyclopts", "attrs", "docstring-parser"),
            *("rich", "rich-rst", "markdown-it-py", "mdurl", "pygments"),
        }

    def test_it_imports(self, bare: Path) -> None:
        """Both packages that a trainer uses import with nothing else installed."""
        run(bare / "python", "-I", "-c", "import softlabels, softlabels_client", explain="the light client needs more")

    def test_the_command_explains_itself(self, bare: Path) -> None:
        """`softlabels --help` works before any extra is installed."""
        assert "precompute" in run(bare / "softlabels", "--help", explain="the command needs more")

    def test_it_opens_a_folder_and_names_the_extra_to_write_one(self, bare: Path, tiny_store: Path) -> None:
        """Rows of a store on disk are read with the base install; writing needs zarr or h5py."""
        assert run(bare / "python", "-I", "-c", OPEN_A_FOLDER, tiny_store, explain="the wrong error") == "4\n"
        command = [bare / "softlabels", "convert", tiny_store, tiny_store.parent / "copy", "--container", "hdf5"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "softlabels[store]" in done.stderr

    def test_it_fetches_a_batch_from_a_running_server(self, bare: Path, tiny_store: Path, served_store: str) -> None:
        """Over HTTP the bare install reads the very numbers that the files hold."""
        ids = [3, 0, 3]
        told = json.loads(
            run(bare / "python", "-I", "-c", FETCH, served_store, json.dumps(ids), explain="the light client fails")
        )
        with softlabels.open(tiny_store) as store:
            expected = store.batch(ids).p()
        assert told["ids"] == ids
        assert told["heavy"] == []
        np.testing.assert_array_equal(np.asarray(told["p"], dtype=expected.dtype), expected)
