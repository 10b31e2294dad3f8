"""The cheapest encoding within a budget, by measuring."""

from __future__ import annotations

import numpy as np
import pytest

from softlabels.encodings.auto import choose_encoding
from softlabels.errors import EncodingError

RNG = np.random.default_rng(0)
PILOT = RNG.normal(size=(300, 8)) @ RNG.normal(size=(8, 200)) + 0.2 * RNG.normal(size=(300, 200))


class TestChooseEncoding:
    def test_the_cheapest_that_fits_is_taken(self) -> None:
        """Nothing smaller in the table fits, and the choice does at every temperature."""
        choice = choose_encoding(PILOT, budget_kl=1e-3, temperatures=(1.0, 4.0))
        chosen = next(tried for tried in choice.table if tried.encoding is choice.encoding)
        assert chosen.fits
        assert all(figures["mean"] <= 1e-3 for figures in chosen.kl.values())
        assert not any(tried.fits for tried in choice.table if tried.row_bytes < chosen.row_bytes)

    def test_a_tighter_budget_costs_more_bytes(self) -> None:
        """And one of zero costs all of them."""
        sizes = [choose_encoding(PILOT, budget_kl=kl).table for kl in (1e-2, 1e-5)]
        cheapest = [min(tried.row_bytes for tried in table if tried.fits) for table in sizes]
        assert cheapest[0] < cheapest[1]
        assert choose_encoding(PILOT, budget_kl=0.0).encoding.name == "f32"

    def test_truncated_rows_are_tried_for_one_temperature_only(self) -> None:
        """They can be had at no other."""
        one = choose_encoding(PILOT, budget_kl=1.0, temperatures=(1.0,))
        two = choose_encoding(PILOT, budget_kl=1.0, temperatures=(1.0, 2.0))
        assert any(tried.encoding.name == "topk" for tried in one.table)
        assert not any(tried.encoding.name == "topk" for tried in two.table)
        locked = choose_encoding(PILOT, budget_kl=1.0, temperatures=(2.0,), locked=True)
        assert {T for tried in locked.table for T in tried.kl} == {1.0}

    def test_what_refuses_the_rows_says_so(self) -> None:
        """A class of probability 0: dense rows keep it, quantised ones do not."""
        rows = PILOT - PILOT.max(axis=1, keepdims=True)
        rows[:, 7] = -np.inf
        choice = choose_encoding(rows[:40], budget_kl=1e-3)
        refused = [tried for tried in choice.table if tried.refused]
        assert refused
        assert not any(tried.fits for tried in refused)

    def test_a_budget_that_nothing_meets_is_an_error_with_the_table(self) -> None:
        """Not the least bad one."""
        with pytest.raises(EncodingError) as refused:
            choose_encoding(PILOT, budget_kl=-1.0)
        assert refused.value.context["table"]

    def test_one_row_is_no_pilot(self) -> None:
        """Something has to be measured on."""
        with pytest.raises(EncodingError, match="pilot"):
            choose_encoding(PILOT[:1], budget_kl=1.0)
