"""Who may import whom: the contracts of import-linter, and interpreters that really import under the same rules."""

from __future__ import annotations

import ast
import json
import pkgutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sysconfig.get_path("scripts"))
PARENTS = {"softlabels": ROOT, "softlabels_server": ROOT / "server", "softlabels_client": ROOT / "clients"}
"""The three packages, and the folder that each lies in."""

ARRAYS_ON_DISK = ("zarr", "h5py")
WEB = ("fastapi", "starlette", "uvicorn", "pydantic")
MODELS = ("torch", "safetensors", "sklearn", "matplotlib")

IMPORT_UNDER_A_BLOCK = """
import importlib, sys
blocked, wanted = sys.argv[1].split(","), sys.argv[2].split(",")

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)

sys.meta_path.insert(0, Block())
for name in wanted:
    importlib.import_module(name)
"""

LOADED_BY_THE_LIGHT_CLIENT = """
import json, sys
import softlabels, softlabels_client
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""

LOADED_BY_A_COMMAND = """
import json, sys
from softlabels.cli import main
code = main(sys.argv[1:])
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
sys.exit(code)
"""


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, isolated from the environment and from this folder."""
    return subprocess.run(
        [sys.executable, "-I", "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def modules_of(package: str) -> list[str]:
    """The package and every module below it, by full name, without importing any."""
    path = PARENTS[package.partition(".")[0]] / package.replace(".", "/")
    below = (found.relative_to(path).with_suffix("") for found in sorted(path.rglob("*.py")))
    names = (".".join(part for part in found.parts if part != "__init__") for found in below)
    return [package, *(f"{package}.{name}" for name in names if name and not name.endswith("__main__"))]


def contracts() -> list[dict[str, Any]]:
    """The import contracts as pyproject.toml has them."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    found: list[dict[str, Any]] = tool["importlinter"]["contracts"]
    return found


def floor() -> list[str]:
    """The modules of the lowest room, as the contract on rooms lists them, that are there."""
    rooms = next(contract for contract in contracts() if contract["type"] == "layers")
    names = (part.strip().strip("()") for part in rooms["layers"][-1].split(":"))
    there = {module.name for module in pkgutil.iter_modules([str(ROOT / "softlabels")])}
    return [f"softlabels.{name}" for name in names if name in there]


class TestContracts:
    def test_import_linter_keeps_every_contract(self) -> None:
        """`lint-imports` passes; its report is the failure message."""
        done = subprocess.run(
            [SCRIPTS / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def test_the_floor_is_the_same_in_both_contracts(self) -> None:
        """A module listed in the lowest room is also forbidden to need anything heavy."""
        light = next(contract for contract in contracts() if contract["name"].startswith("The light floor"))
        assert sorted(light["source_modules"]) == sorted(floor())


class TestFreshInterpreter:
    def test_the_light_client_loads_nothing_heavy(self) -> None:
        """After `import softlabels, softlabels_client` neither torch nor a store or server library is loaded."""
        done = run_python(LOADED_BY_THE_LIGHT_CLIENT)
        assert done.returncode == 0, done.stderr
        loaded = set(json.loads(done.stdout))
        assert loaded & {*ARRAYS_ON_DISK, *WEB, *MODELS, "rich", "softlabels_server"} == set()

    @pytest.mark.parametrize(
        ("wanted", "blocked"),
        [
            pytest.param(
                ["softlabels", "softlabels_client"], (*ARRAYS_ON_DISK, *WEB, *MODELS, "rich"), id="light client"
            ),
            pytest.param(floor(), (*ARRAYS_ON_DISK, *WEB, *MODELS, "rich", "urllib3"), id="floor"),
            pytest.param(["softlabels.cli"], (*ARRAYS_ON_DISK, *WEB, *MODELS, "rich"), id="command line"),
            pytest.param(modules_of("softlabels.store"), (*WEB, *MODELS, "rich", "urllib3"), id="store"),
            pytest.param(modules_of("softlabels_server"), (*MODELS, "softlabels_client"), id="server"),
            pytest.param(modules_of("softlabels_client"), (*ARRAYS_ON_DISK, *WEB, "softlabels_server"), id="trainer"),
            pytest.param(modules_of("softlabels.precompute"), (*WEB, "softlabels_client"), id="precompute"),
        ],
    )
    def test_a_room_imports_where_what_it_must_not_need_is_missing(
        self, wanted: list[str], blocked: tuple[str, ...]
    ) -> None:
        """Every module of a room imports while the libraries of other rooms cannot be."""
        done = run_python(IMPORT_UNDER_A_BLOCK, ",".join(blocked), ",".join(wanted))
        assert done.returncode == 0, done.stderr

    def test_the_block_does_block(self) -> None:
        """The check above can fail: a blocked library that is installed does not import."""
        done = run_python(IMPORT_UNDER_A_BLOCK, "zarr", "zarr")
        assert done.returncode == 1
        assert "blocked by the test" in done.stderr

    @pytest.mark.parametrize(
        "arguments", [["--help"], ["--version"], ["status", "--help"], ["inspect", "--help"], ["distill", "--help"]]
    )
    def test_a_light_command_waits_for_no_heavy_library(self, arguments: list[str]) -> None:
        """Subcommands are imported when they run, and their libraries when they work."""
        done = run_python(LOADED_BY_A_COMMAND, *arguments)
        assert done.returncode == 0, done.stderr
        loaded = set(json.loads(done.stdout.splitlines()[-1]))
        assert loaded & {*ARRAYS_ON_DISK, *WEB, *MODELS, "softlabels_server"} == set()


class TestFolderNames:
    """`server/` and `clients/` are importable in an editable install and nowhere else, so nothing may import them."""

    @pytest.mark.parametrize("line", ["import server", "import clients.softlabels_client", "from server import x"])
    def test_the_linter_refuses_them(self, line: str) -> None:
        """Ruff reports a banned API."""
        done = subprocess.run(
            [SCRIPTS / "ruff", "check", "--no-cache", "--select", "TID251", "--stdin-filename", "softlabels/x.py", "-"],
            cwd=ROOT,
            input=f"{line}\n",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1, done.stdout + done.stderr
        assert "TID251" in done.stdout

    def test_no_file_imports_them(self) -> None:
        """No import statement anywhere in the repository names them, whatever is silenced for the linter."""
        offenders = []
        for folder in ("softlabels", "server", "clients", "experiments", "benchmarks", "tests"):
            for path in sorted((ROOT / folder).rglob("*.py")):
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                    if isinstance(node, ast.ImportFrom) and node.module:
                        names = [node.module]
                    if {name.partition(".")[0] for name in names} & {"server", "clients"}:
                        offenders.append(f"{path.relative_to(ROOT)}:{node.lineno}")  # type: ignore[attr-defined]
        assert offenders == []
