"""Random numbers as a function of store, sample and view."""

from __future__ import annotations

import numpy as np

from softlabels.splitmix64 import rng_keys, uniforms

GOLDEN = [3160791329942314370, 1460953421533033765, 7262902360538695750]


class TestDrawKeys:
    def test_keys_do_not_depend_on_the_batch(self) -> None:
        """Row 7 has the same key alone as among others: what a resume needs."""
        ids = np.arange(20)
        assert rng_keys("store", ids)[7] == rng_keys("store", ids[7:8])[0]

    def test_store_sample_and_view_all_count(self) -> None:
        """Another of any of them is another key."""
        ids = np.arange(1000)
        keys = np.concatenate([rng_keys("a", ids), rng_keys("b", ids), rng_keys("a", ids, 1), rng_keys("a", ids, 2)])
        assert len(np.unique(keys)) == 4000

    def test_string_ids_have_keys_too(self) -> None:
        """One each, the same each time."""
        ids = np.array(["cat/1", "cat/2"])
        assert np.array_equal(rng_keys("a", ids), rng_keys("a", ids))
        assert len(np.unique(rng_keys("a", ids))) == 2

    def test_keys_are_the_ones_of_the_first_release(self) -> None:
        """Fixed values: a store resumed by a later version continues with the same draws."""
        assert rng_keys("mnist", np.array([0, 1, -1]), np.array([0, 3, 0])).tolist() == GOLDEN


class TestUniforms:
    def test_they_are_uniform_and_streams_do_not_go_together(self) -> None:
        """Mean, variance and correlation of 100,000 within five standard errors."""
        keys = rng_keys("store", np.arange(100_000))
        first, second = uniforms(keys, 0), uniforms(keys, 1)
        assert 0 <= first.min()
        assert first.max() < 1
        assert abs(first.mean() - 0.5) < 5 * (1 / 12 / 1e5) ** 0.5
        assert abs(first.var() - 1 / 12) < 0.002
        assert abs(np.corrcoef(first, second)[0, 1]) < 5 / 1e5**0.5
