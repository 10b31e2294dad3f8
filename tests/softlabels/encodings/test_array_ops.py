"""Selection and logarithms that give the same bits in both libraries."""

from __future__ import annotations

import numpy as np
import torch

from softlabels.encodings.array_ops import NUMPY, natural_log, top_k, top_k_shifted, torch_ops


class TestNaturalLog:
    def test_it_is_right_to_two_units_in_the_last_place(self) -> None:
        """Against float64, from the smallest normal to the largest float32."""
        x = np.exp(np.random.default_rng(0).uniform(-87, 88, 100_000)).astype(np.float32)
        exact = np.log(x.astype(np.float64))
        error = np.abs(natural_log(NUMPY, x) - exact)
        assert (error <= 2 * np.maximum(np.spacing(np.abs(exact).astype(np.float32)), 2.0**-26)).all()

    def test_it_gives_the_same_bits_in_torch(self) -> None:
        """Denormals, 1, 0 and everything between."""
        rng = np.random.default_rng(1)
        x = np.concatenate([np.exp(rng.uniform(-103, 88, 50_000)), [0, 1, 1e-45, 0.5, 2]]).astype(np.float32)
        ours, theirs = natural_log(NUMPY, x), natural_log(torch_ops(), torch.from_numpy(x)).numpy()
        assert np.array_equal(ours.view(np.int32), theirs.view(np.int32))
        assert ours[-5] == -np.inf
        assert ours[-4] == 0


class TestSelection:
    def test_ties_go_to_the_lower_id_in_both_libraries(self) -> None:
        """A row of equal entries selects 0, 1, 2."""
        row = np.zeros((1, 50), dtype=np.float32)
        assert top_k_shifted(NUMPY, row, 3).tolist() == [[0, 1, 2]]
        assert top_k_shifted(torch_ops(), torch.from_numpy(row), 3).tolist() == [[0, 1, 2]]

    def test_the_largest_come_first(self) -> None:
        """By value, then by id; -0.0 is 0."""
        row = np.array([[0.5, 2.0, -0.0, 2.0, 1.0]], dtype=np.float32)
        assert top_k(NUMPY, row, 3).tolist() == [[1, 3, 4]]
        assert top_k_shifted(NUMPY, -row, 5).tolist() == [[2, 0, 4, 1, 3]]

    def test_all_of_a_row_can_be_selected(self) -> None:
        """As many as there are."""
        row = -np.arange(4, dtype=np.float32)[None]
        assert top_k_shifted(NUMPY, row, 4).tolist() == top_k_shifted(torch_ops(), torch.from_numpy(row), 4).tolist()
