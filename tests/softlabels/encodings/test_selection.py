"""Encodings as a job requests them, and the cheapest one that meets a KL budget."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from softlabels.encodings import ENCODING_NAMES, make_encoding, row_bytes
from softlabels.encodings.selection import choose_encoding, parse_encoding
from softlabels.errors import EncodingError, UnknownEncodingError


def pilot() -> np.ndarray:
    """Rows of low rank, 64 classes."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(200, 5)) @ rng.normal(size=(5, 64)) + 0.1 * rng.normal(size=(200, 64))


class TestParse:
    @pytest.mark.parametrize(
        ("given", "name", "params"),
        [
            ("f16", "f16", {}),
            ("q8", "q8", {"head": 16}),
            ({"name": "q", "bits": 6, "head": 32}, "q6", {"head": 32}),
            ({"name": "q"}, "q8", {"head": 16}),
            ("topk50", "topk", {"k": 50, "tail": "uniform"}),
            ("topk5-ghost", "topk", {"k": 5, "tail": "ghost"}),
            ({"name": "topk", "k": 7, "tail": "renormalise"}, "topk", {"k": 7, "tail": "renormalise"}),
            ({"name": "sampled", "head": 4, "draws": 20}, "sampled", {"head": 4, "draws": 20}),
        ],
    )
    def test_names_and_tables_are_read(self, given: object, name: str, params: dict[str, Any]) -> None:
        """To the encoding that they mean."""
        encoding = parse_encoding(given).make(classes=1000)
        assert encoding.name == name
        assert dict(encoding.params) == params

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ("q9", "known are"),
            ("f61", "did you mean `f16`"),
            ({"name": "topk", "kk": 5}, "did you mean `k`"),
            ({"name": "topk"}, "missing required field `k`"),
            ({"name": "topk", "k": "five"}, r"`int`, got `str` \(at `k`\)"),
            ({"name": "topk", "k": True}, "`k`"),
            ("topk5-zero", "uniform"),
            ({"name": "q8", "bits": 4}, "unknown field `bits`"),
            ({"name": "basis"}, "row_bytes"),
            ({"name": "basis", "row_bytes": 1.5}, "`row_bytes`"),
            ({"name": "auto"}, "kl"),
            ({"name": "auto", "kl": 1e-3, "statistic": "median"}, "`statistic`"),
            ({"name": "sampled", "bytes": 5}, "unknown field `bytes`"),
            ({"k": 5}, "a name"),
            (8, "a name"),
        ],
    )
    def test_what_cannot_be_is_refused_by_name(self, given: object, said: str) -> None:
        """With the nearest known name, or what is missing."""
        with pytest.raises(UnknownEncodingError, match=said):
            parse_encoding(given)

    def test_classes_are_checked_where_known(self) -> None:
        """A topk of 50 out of 10 classes."""
        with pytest.raises(UnknownEncodingError):
            parse_encoding("topk50", classes=10)

    def test_a_basis_is_learnt_from_the_pilot(self) -> None:
        """And refused without one."""
        requested = parse_encoding({"name": "basis", "row_bytes": 30})
        assert requested.needs_pilot
        assert row_bytes(requested.make(classes=64, pilot_BC=pilot())) <= 30
        with pytest.raises(EncodingError, match="pilot"):
            requested.make(classes=64)

    def test_a_sample_is_sized_in_bytes(self) -> None:
        """With a pilot or without."""
        requested = parse_encoding({"name": "sampled", "row_bytes": 40})
        assert row_bytes(requested.make(classes=5000)) <= 40
        assert row_bytes(requested.make(classes=64, pilot_BC=pilot())) <= 40

    def test_auto_chooses_on_the_pilot(self) -> None:
        """The chosen encoding meets the budget."""
        encoding = parse_encoding({"name": "auto", "kl": 1e-3}).make(classes=64, pilot_BC=pilot())
        assert row_bytes(encoding) < 128


class TestMakeEncoding:
    def test_every_name_is_known(self) -> None:
        """Each in ENCODING_NAMES makes an encoding, or says what it lacks."""
        more = {"topk": {"k": 2}, "sampled": {"head": 1, "draws": 2}}
        for name in ENCODING_NAMES:
            if name in ("basis", "hidden"):
                with pytest.raises(UnknownEncodingError, match=r"missing required|needs the arrays"):
                    make_encoding(name, classes=10)
                continue
            encoding = make_encoding(name, classes=10, params=more.get(name))
            again = make_encoding(name, classes=10, params=encoding.params, constants=encoding.constants)
            assert again.name == name
            assert again.fields == encoding.fields


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
        """A budget of 0 takes f32."""
        sizes = [choose_encoding(PILOT, budget_kl=kl).table for kl in (1e-2, 1e-5)]
        cheapest = [min(tried.row_bytes for tried in table if tried.fits) for table in sizes]
        assert cheapest[0] < cheapest[1]
        assert choose_encoding(PILOT, budget_kl=0.0).encoding.name == "f32"

    def test_truncated_rows_are_tried_for_one_temperature_only(self) -> None:
        """They exist at no other."""
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
        """The best one that exceeds the budget is not taken."""
        with pytest.raises(EncodingError) as refused:
            choose_encoding(PILOT, budget_kl=-1.0)
        assert refused.value.context["table"]

    def test_one_row_is_no_pilot(self) -> None:
        """Something has to be measured on."""
        with pytest.raises(EncodingError, match="pilot"):
            choose_encoding(PILOT[:1], budget_kl=1.0)
