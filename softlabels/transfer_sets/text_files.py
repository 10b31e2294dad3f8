"""How do text files become a transfer set? Tokens of each file one after the other, cut into windows of one length.

Files are cut into blocks at line ends, each block is given to the tokenizer, and the tokens lie in a temporary file, so
that memory does not grow with the corpus. The blocks' size is fixed: the same files and tokenizer give the same tokens.
Legend: B windows, L tokens of the longest.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softlabels.errors import JobError, MissingExtraError
from softlabels.manifest import IdSpec
from softlabels.transfer_set import Samples
from softlabels.transfer_sets.ragged import padded
from softlabels.transfer_sets.sample_ids import PackedNames
from softlabels.transfer_sets.source_files import file_identities, matching

_BLOCK_CHARACTERS = 1 << 16
"""Of text that the tokenizer is given at once, up to the end of a line."""

Tokenize = Callable[[str], Sequence[int]]


class TokenWindows:
    """Windows of the tokens of text files; the last one of each file may be shorter.

    Ids are `name:offset`, the file and the window's first token in it, so that they stay when files are added. Safe
    under threads; pickling tokenizes again.

    Args:
        paths: of the files, in order, UTF-8.
        tokenizer: makes what turns text into tokens.
        length: tokens a window, its beginning included.
        beginning: the token that every window begins with; None where it has none of its own.
        windows: only so many of the first; all when None.
        name: for people and manifests.
    Raises:
        JobError: a file is no UTF-8, or no token was found.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        tokenizer: Callable[[], Tokenize],
        *,
        length: int,
        beginning: int | None,
        windows: int | None,
        name: str,
    ) -> None:
        self._arguments = {"paths": tuple(paths), "tokenizer": tokenizer, "length": length}
        self._arguments |= {"beginning": beginning, "windows": windows, "name": name}
        self.name, self._paths, self._beginning = name, tuple(paths), beginning
        step = length if beginning is None else length - 1
        self._tokens, spans = _tokenized(self._paths, tokenizer(), most=None if windows is None else windows * step)
        cut = list(_windows(spans, step))[:windows]
        if not cut:
            raise JobError(f"the text of {name!r} has no token: name files with something in them")
        self._names = PackedNames(f"{file}:{offset}" for file, offset, _, _ in cut)
        self._starts = np.array([start for _, _, start, _ in cut], dtype=np.int64)
        self._stops = np.array([stop for _, _, _, stop in cut], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._names)

    def __getstate__(self) -> dict[str, Any]:
        return self._arguments

    def __setstate__(self, state: dict[str, Any]) -> None:
        TokenWindows.__init__(self, **state)

    def id_spec(self) -> IdSpec:
        """Strings."""
        return self._names.id_spec()

    def identity(self) -> Iterator[tuple[str, str]]:
        """The files, and the facts that change with their contents."""
        return file_identities(self._paths)

    def lengths(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many tokens these windows have, [B]."""
        found: NDArray[np.int64] = self._stops[positions] - self._starts[positions]
        return found + (0 if self._beginning is None else 1)

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """The windows at these positions, token ids int32 [B, L], shorter ones filled up."""
        head = [] if self._beginning is None else [self._beginning]
        spans = zip(self._starts[positions].tolist(), self._stops[positions].tolist(), strict=True)
        windows = [np.concatenate([np.array(head, np.int32), self._tokens[start:stop]]) for start, stop in spans]
        return Samples(ids=self._names.take(positions), inputs=padded(windows), labels=None)


def text(
    files: str | list[str],
    tokenizer: str,
    gguf_file: str | None = None,
    length: int = 512,
    begin: bool = False,
    windows: int | None = None,
    name: str | None = None,
    base: Path | None = None,
) -> TokenWindows:
    """Windows of tokens of text files, for language models.

    Args:
        files: one, a list, or with `*` and `{00..31}`.
        tokenizer: a folder, or what `transformers` finds in its cache or on the hub.
        gguf_file: name of a GGUF file in the folder, whose tokenizer is taken.
        length: tokens a window.
        begin: whether every window begins with the tokenizer's own token for that, as some models expect.
        windows: only so many of the first.
        name: of the transfer set; that of the first file when left out.
        base: the folder that relative paths start from.
    Raises:
        DataUnavailableError: no such file. JobError: no such tokenizer, or numbers that cannot be.
        MissingExtraError: `transformers` is not installed.
    """
    if length < 2 or (windows is not None and windows < 1):
        raise JobError(f"text: windows of {length} tokens, {windows} of them: give at least 2, and at least 1 of them")
    paths = matching(files, base, what="transfer set text")
    folder = Path(base or Path.cwd()) / tokenizer
    place = str(folder) if folder.is_dir() else tokenizer
    beginning = _load_tokenizer(place, gguf_file).bos_token_id if begin else None
    if begin and beginning is None:
        raise JobError(f"text: tokenizer {tokenizer} names no token to begin with: leave out `begin`")
    return TokenWindows(
        paths,
        partial(_tokenize_with, place, gguf_file),
        length=length,
        beginning=beginning,
        windows=windows,
        name=name or paths[0].stem,
    )


def _tokenize_with(place: str, gguf_file: str | None) -> Tokenize:
    """What turns text into a tokenizer's tokens, with none that stand for nothing in the text."""
    return partial(_load_tokenizer(place, gguf_file).encode, add_special_tokens=False)


def _load_tokenizer(place: str, gguf_file: str | None) -> Any:
    """A tokenizer of `transformers`."""
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingExtraError(
            "text is cut into tokens by `transformers`, which is not installed: pip install 'softlabels[transformers]'",
            extra="transformers",
        ) from error
    more = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        found = transformers.AutoTokenizer.from_pretrained(place, **more)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise JobError(f"text: the tokenizer {place} is not to be had: {error}") from error
    found.model_max_length = 1 << 60  # it would warn of blocks longer than its model takes, which windows are not
    return found


def _tokenized(
    paths: Sequence[Path], tokenize: Tokenize, *, most: int | None
) -> tuple[NDArray[np.int32], list[tuple[str, int, int]]]:
    """All tokens, mapped from a temporary file, and where those of each file lie: its name, from, to."""
    names = _names_of(paths)
    spans: list[tuple[str, int, int]] = []
    done = 0
    with tempfile.TemporaryFile() as file:
        for path, name in zip(paths, names, strict=True):
            start = done
            for block in _blocks(path):
                tokens = np.asarray(tokenize(block), dtype="<i4")
                file.write(tokens.tobytes())
                done += len(tokens)
                if most is not None and done >= most:
                    break
            spans.append((name, start, done))
            if most is not None and done >= most:
                break
        file.flush()
        # The mapping keeps the file, which has no name, until it is let go of.
        mapped = np.memmap(file, dtype="<i4", mode="r", shape=(done,)) if done else np.empty(0, dtype="<i4")
    return mapped, spans


def _blocks(path: Path) -> Iterator[str]:
    block: list[str] = []
    characters = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                block.append(line)
                characters += len(line)
                if characters >= _BLOCK_CHARACTERS:
                    yield "".join(block)
                    block, characters = [], 0
    except UnicodeDecodeError as error:
        raise JobError(f"{path} is no UTF-8 text: {error}") from error
    if block:
        yield "".join(block)


def _windows(spans: Sequence[tuple[str, int, int]], step: int) -> Iterator[tuple[str, int, int, int]]:
    """Name of the file, offset in it, and from and to among all tokens, of each window."""
    for name, begin, end in spans:
        for start in range(begin, end, step):
            yield name, start - begin, start, min(start + step, end)


def _names_of(paths: Sequence[Path]) -> list[str]:
    """What files are called in ids: their names, with as many folders before as tell them apart."""
    if len({path.name for path in paths}) == len(paths):
        return [path.name for path in paths]
    top = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(top).as_posix() for path in paths]
