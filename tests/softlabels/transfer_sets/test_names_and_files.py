"""Names in little memory, repeats among very many ids, patterns of files, and how a source is found by its name."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.errors import BadIdsError, DataUnavailableError, JobError, ReferenceLoadError
from softlabels.transfer_sets import check_source, examine_ids, load_transfer_set
from softlabels.transfer_sets.sample_ids import PackedStrings
from softlabels.transfer_sets.source_files import list_files, match_files

PARTS = """
import numpy as np
from softlabels.transfer_set import ArrayTransferSet

READY = ArrayTransferSet("ready", np.zeros((2, 3)))


def made(count, *, seed=0):
    return ArrayTransferSet("made", np.full((count, 2), seed))


def anything(**words):
    return ArrayTransferSet("any", np.zeros((len(words), 1)))


def number():
    return 3
"""


class TestPackedNames:
    def test_they_come_back(self) -> None:
        """By position, all of them, and some at once."""
        names = [f"größe/{number}" for number in range(100)]
        packed = PackedStrings(names)
        assert (list(packed), len(packed), packed[7]) == (names, 100, names[7])
        assert packed.take(np.array([5, 0, 5])).tolist() == [names[5], names[0], names[5]]
        assert packed.id_spec().width_bytes == len("größe/99".encode())

    def test_they_take_little_memory(self) -> None:
        """A third of what a list of strings does, also while they are packed."""
        tracemalloc.start()
        try:
            packed = PackedStrings(f"n{number // 1000:08d}/picture_{number:08d}.JPEG" for number in range(20_000))
            used, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(packed) == 20_000
        assert used / 20_000 < 45
        assert peak / 20_000 < 120

    @pytest.mark.parametrize("name", ["", "x" * 5000, "a\0b", "\udcff"])
    def test_what_cannot_be_an_id(self, name: str) -> None:
        """Empty, endless, with NUL, or no text."""
        with pytest.raises(BadIdsError):
            PackedStrings(["a", name])

    def test_a_repeat_is_found(self) -> None:
        """Wherever the two stand."""
        names = [f"n{number}" for number in range(5000)]
        assert PackedStrings(names).find_duplicate() is None
        assert PackedStrings([*names, "n77"]).find_duplicate() == "n77"


class TestExamineIds:
    def test_dense_ids_over_blocks(self) -> None:
        """They count up by one from block to block; a gap between two makes them sparse."""
        assert examine_ids([np.arange(5, 9), np.arange(9, 12)], 7, "x").dense_start == 5
        assert examine_ids([np.arange(5, 9), np.arange(10, 12)], 6, "x").dense_start is None

    def test_repeats_over_blocks(self) -> None:
        """Of integers and of strings; the id and the set are named."""
        with pytest.raises(BadIdsError, match="id 3 occurs twice in transfer set 'x'"):
            examine_ids([np.array([1, 3]), np.array([4, 3])], 4, "x")
        with pytest.raises(BadIdsError, match="id 'b' occurs twice"):
            examine_ids([np.array(["a", "b"]), np.array(["b"])], 3, "x")

    def test_kinds_do_not_mix(self) -> None:
        """Integers in one block and strings in the next."""
        with pytest.raises(BadIdsError, match="mixed"):
            examine_ids([np.array([1]), np.array(["a"])], 2, "x")

    def test_too_many_to_look_at_are_left_to_the_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Then the store refuses a repeat when it is finished, and the plan takes no memory for them."""
        monkeypatch.setattr("softlabels.transfer_sets.sample_ids.MAX_CHECKED_IDS", 3)
        assert examine_ids([np.array([7, 7]), np.array([7, 8])], 4, "x").dense_start is None


class TestMatching:
    def test_ranges_choices_and_stars(self, tmp_path: Path) -> None:
        """As shells and the webdataset library write them; sorted within a pattern, in order between."""
        for name in ("a-000.tar", "a-001.tar", "b-000.tar", "c.tar"):
            (tmp_path / name).touch()
        (tmp_path / "d.tar").mkdir()

        def names(patterns: str | list[str]) -> list[str]:
            return [path.name for path in match_files(patterns, tmp_path, what="tars")]

        assert names("a-{000..001}.tar") == ["a-000.tar", "a-001.tar"]
        assert names("{b,a}-000.tar") == ["b-000.tar", "a-000.tar"]
        assert names(["c.tar", "?-*.tar"]) == ["c.tar", "a-000.tar", "a-001.tar", "b-000.tar"]
        assert names(str(tmp_path / "c.tar")) == ["c.tar"]

    def test_what_names_nothing_or_too_much(self, tmp_path: Path) -> None:
        """A gap in a range, a folder, a million files and more."""
        (tmp_path / "0.tar").touch()
        with pytest.raises(DataUnavailableError, match=r"1\.tar"):
            match_files("{0..1}.tar", tmp_path, what="tars")
        with pytest.raises(DataUnavailableError, match="names no file"):
            match_files(".", tmp_path, what="tars")
        for pattern in ("{0..99999999}.tar", "{0..9999}{0..9999}.tar"):
            with pytest.raises(JobError, match="more than 1,000,000 files"):
                match_files(pattern, tmp_path, what="tars")

    def test_a_walk_is_always_the_same(self, tmp_path: Path) -> None:
        """Files of a folder first, then its folders, each in order; hidden ones are passed over."""
        for name in ("b/x", "b/a/y", "a", ".git/config", "c/.cache", "b/z"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        assert list(list_files(tmp_path)) == ["a", "b/x", "b/z", "b/a/y"]


class TestLoading:
    @pytest.fixture
    def load(self, tmp_path: Path) -> Any:
        """Loads from a file of the user's."""
        (tmp_path / "parts.py").write_text(PARTS)
        return lambda source, **arguments: load_transfer_set(source, arguments, base=tmp_path)

    def test_functions_and_ready_sets(self, load: Any) -> None:
        """A callable gets the arguments; anything else is taken as it is."""
        assert len(load("parts.py:made", count=4, seed=1)) == 4
        assert load("parts.py:READY").name == "ready"
        assert len(load("parts.py:anything", a=1, b=2)) == 2

    @pytest.mark.parametrize(
        ("source", "arguments", "words"),
        [
            ("parts.py:made", {"cuont": 3}, "no argument `cuont`: did you mean `count`"),
            ("parts.py:made", {"count": 3, "zzz": 1}, "no argument `zzz`; it takes .count, .*seed=0"),
            ("parts.py:made", {}, "missing a required argument:.*count"),
            ("parts.py:number", {}, "returns a int, not a TransferSet"),
        ],
    )
    def test_functions_that_do_not_fit(self, load: Any, source: str, arguments: Any, words: str) -> None:
        """The argument is named, with the nearest that there is."""
        with pytest.raises(JobError, match=words):
            load(source, **arguments)

    def test_references_that_lead_nowhere(self, load: Any) -> None:
        """As everywhere."""
        with pytest.raises(ReferenceLoadError, match="nothing"):
            load("parts.py:nothing")

    @pytest.mark.parametrize(
        ("source", "words"),
        [
            ("imagefolder", "did you mean `image_folder`"),
            ("h5", "`hdf5`"),
            ("lmdb", "use one of image_folder"),
            ("zar", "`zarr`"),
            ("", "use one of image_folder"),
        ],
    )
    def test_a_kind_that_is_unknown(self, source: str, words: str) -> None:
        """With the nearest one, and all."""
        with pytest.raises(JobError, match=words):
            check_source(source)
