"""Which files is a transfer set made of, and are they still what they were?"""

from __future__ import annotations

import glob
import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from softlabels.errors import DataUnavailableError, JobError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
MOST_FILES_OF_A_PATTERN = 1_000_000
"""More files than any pattern in braces is meant to name."""


def rooted(path: str | Path, base: Path | None) -> Path:
    """A path of a job file: relative to its folder, `~` being the home."""
    return Path(base or Path.cwd()) / Path(path).expanduser()


def existing(path: str | Path, base: Path | None, *, what: str) -> Path:
    """A path of a job file that leads to something.

    Raises:
        DataUnavailableError: it leads nowhere.
    """
    found = rooted(path, base)
    if not found.exists():
        raise DataUnavailableError(f"there is no {what} {found}: relative paths start from the job file's folder")
    return found


def matching(patterns: str | Sequence[str], base: Path | None, *, what: str) -> list[Path]:
    """The files that patterns name, sorted within each: `*`, `?`, `**` and `{000..146}`, `{train,val}`; a folder's own.

    Raises:
        DataUnavailableError: a pattern names none. JobError: one names a file again, or has too long a range.
    """
    found: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for text in _unbraced(str(rooted(pattern, base))):
            paths = sorted(glob.glob(text, recursive=True)) if glob.has_magic(text) else [text]
            files = [Path(path) for path in paths if os.path.isfile(path)]
            if not files:
                raise DataUnavailableError(f"{what}: {text!r} names no file; relative paths start from the job file's")
            found += files
    twice = sorted({str(path) for path in found if found.count(path) > 1}) if len(found) < 1000 else []
    if twice or len(set(found)) < len(found):
        raise JobError(f"{what}: {twice[0] if twice else 'a file'} is named twice, so its samples would be too")
    return found


def file_facts(path: Path) -> str:
    """Size and time of modification of a file: what changes, but by malice, when its contents do."""
    state = path.stat()
    return f"{state.st_size} bytes, {state.st_mtime_ns} ns"


def file_identities(paths: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Names and facts of files, and of those in folders among them, in an order that does not change."""
    for path in paths:
        if path.is_dir():
            for inner in walk(path):
                yield inner, file_facts(path / inner)
        else:
            yield path.name, file_facts(path)


def walk(folder: Path) -> Iterator[str]:
    """Paths of all files below a folder, relative to it with `/`, sorted; what begins with a dot is left out."""
    stack = [""]
    while stack:
        inner = stack.pop()
        with os.scandir(folder / inner) as entries:
            listed = sorted(
                (entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith((".", "__MACOSX"))
            )
        prefix = f"{inner}/" if inner else ""
        yield from (prefix + name for name, is_folder in listed if not is_folder)
        stack += [prefix + name for name, is_folder in reversed(listed) if is_folder]


def _unbraced(pattern: str) -> list[str]:
    """A pattern without braces for each that one with braces stands for: the last brace counts fastest."""
    parts = _BRACES.split(pattern)  # plain text and what stands in braces, by turns
    choices = [[part] if number % 2 == 0 else _choices(part, pattern) for number, part in enumerate(parts)]
    if math.prod(map(len, choices)) > MOST_FILES_OF_A_PATTERN:
        raise JobError(f"{pattern!r} stands for more than {MOST_FILES_OF_A_PATTERN:,} files")
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(text: str, pattern: str) -> list[str]:
    span = _RANGE.fullmatch(text)
    if span is None:
        return text.split(",")
    first, last = int(span[1]), int(span[2])
    if last - first >= MOST_FILES_OF_A_PATTERN:
        raise JobError(f"{pattern!r} stands for more than {MOST_FILES_OF_A_PATTERN:,} files")
    return [f"{number:0{len(span[1])}d}" for number in range(first, last + 1)]
