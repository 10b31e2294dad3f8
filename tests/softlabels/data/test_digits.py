"""The digits of scikit-learn: small, bundled, in the form of MNIST."""

from __future__ import annotations

import numpy as np
import pytest

from softlabels.data.digits import load_digits
from softlabels.errors import DataUnavailableError

pytest.importorskip("sklearn", reason="scikit-learn, which bundles the digits, is not installed")


class TestLoadDigits:
    def test_the_splits_share_no_sample_and_leave_none_out(self) -> None:
        """80 to 20, ids being positions in scikit-learn's own order."""
        train, test = load_digits(split="train"), load_digits(split="test")
        assert (len(train), len(test)) == (1_438, 359)
        np.testing.assert_array_equal(np.arange(1_797), np.sort(np.concatenate([train.ids, test.ids])))

    def test_inputs_are_bytes_that_use_the_whole_range(self) -> None:
        """As MNIST's are, so that the same nets read them."""
        train = load_digits()
        assert train.inputs.shape == (1_438, 8, 8)
        assert train.inputs.dtype == np.uint8
        assert (train.inputs.min(), train.inputs.max()) == (0, 255)

    def test_every_class_is_in_both_splits(self) -> None:
        """So that a student can be tested on each."""
        for split in (load_digits(split="train"), load_digits(split="test")):
            assert split.labels is not None
            assert np.unique(split.labels).tolist() == list(range(10))

    def test_the_same_split_each_time(self) -> None:
        """The shuffle's seed is fixed."""
        np.testing.assert_array_equal(load_digits(split="test").ids, load_digits(split="test").ids)

    def test_an_unknown_split_is_refused(self) -> None:
        """There are two."""
        with pytest.raises(DataUnavailableError, match="'train' and 'test', not 'valid'"):
            load_digits(split="valid")  # type: ignore[arg-type]
