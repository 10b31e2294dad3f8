"""Files of a transfer set: path patterns, recursive listing, and the state that shows whether a file has changed."""

from __future__ import annotations

import glob
import itertools
import math
import os
import re
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from softlabels.errors import DataUnavailableError, JobError
from softlabels.manifest import IdSpec

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
MAX_FILES_PER_PATTERN = 1_000_000
"""More files than any brace pattern is meant to name; a typing error must not fill the memory."""

NPY_ERRORS = (ValueError, TypeError, SyntaxError, EOFError, OverflowError, tokenize.TokenError)
"""What `np.load` raises for damaged bytes: it parses the header of a .npy file as a Python literal."""


class FileTransferSet:
    """Base of transfer sets that are read from files; folders among `files` stand for all files in them.

    Every `take` raises UnreadableSampleError where a sample cannot be read, and ShapeMismatchError where samples differ
    in shape.
    """

    def __init__(self, name: str, files: Sequence[Path], spec: IdSpec) -> None:
        self.name, self._files, self._spec = name, tuple(files), spec

    def id_spec(self) -> IdSpec:
        """Return how a store keeps the ids."""
        return self._spec

    def identity(self) -> Iterator[tuple[str, str]]:
        """Yield name and state (size and modification time) of each file."""
        return file_states(self._files)


def resolve_path(path: str | Path, base: Path | None) -> Path:
    """Return a path of a job file, relative to its folder; `~` is the home folder."""
    return Path(base or Path.cwd()) / Path(path).expanduser()


def existing_path(path: str | Path, base: Path | None, *, what: str) -> Path:
    """Return `resolve_path(path, base)`. Raises DataUnavailableError if nothing exists there."""
    found = resolve_path(path, base)
    if not found.exists():
        raise DataUnavailableError(f"there is no {what} {found}: relative paths start from the job file's folder")
    return found


def match_files(patterns: str | Sequence[str], base: Path | None, *, what: str) -> list[Path]:
    """Return the files that patterns (`*`, `?`, `**`, `{000..146}`, `{train,val}`) name, sorted within each pattern.

    Raises:
        DataUnavailableError: a pattern names no file. JobError: a file is named twice, or a range is too long.
    """
    found: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for text in _expand_braces(str(resolve_path(pattern, base))):
            paths = sorted(glob.glob(text, recursive=True)) if glob.has_magic(text) else [text]
            files = [Path(path) for path in paths if os.path.isfile(path)]
            if not files:
                raise DataUnavailableError(
                    f"{what}: {text!r} names no file; relative paths start from the job file's folder"
                )
            found += files
    repeated = next((path for path, count in Counter(found).items() if count > 1), None)
    if repeated is not None:
        raise JobError(f"{what}: {repeated} is named twice, so its samples would occur twice")
    return found


def file_state(path: Path) -> str:
    """Return size and modification time of a file. Resumed jobs compare this text with the stored one."""
    state = path.stat()
    return f"{state.st_size} bytes, {state.st_mtime_ns} ns"


def file_states(paths: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Yield (name, `file_state`) of files, and of all files in folders among them, in a fixed order."""
    for path in paths:
        if path.is_dir():
            for inner in list_files(path):
                yield inner, file_state(path / inner)
        else:
            yield path.name, file_state(path)


def list_files(folder: Path) -> Iterator[str]:
    """Yield the paths of all files below a folder, relative to it with `/`, sorted; hidden files are left out."""
    stack = [""]
    while stack:
        inner = stack.pop()
        with os.scandir(folder / inner) as entries:
            # macOS puts a __MACOSX folder of metadata into every zip archive that it makes.
            listed = sorted(
                (entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith((".", "__MACOSX"))
            )
        prefix = f"{inner}/" if inner else ""
        yield from (prefix + name for name, is_folder in listed if not is_folder)
        stack += [prefix + name for name, is_folder in reversed(listed) if is_folder]


def _expand_braces(pattern: str) -> list[str]:
    """Return the patterns without braces that `pattern` stands for; the last brace varies fastest."""
    parts = _BRACES.split(pattern)  # literal text and contents of braces alternate
    choices = [[part] if number % 2 == 0 else _choices(part, pattern) for number, part in enumerate(parts)]
    if math.prod(map(len, choices)) > MAX_FILES_PER_PATTERN:
        raise JobError(f"{pattern!r} stands for more than {MAX_FILES_PER_PATTERN:,} files")
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(text: str, pattern: str) -> list[str]:
    span = _RANGE.fullmatch(text)
    if span is None:
        return text.split(",")
    first, last = int(span[1]), int(span[2])
    if last - first >= MAX_FILES_PER_PATTERN:
        raise JobError(f"{pattern!r} stands for more than {MAX_FILES_PER_PATTERN:,} files")
    return [f"{number:0{len(span[1])}d}" for number in range(first, last + 1)]
