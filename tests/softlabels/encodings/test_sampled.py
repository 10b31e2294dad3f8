"""Sampled rows: unbiased, reproducible, of fixed size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from softlabels.encodings import Sampled, rng_keys, row_bytes
from softlabels.encodings.sampled import expected_error, sampled_within
from softlabels.errors import EncodingError, UnknownEncodingError

REPEATS = 4_000


def long_tailed(classes: int) -> NDArray[np.float32]:
    """One row with a Zipf tail, shuffled, its largest at 0."""
    logits = -1.1 * np.log(1.0 + np.random.default_rng(3).permutation(classes))
    return np.asarray(logits - logits.max(), dtype=np.float32)[None]


def distributions(encoding: Sampled, row: NDArray[np.float32], repeats: int) -> NDArray[np.float64]:
    """q of the same row encoded under many keys."""
    rows = np.repeat(row, repeats, axis=0)
    encoded = encoding.encode(rows, keys_B=rng_keys("test", np.arange(repeats)))
    return np.exp(encoding.decode(encoded).astype(np.float64))


class TestUnbiased:
    @pytest.mark.parametrize(("head", "draws"), [(0, 8), (3, 12), (20, 10)])
    def test_the_mean_over_keys_is_the_row(self, head: int, draws: int) -> None:
        """Every class's z-score over 4,000 repeats, whether the head is too short, right or too long."""
        row = long_tailed(300)
        p = np.exp(row[0].astype(np.float64))
        p /= p.sum()
        q = distributions(Sampled(classes=300, head=head, draws=draws), row, REPEATS)
        error = q.mean(axis=0) - p
        standard_error = np.maximum(q.std(axis=0) / REPEATS**0.5, 1e-8)
        z = error / standard_error
        seen = (q > 0).sum(axis=0) >= 20  # a normal approximation needs some hits
        assert np.abs(z[seen]).max() < 5
        assert abs(np.square(z[seen]).mean() - 1) < 0.5

    def test_the_error_is_what_theory_says(self) -> None:
        """`expected_error` is the root of the mean squared error within 3%."""
        row = long_tailed(300)
        p = np.exp(row.astype(np.float64))
        p /= p.sum()
        encoding = Sampled(classes=300, head=5, draws=20)
        found = np.sqrt(np.square(distributions(encoding, row, REPEATS) - p).sum(axis=1).mean())
        assert found == pytest.approx(expected_error(encoding, p), rel=0.03)


class TestReproducible:
    def test_a_resumed_capture_draws_the_same(self) -> None:
        """Bytes depend on the row and its key, not on the batch that it comes in."""
        rows = np.random.default_rng(0).normal(0, 3, size=(40, 5000)).astype(np.float32)
        keys = rng_keys("store", np.arange(40))
        encoding = Sampled(classes=5000, head=4, draws=30)
        whole = encoding.encode(rows, keys_B=keys)["targets"]
        resumed = encoding.encode(rows[17:], keys_B=keys[17:])["targets"]
        assert np.array_equal(whole[17:], resumed)
        torch_bytes = encoding.encode_torch(torch.from_numpy(rows), keys_B=keys)["targets"].numpy()
        assert (torch_bytes != whole).any(axis=1).mean() <= 0.05

    def test_other_views_draw_otherwise(self) -> None:
        """Each view has its own draws."""
        row = long_tailed(5000)
        encoding = Sampled(classes=5000, head=4, draws=30)
        first = encoding.encode(row, keys_B=rng_keys("store", np.array([1]), 0))["targets"]
        second = encoding.encode(row, keys_B=rng_keys("store", np.array([1]), 1))["targets"]
        assert not np.array_equal(first, second)

    def test_without_keys_it_is_refused(self) -> None:
        """Without keys a resumed capture could not repeat the draws."""
        with pytest.raises(EncodingError, match="key"):
            Sampled(classes=10, head=2, draws=3).encode(np.zeros((1, 10)))


class TestSizes:
    @pytest.mark.parametrize("size", [48, 64, 128, 512])
    def test_a_budget_is_filled_and_not_passed(self, size: int) -> None:
        """49,152 classes: more draws than two bytes an id would allow."""
        encoding = sampled_within(size, classes=49_152)
        assert size - 3 <= row_bytes(encoding) <= size
        assert encoding.draws > size / 4

    def test_a_pilot_chooses_the_head(self) -> None:
        """A row with ten large classes gets a larger head than a flat one."""
        peaked = np.r_[np.full(10, 0.09), np.full(990, 0.1 / 990)][None]
        flat = np.full((1, 1000), 1e-3)
        sizes = [sampled_within(96, classes=1000, p_BC=p).head for p in (peaked, flat)]
        assert sizes[0] >= 10 > sizes[1]

    def test_what_cannot_be_is_refused(self) -> None:
        """No room for a draw; no class left outside the head."""
        with pytest.raises(EncodingError):
            sampled_within(1, classes=49_152)
        with pytest.raises(UnknownEncodingError):
            Sampled(classes=10, head=10, draws=1)

    def test_damaged_rows_are_refused_not_misread(self) -> None:
        """A row whose draws do not add up is an error."""
        encoding = Sampled(classes=1000, head=2, draws=8)
        size = row_bytes(encoding)
        for bad in (np.zeros((1, size), np.uint8), np.full((1, size), 255, np.uint8)):
            with pytest.raises(EncodingError, match="damaged"):
                encoding.decode({"targets": bad})
            with pytest.raises(EncodingError, match="damaged"):
                encoding.decode_torch({"targets": torch.from_numpy(bad)})
