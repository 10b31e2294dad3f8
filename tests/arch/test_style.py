"""The house rules that no linter knows: docstrings everywhere, short files, no pickle, documentation that keeps up."""

from __future__ import annotations

import ast
import importlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from softlabels.errors import SoftLabelsError
from softlabels.wire import all_error_classes

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (ROOT / "softlabels", ROOT / "server" / "softlabels_server", ROOT / "clients" / "softlabels_client")
MOST_LINES = 400
"""Most files have 100 to 350 lines; more than this is more than one concept."""

SOURCES = [path for package in PACKAGES for path in sorted(package.rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def label(path: Path) -> str:
    """A path as a test id: relative to the root."""
    return path.relative_to(ROOT).as_posix()


def parsed(path: Path) -> ast.Module:
    """The file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def public_definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Public functions, classes and methods, also those under an `if` or `try`; not what is inside functions."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try):
            yield from public_definitions([*node.body, *node.orelse], prefix)


def error_classes() -> list[type[SoftLabelsError]]:
    """The product's tree of errors, without what other tests may hang below it."""
    return [cls for cls in all_error_classes() if cls.__module__.startswith("softlabels")]


def decorators(node: Definition) -> set[str]:
    """The last name of each decorator: `overload`, `setter`."""
    return {ast.unparse(decorator).partition("(")[0].rpartition(".")[2] for decorator in node.decorator_list}


@pytest.mark.parametrize("path", SOURCES, ids=label)
class TestSourceFile:
    def test_it_says_what_it_is(self, path: Path) -> None:
        """The module and everything public in it has a docstring."""
        tree = parsed(path)
        missing = [
            name
            for name, node in public_definitions(tree.body)
            if ast.get_docstring(node) is None and not decorators(node) & {"overload", "setter"}
        ]
        assert missing == []

    def test_its_first_line_is_a_statement(self, path: Path) -> None:
        """The module docstring opens with one sentence that says what the file is; questions make readers guess."""
        first = (ast.get_docstring(parsed(path)) or "").split("\n")[0].rstrip()
        assert first.endswith((".", ":"))
        assert "?" not in first

    def test_it_is_short(self, path: Path) -> None:
        """A long file holds more than one concept: cut it between them."""
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES

    def test_it_never_runs_bytes_or_text(self, path: Path) -> None:
        """No pickle, marshal, shelve, eval, exec or torch.save, and torch.load only where it builds tensors alone."""
        found = []
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Import):
                found += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found.append(node.module or "")
            elif isinstance(node, ast.Call):
                harmless = any(ast.unparse(keyword) == "weights_only=True" for keyword in node.keywords)
                found.append(ast.unparse(node.func) + ("(weights_only)" if harmless else "()"))
                found += [f"{keyword.arg}={ast.unparse(keyword.value)}" for keyword in node.keywords]
        assert (
            set(found)
            & {
                *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"),
                *("eval()", "exec()", "torch.load()", "torch.save()", "allow_pickle=True"),
            }
            == set()
        )

    def test_its_name_says_what_it_holds(self, path: Path) -> None:
        """`utils` and its kin hold anything, so they come to hold everything."""
        assert not re.search(r"util|common|helper|manager|misc", path.stem)


class TestFileNames:
    @pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
    def test_a_basename_stands_once_in_a_package(self, package: Path) -> None:
        """One basename, one meaning; subcommands and routes are called after what they expose."""
        names = [
            path.name
            for path in sorted(package.rglob("*.py"))
            if not path.name.startswith("__") and not {"cli", "api"} & set(path.relative_to(package).parts[:-1])
        ]
        assert [name for name, times in Counter(names).items() if times > 1] == []


@pytest.mark.parametrize("path", TESTS, ids=label)
class TestTestFile:
    def test_every_test_says_what_it_shows(self, path: Path) -> None:
        """Tests read like a specification: each has a docstring."""
        definitions = public_definitions(parsed(path).body)
        tests = [(name, node) for name, node in definitions if name.rpartition(".")[2].startswith("test_")]
        assert [name for name, node in tests if ast.get_docstring(node) is None] == []

    def test_it_is_in_no_package(self, path: Path) -> None:
        """pytest imports test files by path, so two may share a name; an `__init__.py` would make packages of them."""
        assert path.name != "__init__.py"


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name == "__init__.py"], ids=label)
class TestPackage:
    def test_every_exported_name_exists(self, path: Path) -> None:
        """What `__all__` promises is there, and promised once."""
        package = next(package for package in PACKAGES if path.is_relative_to(package))
        module = importlib.import_module(".".join(path.parent.relative_to(package.parent).parts))
        names: list[str] = list(getattr(module, "__all__", []))
        assert [name for name in names if not hasattr(module, name)] == []
        assert len(set(names)) == len(names)


class TestErrors:
    def test_codes_are_unique(self) -> None:
        """Clients match on codes: two classes never share one."""
        counted = Counter(cls.code for cls in error_classes())
        assert [code for code, times in counted.items() if times > 1] == []

    def test_the_documented_table_is_the_tree(self) -> None:
        """docs/errors.md lists every class with its code, status and title, and says what to do."""
        text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
        rows = [
            [cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line[:3] == "| `"
        ]
        expected = [[f"`{cls.code}`", str(cls.status), f"`{cls.__name__}`", cls.title] for cls in error_classes()]
        assert sorted(row[:4] for row in rows) == sorted(expected)
        assert [row[0] for row in rows if len(row) != 5 or len(row[4]) < 10] == []

    def test_the_drawn_tree_is_the_tree(self) -> None:
        """The docstring of softlabels/errors.py draws every class under its parent."""
        drawn = ast.get_docstring(parsed(ROOT / "softlabels" / "errors.py")) or ""
        names = re.findall(r"(\w+Error)\b", drawn)
        assert sorted(names) == sorted(cls.__name__ for cls in error_classes())


class TestCommandLine:
    def test_every_command_is_documented(self) -> None:
        """`softlabels NAME` stands in the README or in docs/ for each command NAME."""
        pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
        text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
        app = importlib.import_module("softlabels.cli").app
        commands = [name for name in app if not name.startswith("-")]
        assert commands, "softlabels.cli.app has no commands"
        assert [name for name in commands if not re.search(rf"softlabels {re.escape(name)}\b", text)] == []
