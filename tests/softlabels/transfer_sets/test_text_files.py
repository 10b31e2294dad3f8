"""Text as a transfer set: windows of tokens, with ids that last, in memory that does not grow with the corpus."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.errors import DataUnavailableError, JobError
from softlabels.transfer_sets import SupportsIdentity, SupportsIdSpec, SupportsLengths, load_transfer_set
from softlabels.transfer_sets.ragged import PADDING
from softlabels.transfer_sets.text_files import TokenWindows


def characters() -> Callable[[str], Sequence[int]]:
    """A tokenizer whose tokens are characters."""
    return lambda text: [ord(character) for character in text]


def windows(folder: Path, texts: dict[str, str], **more: Any) -> TokenWindows:
    """Windows of four characters of these files."""
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    settings = {"length": 4, "first_token": None, "max_windows": None, "name": "t", **more}
    return TokenWindows([folder / name for name in texts], characters, **settings)


def spelled(data: TokenWindows) -> dict[str, str]:
    """Every window's text, by id."""
    taken = data.take(np.arange(len(data)))
    lengths = data.lengths(np.arange(len(data)))
    rows = zip(taken.ids.tolist(), taken.inputs, lengths.tolist(), strict=True)
    return {name: "".join(map(chr, row[:length])) for name, row, length in rows}


class TestTokenWindows:
    def test_windows_never_span_two_files(self, tmp_path: Path) -> None:
        """The last one of each file is as long as what is left; ids are file and offset."""
        data = windows(tmp_path, {"a.txt": "abcdef\n", "empty.txt": "", "b.txt": "xy"})
        assert spelled(data) == {"a.txt:0": "abcd", "a.txt:4": "ef\n", "b.txt:0": "xy"}
        assert data.take(np.array([2, 0])).inputs.tolist() == [[120, 121, PADDING, PADDING], [97, 98, 99, 100]]
        assert data.take(np.array([0])).labels is None

    def test_a_long_file_is_read_block_by_block(self, tmp_path: Path) -> None:
        """What the tokenizer is given ends at the end of a line, and nothing is lost between blocks."""
        text = "".join(f"line {number}\n" for number in range(20_000))
        blocks: list[str] = []

        def counting() -> Callable[[str], Sequence[int]]:
            return lambda block: blocks.append(block) or characters()(block)  # type: ignore[func-returns-value]

        (tmp_path / "long.txt").write_text(text)
        data = TokenWindows(
            [tmp_path / "long.txt"], counting, length=1000, first_token=None, max_windows=None, name="long"
        )
        assert "".join(spelled(data).values()) == text
        assert len(blocks) > 2
        assert all(block.endswith("\n") for block in blocks)

    def test_only_so_many_windows(self, tmp_path: Path) -> None:
        """Later files are not even read."""
        data = windows(tmp_path, {"a.txt": "abcdefghij", "b.txt": "xyz"}, max_windows=2)
        assert list(spelled(data)) == ["a.txt:0", "a.txt:4"]

    def test_a_token_to_begin_with(self, tmp_path: Path) -> None:
        """It is part of the window's length, and no part of the offsets."""
        data = windows(tmp_path, {"a.txt": "abcde"}, first_token=35)
        assert spelled(data) == {"a.txt:0": "#abc", "a.txt:3": "#de"}

    def test_files_of_one_name(self, tmp_path: Path) -> None:
        """Are told apart by their folders."""
        data = windows(tmp_path, {"a/t.txt": "ab", "b/t.txt": "cd"})
        assert list(spelled(data)) == ["a/t.txt:0", "b/t.txt:0"]

    def test_it_says_what_it_knows(self, tmp_path: Path) -> None:
        """Ids, files and lengths, before anything is computed."""
        data = windows(tmp_path, {"a.txt": "abcdef"})
        assert isinstance(data, SupportsIdSpec)
        assert isinstance(data, SupportsIdentity)
        assert isinstance(data, SupportsLengths)
        assert (data.id_spec().kind, data.id_spec().width_bytes) == ("str", len("a.txt:0"))
        assert [name for name, _ in data.identity()] == ["a.txt"]
        assert spelled(pickle.loads(pickle.dumps(data))) == spelled(data)

    def test_what_is_no_text(self, tmp_path: Path) -> None:
        """Files without a token, and bytes that are no UTF-8, are named."""
        with pytest.raises(JobError, match="no token"):
            windows(tmp_path, {"a.txt": ""})
        (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
        with pytest.raises(JobError, match="not UTF-8"):
            TokenWindows([tmp_path / "b.txt"], characters, length=4, first_token=None, max_windows=None, name="b")


class TestText:
    def test_by_a_tokenizer_of_transformers(self, make_source: Callable[[str], Any]) -> None:
        """A folder with a tokenizer, as a job names it; with the tokenizer's own beginning on request."""
        source = make_source("text")
        data = load_transfer_set("text", source.arguments, base=source.base)
        assert data.take(np.arange(2)).ids.tolist() == source.ids
        np.testing.assert_array_equal(data.take(np.arange(2)).inputs, source.inputs)
        data = load_transfer_set("text", {**source.arguments, "begin": True, "windows": 1}, base=source.base)
        assert data.take(np.arange(1)).inputs.tolist() == [[1, 2, 3, 4]]

    def test_what_cannot_be_had(self, tmp_path: Path) -> None:
        """Missing files, windows of a token, and a folder without a tokenizer."""
        (tmp_path / "a.txt").write_text("ant")
        (tmp_path / "empty").mkdir()
        pytest.importorskip("transformers", reason="transformers is not installed")
        for arguments, error in (
            ({"files": "no.txt", "tokenizer": "empty"}, DataUnavailableError),
            ({"files": "a.txt", "tokenizer": "empty", "length": 1}, JobError),
            ({"files": "a.txt", "tokenizer": "empty"}, JobError),
        ):
            with pytest.raises(error):
                load_transfer_set("text", arguments, base=tmp_path)
