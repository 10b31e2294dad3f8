"""Sample ids: what may name a sample, and what must not be taken for one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softlabels.errors import BadIdsError
from softlabels.ids import as_ids, from_fixed_bytes, id_kind, to_fixed_bytes


class TestAsIds:
    def test_integers_of_any_width(self) -> None:
        """Lists, ranges and arrays of integers become int64."""
        for values in ([3, 1], range(3, 0, -2), np.array([3, 1], np.uint8), np.array([3, 1], np.int32)):
            ids = as_ids(values)
            assert (ids.dtype, ids.tolist()) == (np.int64, [3, 1])

    def test_strings(self) -> None:
        """Strings stay strings, whatever they look like."""
        ids = as_ids(["7", "ünï"])
        assert (id_kind(ids), ids.tolist()) == ("str", ["7", "ünï"])

    def test_nothing_is_an_empty_array(self) -> None:
        """An empty list is for the caller to refuse."""
        assert len(as_ids([])) == 0

    @pytest.mark.parametrize(
        "values",
        [
            [1, "2"],
            [True, 2],
            [1.0, 2.0],
            [[1, 2], [3, 4]],
            [None],
            ["a", ""],
            ["a\0", "b"],
            [2**63],
            np.array([2**63], np.uint64),
            ["x" * 5000],
            [b"a"],
            np.array(["a"], dtype=object),
        ],
    )
    def test_what_cannot_name_a_sample(self, values: object) -> None:
        """Mixtures, booleans, floats, nested lists, empty and oversized names are refused."""
        with pytest.raises(BadIdsError):
            as_ids(values)  # type: ignore[arg-type]


class TestFixedBytes:
    @given(st.lists(st.text(min_size=1, max_size=20).filter(lambda s: "\0" not in s and s.isprintable()), min_size=1))
    def test_round_trip(self, names: list[str]) -> None:
        """Strings survive the form that stores keep them in."""
        ids = as_ids(names)
        width = max(len(name.encode()) for name in names)
        assert from_fixed_bytes(to_fixed_bytes(ids, width_bytes=width)).tolist() == names

    def test_too_long_for_the_store(self) -> None:
        """Cutting an id would make two of one."""
        with pytest.raises(BadIdsError, match="does not fit"):
            to_fixed_bytes(as_ids(["abcd"]), width_bytes=3)
