"""Quantised rows and their head."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softlabels.encodings import Quantised, make_encoding, row_bytes
from softlabels.errors import EncodingError, ShapeMismatchError, UnknownEncodingError
from softlabels.softmath import kl_divergence, log_soften


def rows_like_a_classifier(rows: int = 64, classes: int = 1000) -> np.ndarray:
    """Confident rows of about the spread of EfficientNet-Lite0's."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.2, size=(rows, classes)).astype(np.float32)
    logits[np.arange(rows), rng.integers(0, classes, rows)] += 8
    shifted: np.ndarray = logits - logits.max(axis=1, keepdims=True)
    return shifted


class TestQuantised:
    @pytest.mark.parametrize(("bits", "size"), [(8, 1040), (6, 790), (4, 540), (2, 290)])
    def test_sizes_are_what_the_page_says(self, bits: int, size: int) -> None:
        """4 bytes of header, 16 ids of 10 bits, 16 high bytes, and the codes."""
        assert row_bytes(make_encoding(f"q{bits}", classes=1000)) == size

    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_each_bit_less_costs_about_four_times_the_kl(self, temperature: float) -> None:
        """And eight bits stay under 10⁻⁵."""
        rows = rows_like_a_classifier()
        exact = log_soften(rows.astype(np.float64), temperature=temperature)
        kl = []
        for bits in range(8, 1, -1):
            encoding = make_encoding(f"q{bits}", classes=1000)
            kept = encoding.decode(encoding.encode(rows)).astype(np.float64)
            kl.append(kl_divergence(exact, log_soften(kept, temperature=temperature)).mean())
        assert kl[0] < 1e-5
        assert all(1.5 < wide / narrow < 8 for narrow, wide in pairwise(kl))

    def test_the_largest_comes_back_as_zero(self) -> None:
        """Exactly, so that the top class and its ties stay on top."""
        rows = rows_like_a_classifier()
        encoding = make_encoding("q4", classes=1000)
        decoded = encoding.decode(encoding.encode(rows))
        assert (decoded.max(axis=1) == 0).all()
        assert (decoded.argmax(axis=1) == rows.argmax(axis=1)).all()

    def test_a_row_constant_does_not_matter(self) -> None:
        """Raw logits encode to the bytes of shifted ones."""
        rows = np.round(rows_like_a_classifier() * 64) / 64
        encoding = make_encoding("q8", classes=1000)
        assert np.array_equal(encoding.encode(rows)["targets"], encoding.encode(rows + 16)["targets"])

    def test_one_hopeless_class_does_not_cost_the_others_their_resolution(self) -> None:
        """A class 10,000 below is kept as 96 below."""
        rows = rows_like_a_classifier()
        rows[:, 5] = -1e4
        encoding = make_encoding("q8", classes=1000)
        error = np.abs(encoding.decode(encoding.encode(rows)) - rows)
        assert np.delete(error, 5, axis=1).max() < 0.2

    def test_blocks_do_not_show(self) -> None:
        """A batch encodes to the bytes of its rows one by one."""
        rows = rows_like_a_classifier(200)
        encoding = make_encoding("q6", classes=1000)
        alone = np.concatenate([encoding.encode(row[None])["targets"] for row in rows])
        assert np.array_equal(encoding.encode(rows)["targets"], alone)

    def test_a_refusal_names_rows_of_the_batch_not_of_a_block(self) -> None:
        """The error names row 150 of the batch, not of its block."""
        rows = rows_like_a_classifier(200)
        rows[150, 3] = np.nan
        with pytest.raises(EncodingError) as refused:
            make_encoding("q8", classes=1000).encode(rows)
        assert refused.value.context["rows"] == [150]

    def test_an_empty_batch_is_one(self) -> None:
        """No rows in, no rows out."""
        encoding = make_encoding("q8", classes=10)
        assert encoding.decode(encoding.encode(np.zeros((0, 10), np.float32))).shape == (0, 10)

    def test_leading_dimensions_are_kept(self) -> None:
        """Leading dimensions for views or members are kept."""
        encoding = make_encoding("q8", classes=10)
        packed = encoding.encode(np.random.default_rng(0).normal(size=(6, 10)))["targets"]
        stacked = encoding.decode({"targets": packed.reshape(2, 3, -1)})
        assert np.array_equal(stacked.reshape(6, 10), encoding.decode({"targets": packed}))

    def test_the_wrong_shape_is_refused(self) -> None:
        """Rows of another class count."""
        with pytest.raises(ShapeMismatchError, match="10 classes"):
            make_encoding("q8", classes=10).encode(np.zeros((2, 11)))

    @pytest.mark.parametrize(("bits", "head"), [(1, 4), (9, 4), (8, 0), (8, 10)])
    def test_parameters_out_of_range_are_refused(self, bits: int, head: int) -> None:
        """Bits from 2 to 8, and a head smaller than the row."""
        with pytest.raises(UnknownEncodingError):
            Quantised(classes=10, bits=bits, head=head)

    @given(st.lists(st.floats(-90, 0, width=32), min_size=3, max_size=40), st.integers(2, 8))
    def test_any_row_is_within_half_a_step(self, row: list[float], bits: int) -> None:
        """Whatever the row, the stated bound holds."""
        rows = np.array([row], dtype=np.float32)
        rows -= rows.max()
        encoding = Quantised(classes=len(row), bits=bits, head=1)
        packed = encoding.encode(rows)["targets"]
        lo, step = np.ascontiguousarray(packed[:, :4]).view("<f2")[0].astype(np.float64)
        error = np.abs(encoding.decode({"targets": packed}) - np.maximum(rows, lo))
        assert error.max() <= max(step / 2 * 1.0001, -lo * 2.0 ** -(bits + 8)) - lo * 2.0**-20 + 2.0**-24
