"""Sample ids: strings in little memory, and duplicates among very many ids."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from softlabels.errors import BadIdsError
from softlabels.transfer_sets import examine_ids
from softlabels.transfer_sets.sample_ids import PackedStrings


class TestPackedStrings:
    def test_strings_come_back(self) -> None:
        """By position, all of them, and some at once."""
        names = [f"größe/{number}" for number in range(100)]
        packed = PackedStrings(names)
        assert (list(packed), len(packed), packed[7]) == (names, 100, names[7])
        assert packed.take(np.array([5, 0, 5])).tolist() == [names[5], names[0], names[5]]
        assert packed.id_spec().width_bytes == len("größe/99".encode())

    def test_strings_take_little_memory(self) -> None:
        """A third of what a list of strings does, also while they are packed."""
        tracemalloc.start()
        try:
            packed = PackedStrings(f"n{number // 1000:08d}/image_{number:08d}.JPEG" for number in range(20_000))
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

    def test_a_duplicate_is_found(self) -> None:
        """Wherever the two are."""
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

    def test_too_many_ids_are_checked_when_the_store_is_finished(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Then the store refuses a repeat when it is finished, and the plan takes no memory for them."""
        monkeypatch.setattr("softlabels.transfer_sets.sample_ids.MAX_CHECKED_IDS", 3)
        assert examine_ids([np.array([7, 7]), np.array([7, 8])], 4, "x").dense_start is None
