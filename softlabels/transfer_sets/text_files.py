"""Text files: the tokens of each file, cut into windows of one length for language models.

Files are tokenized block by block, each up to the end of a line, into a temporary file, so that memory does not grow
with the corpus. The block size is fixed: the same files and tokenizer always give the same tokens.
Shapes: B windows, L tokens of the longest.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from softlabels.errors import JobError
from softlabels.extras import needs_extra
from softlabels.ids import IdArray
from softlabels.transfer_set import Samples
from softlabels.transfer_sets.ragged import pad_sequences
from softlabels.transfer_sets.sample_ids import PackedStrings
from softlabels.transfer_sets.source_files import FileTransferSet, match_files, resolve_path
from softlabels.transfer_sets.sources import Source

_BLOCK_CHARACTERS = 1 << 16
"""Text that the tokenizer gets at once, rounded up to the end of a line. Another number would change tokens at the
borders of blocks, and with them the fingerprints of stores."""

Tokenize = Callable[[str], Sequence[int]]


class TokenWindows(FileTransferSet):
    """Windows of the tokens of text files; the last one of each file may be shorter.

    Ids are `name:offset`, the file and the window's first token in it, so that they stay when files are added. Safe
    for use from several threads; pickling tokenizes again.

    Args:
        paths: the files, in order, UTF-8.
        load_tokenizer: returns the function that turns text into token ids.
        length: tokens per window, `first_token` included.
        first_token: token id that every window begins with; None for none.
        max_windows: largest number of windows; None for all.
        name: name for messages and manifests.
    Raises:
        JobError: a file is not UTF-8, or there is no token.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        load_tokenizer: Callable[[], Tokenize],
        length: int,
        first_token: int | None,
        max_windows: int | None,
        name: str,
    ) -> None:
        self._arguments = (tuple(paths), load_tokenizer, length, first_token, max_windows, name)
        self._first_token = first_token
        step = length if first_token is None else length - 1
        max_tokens = None if max_windows is None else max_windows * step
        self._tokens, spans = _tokenize_files(paths, load_tokenizer(), max_tokens=max_tokens)
        cut = list(_windows(spans, step))[:max_windows]
        if not cut:
            raise JobError(f"the text of {name!r} has no token: the files are empty")
        self._ids = PackedStrings(f"{file}:{offset}" for file, offset, _, _ in cut)
        super().__init__(name, paths, self._ids.id_spec())
        self._starts = np.array([start for _, _, start, _ in cut], dtype=np.int64)
        self._stops = np.array([stop for _, _, _, stop in cut], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ids)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    def all_ids(self) -> Iterator[IdArray]:
        """Yield the ids of all windows."""
        return self._ids.blocks()

    def lengths(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of tokens of each of these windows, [B]."""
        found: NDArray[np.int64] = self._stops[positions] - self._starts[positions]
        return found + (0 if self._first_token is None else 1)

    def take(self, positions: NDArray[np.int64]) -> Samples:
        """Return the windows at these positions: token ids int32 [B, L], padded at the end."""
        head = [] if self._first_token is None else [self._first_token]
        spans = zip(self._starts[positions].tolist(), self._stops[positions].tolist(), strict=True)
        windows = [np.concatenate([np.array(head, np.int32), self._tokens[start:stop]]) for start, stop in spans]
        return Samples(ids=self._ids.take(positions), inputs=pad_sequences(windows), labels=None)


class TextSource(Source, frozen=True, kw_only=True):
    """Windows of the tokens of text files.

    Attributes:
        files: a path, a list of paths, or with `*` and `{00..31}`; the first one names the transfer set by default.
        tokenizer: a folder, or a name that `transformers` finds in its cache or on the hub.
        gguf_file: name of a GGUF file in the folder, whose tokenizer is taken.
        length: tokens per window.
        begin: whether every window begins with the tokenizer's BOS token, as some models expect.
        windows: largest number of windows; all when left out.
    """

    files: str | list[str]
    tokenizer: str
    gguf_file: str | None = None
    length: Annotated[int, msgspec.Meta(ge=2)] = 512
    begin: bool = False
    windows: Annotated[int, msgspec.Meta(ge=1)] | None = None

    def load(self, base: Path | None) -> TokenWindows:
        """Tokenize the files and return their windows."""
        paths = match_files(self.files, base, what="transfer set text")
        folder = resolve_path(self.tokenizer, base)
        location = str(folder) if folder.is_dir() else self.tokenizer
        first_token = _load_tokenizer(location, self.gguf_file).bos_token_id if self.begin else None
        if self.begin and first_token is None:
            raise JobError(f"text: tokenizer {self.tokenizer} has no BOS token: leave out `begin`")
        return TokenWindows(
            paths,
            partial(_tokenizer, location, self.gguf_file),
            length=self.length,
            first_token=first_token,
            max_windows=self.windows,
            name=self.name or paths[0].stem,
        )


def _tokenizer(location: str, gguf_file: str | None) -> Tokenize:
    return partial(_load_tokenizer(location, gguf_file).encode, add_special_tokens=False)


def _load_tokenizer(location: str, gguf_file: str | None) -> Any:
    with needs_extra("transformers", "tokenizing text"):
        import transformers
    auto_tokenizer: Any = transformers.AutoTokenizer
    more = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        found = auto_tokenizer.from_pretrained(location, **more)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise JobError(f"text: the tokenizer {location} cannot be loaded: {error}") from error
    found.model_max_length = 1 << 60  # else it warns that blocks are longer than its model takes; windows are not
    return found


def _tokenize_files(
    paths: Sequence[Path], tokenize: Tokenize, *, max_tokens: int | None
) -> tuple[NDArray[np.int32], list[tuple[str, int, int]]]:
    """Return all tokens, mapped from a temporary file, and the (name, start, stop) of each file among them."""
    spans: list[tuple[str, int, int]] = []
    done = 0
    with tempfile.TemporaryFile() as file:
        for path, name in zip(paths, _file_names(paths), strict=True):
            start = done
            for block in _blocks(path):
                tokens = np.asarray(tokenize(block), dtype="<i4")
                file.write(tokens.tobytes())
                done += len(tokens)
                if max_tokens is not None and done >= max_tokens:
                    break
            spans.append((name, start, done))
            if max_tokens is not None and done >= max_tokens:
                break
        file.flush()
        # The mapping keeps the deleted file's contents on disk until it is released.
        mapped = np.memmap(file, dtype="<i4", mode="r", shape=(done,)) if done else np.empty(0, dtype="<i4")
    return mapped, spans


def _blocks(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            # `readlines` stops after the line with which it exceeds its argument.
            while lines := file.readlines(_BLOCK_CHARACTERS - 1):
                yield "".join(lines)
    except UnicodeDecodeError as error:
        raise JobError(f"{path} is not UTF-8 text: {error}") from error


def _windows(spans: Sequence[tuple[str, int, int]], step: int) -> Iterator[tuple[str, int, int, int]]:
    """Yield file name, offset in the file, start and stop among all tokens, of each window."""
    for name, begin, end in spans:
        for start in range(begin, end, step):
            yield name, start - begin, start, min(start + step, end)


def _file_names(paths: Sequence[Path]) -> list[str]:
    """Return the names that files have in ids, with as many parent folders as tell them apart."""
    if len({path.name for path in paths}) == len(paths):
        return [path.name for path in paths]
    top = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(top).as_posix() for path in paths]
