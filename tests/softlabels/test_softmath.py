"""The reference mathematics: tempering, means, what is locked, objective and closed-form gradients."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from softlabels import softmath
from softlabels.errors import (
    RequestError,
    ShapeMismatchError,
    TemperatureError,
)
from softlabels.wire import to_problem
from tests.softlabels.losses import reference_losses

Array = NDArray[np.float64]

temperatures = st.floats(0.05, 200.0)
shifts = st.floats(-1e3, 1e3)


def values(limit: float = 60.0) -> st.SearchStrategy[float]:
    """Logits of ordinary size."""
    return st.floats(-limit, limit)


def rows(limit: float = 60.0) -> st.SearchStrategy[Array]:
    """logits_BC with 1 to 4 rows and 1 to 7 classes."""
    shape = st.tuples(st.integers(1, 4), st.integers(1, 7))
    return cast("st.SearchStrategy[Array]", hnp.arrays(np.float64, shape, elements=values(limit)))


@st.composite
def ensembles(draw: st.DrawFn) -> tuple[Array, list[float]]:
    """logits_MBC of 1 to 4 members and a weight for each."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6)))
    logits_MBC = draw(hnp.arrays(np.float64, shape, elements=values()))
    weights = draw(st.lists(st.floats(0.01, 50.0), min_size=shape[0], max_size=shape[0]))
    return logits_MBC, weights


@st.composite
def row_pairs(draw: st.DrawFn, limit: float = 60.0) -> tuple[Array, Array]:
    """Two arrays of rows of one shape."""
    first = draw(rows(limit))
    return first, draw(hnp.arrays(np.float64, first.shape, elements=values(limit)))


def explicit_softmax(logits_BC: Array, temperature: float) -> Array:
    """Eq. 1 as it stands in the paper, in long doubles, whose range needs no shift at these sizes."""
    e = np.exp(np.asarray(logits_BC, dtype=np.longdouble) / temperature)
    return np.asarray(e / e.sum(axis=-1, keepdims=True), dtype=np.float64)


class TestCheckTemperature:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [(1, 1.0), (2.5, 2.5), (np.float32(0.5), 0.5), (np.int64(20), 20.0), (Fraction(1, 4), 0.25), (1e-300, 1e-300)],
    )
    def test_finite_numbers_above_zero_pass(self, given: object, expected: float) -> None:
        """Python's and numpy's numbers come back as a plain float."""
        checked = softmath.check_temperature(given)
        assert expected == checked
        assert type(checked) is float

    @pytest.mark.parametrize(
        "bad",
        [
            *(0, 0.0, -0.0, -1, -3.5, math.nan, math.inf, -math.inf, 10**400, Fraction(1, 10**400), np.float64("nan")),
            *(True, False, np.True_, "4", "", b"4", None, 1j, [4.0], np.array(4.0), Decimal(4)),
        ],
        ids=repr,
    )
    def test_anything_else_is_refused_by_name(self, bad: object) -> None:
        """The message shows what was given, and the error can travel as JSON."""
        with pytest.raises(TemperatureError, match="finite number above 0") as caught:
            softmath.check_temperature(bad)
        assert repr(bad) in str(caught.value)
        json.dumps(to_problem(caught.value), allow_nan=False)

    @pytest.mark.parametrize("bad", [0, math.nan, "4", True])
    def test_every_function_with_a_temperature_checks_it(self, bad: Any) -> None:
        """No function divides by what is no temperature."""
        z = np.zeros((2, 3))
        for call in (
            lambda: softmath.soften(z, temperature=bad),
            lambda: softmath.log_soften(z, temperature=bad),
            lambda: softmath.mean_arithmetic(z[None], temperature=bad),
            lambda: softmath.retemper(z, captured=1.0, temperature=bad),
            lambda: softmath.retemper(z, captured=bad, temperature=1.0),
            lambda: reference_losses.soft_gradient(z, z, temperature=bad),
            lambda: reference_losses.distillation_objective(z, z, temperature=bad),
            lambda: reference_losses.logit_matching_gradient_limit(z, z, temperature=bad),
        ):
            with pytest.raises(TemperatureError):
                call()


class TestSoften:
    @given(rows(), temperatures)
    def test_it_is_equation_1(self, logits_BC: Array, temperature: float) -> None:
        """exp(z/T) over its sum."""
        expected = explicit_softmax(logits_BC, temperature)
        np.testing.assert_allclose(softmath.soften(logits_BC, temperature=temperature), expected, rtol=1e-9, atol=1e-15)

    @given(rows(1e6), temperatures)
    def test_rows_sum_to_one(self, logits_BC: Array, temperature: float) -> None:
        """Within 1e-6, as float32 too."""
        for given_BC in (logits_BC, logits_BC.astype(np.float32)):
            p_BC = softmath.soften(given_BC, temperature=temperature)
            np.testing.assert_allclose(p_BC.sum(axis=-1, dtype=np.float64), 1.0, atol=1e-6)
            assert (p_BC >= 0).all()

    @given(rows(), temperatures, st.floats(1.0, 50.0))
    def test_a_higher_temperature_never_sharpens(self, logits_BC: Array, temperature: float, factor: float) -> None:
        """Entropy never falls as the temperature rises."""
        cool = reference_losses.entropy(softmath.log_soften(logits_BC, temperature=temperature))
        warm = reference_losses.entropy(softmath.log_soften(logits_BC, temperature=temperature * factor))
        assert (warm >= cool - 1e-9).all()

    @given(rows(), temperatures, shifts)
    def test_a_row_constant_changes_nothing(self, logits_BC: Array, temperature: float, shift: float) -> None:
        """Logits are free up to a constant a row."""
        expected = softmath.soften(logits_BC, temperature=temperature)
        shifted = softmath.soften(logits_BC + shift, temperature=temperature)
        np.testing.assert_allclose(shifted, expected, rtol=1e-9, atol=1e-9)

    @given(rows())
    def test_the_uniform_is_the_limit_of_high_temperatures(self, logits_BC: Array) -> None:
        """At T = 1e9 logits of up to 60 no longer matter."""
        p_BC = softmath.soften(logits_BC, temperature=1e9)
        np.testing.assert_allclose(p_BC, 1.0 / logits_BC.shape[1], rtol=1e-6)

    @given(rows(), temperatures)
    def test_log_soften_is_its_log(self, logits_BC: Array, temperature: float) -> None:
        """exp(log p) = p, and log p stays finite where p underflows."""
        logp_BC = softmath.log_soften(logits_BC, temperature=temperature)
        np.testing.assert_allclose(np.exp(logp_BC), softmath.soften(logits_BC, temperature=temperature), rtol=1e-12)
        assert np.isfinite(logp_BC).all()

    @pytest.mark.parametrize(
        ("given", "out"), [(np.float16, np.float32), (np.float32, np.float32), (np.float64, np.float64)]
    )
    def test_the_dtype_stays(self, given: type, out: type) -> None:
        """Halves come back as float32, the others as they came."""
        z: NDArray[Any] = np.array([[1.0, 2.0, 4.0]], dtype=given)
        assert softmath.soften(z, temperature=2.0).dtype == out
        assert softmath.log_soften(z, temperature=2.0).dtype == out
        assert reference_losses.shift_rows(z).dtype == out
        assert softmath.retemper(z, captured=1.0, temperature=2.0).dtype == out
        assert softmath.mean_geometric(z[None]).dtype == out
        assert softmath.mean_arithmetic(z[None], temperature=2.0).dtype == out

    @pytest.mark.parametrize("temperature", [1e-300, 1e-3, 1.0, 20.0, 1e300])
    def test_minus_infinity_is_a_probability_of_zero(self, temperature: float) -> None:
        """One finite entry is enough for a sound row."""
        z = np.array([[-np.inf, 3.0, -np.inf], [-np.inf, 0.0, 0.0]])
        expected = np.array([[0.0, 1.0, 0.0], [0.0, 0.5, 0.5]])
        np.testing.assert_array_equal(expected, softmath.soften(z, temperature=temperature))
        logp_BC = softmath.log_soften(z, temperature=temperature)
        assert np.isneginf(logp_BC[expected == 0]).all()
        np.testing.assert_allclose([0.0, math.log(2)], reference_losses.entropy(logp_BC))

    @pytest.mark.parametrize(
        "row", [[np.nan, 1.0, 2.0], [np.inf, 1.0, 2.0], [-np.inf] * 3], ids=["nan", "+inf", "all -inf"]
    )
    def test_a_row_without_a_distribution_is_nan(self, row: list[float]) -> None:
        """Never plausible numbers; the next row is untouched."""
        p_BC = softmath.soften(np.array([row, [0.0, 0.0, 0.0]]), temperature=1.0)
        assert np.isnan(p_BC[0]).all()
        np.testing.assert_allclose(p_BC[1], 1 / 3)

    def test_extreme_logits_and_temperatures_stay_sound(self) -> None:
        """Neither the largest float64 nor the smallest temperature makes a NaN."""
        z = np.array([[1.7e308, -1.7e308, 0.0]])
        np.testing.assert_array_equal([[1.0, 0.0, 0.0]], softmath.soften(z, temperature=5e-324))
        np.testing.assert_allclose(softmath.soften(z / 1e300, temperature=1e308), [[1 / 3] * 3])

    def test_no_rows_are_no_rows(self) -> None:
        """An empty batch is not an error for a pure function."""
        assert softmath.soften(np.zeros((0, 3)), temperature=2.0).shape == (0, 3)

    @pytest.mark.parametrize("shape", [(), (0,), (2, 0)])
    def test_rows_without_classes_are_refused(self, shape: tuple[int, ...]) -> None:
        """There is no distribution over nothing."""
        with pytest.raises(ShapeMismatchError, match="at least one class"):
            softmath.soften(np.zeros(shape), temperature=1.0)


class TestShiftRowsAndZeroMean:
    @given(rows(), temperatures)
    def test_shifted_rows_have_their_largest_at_zero(self, logits_BC: Array, temperature: float) -> None:
        """And are the same distributions."""
        shifted_BC = reference_losses.shift_rows(logits_BC)
        np.testing.assert_array_equal(shifted_BC.max(axis=-1), 0.0)
        expected = softmath.soften(logits_BC, temperature=temperature)
        np.testing.assert_allclose(softmath.soften(shifted_BC, temperature=temperature), expected, rtol=1e-9)

    @given(rows())
    def test_zero_mean_rows_have_a_mean_of_zero(self, logits_BC: Array) -> None:
        """And are the same distributions."""
        centred_BC = reference_losses.zero_mean(logits_BC)
        np.testing.assert_allclose(centred_BC.mean(axis=-1), 0.0, atol=1e-12)
        expected = softmath.soften(logits_BC, temperature=1.0)
        np.testing.assert_allclose(softmath.soften(centred_BC, temperature=1.0), expected, rtol=1e-9)


class TestRetemper:
    @given(rows(), temperatures, temperatures)
    def test_it_equals_softening_at_that_temperature(self, z: Array, captured: float, temperature: float) -> None:
        """What was tempered with one T and re-tempered to another is what the other alone gives."""
        kept_BC = reference_losses.shift_rows(z / captured)
        again_BC = softmath.retemper(kept_BC, captured=captured, temperature=temperature)
        expected = softmath.soften(z, temperature=temperature)
        np.testing.assert_allclose(softmath.soften(again_BC, temperature=1.0), expected, rtol=1e-8, atol=1e-12)

    @given(rows(), temperatures)
    def test_the_captured_temperature_changes_no_bit_of_a_stored_row(self, z: Array, captured: float) -> None:
        """A locked row can be asked for as it is."""
        kept_BC = reference_losses.shift_rows(z.astype(np.float32))
        np.testing.assert_array_equal(kept_BC, softmath.retemper(kept_BC, captured=captured, temperature=captured))

    def test_a_tiny_temperature_of_positive_logits_is_no_overflow(self) -> None:
        """Rows are shifted before they are scaled."""
        again_BC = softmath.retemper(np.array([[5.0, 9.0]], np.float32), captured=1.0, temperature=1e-300)
        np.testing.assert_array_equal([[0.0, 1.0]], softmath.soften(again_BC, temperature=1.0))


class TestMeanArithmetic:
    @given(ensembles(), temperatures)
    def test_it_is_the_mean_of_the_probabilities(self, made: tuple[Array, list[float]], temperature: float) -> None:
        """The weighted mean of eq. 1 over the members."""
        logits_MBC, weights = made
        p_MBC = np.stack([explicit_softmax(member, temperature) for member in logits_MBC])
        expected = np.average(p_MBC, axis=0, weights=weights)
        logp_BC = softmath.mean_arithmetic(logits_MBC, temperature=temperature, weights_M=weights)
        np.testing.assert_allclose(np.exp(logp_BC), expected, rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(np.exp(logp_BC).sum(axis=-1), 1.0, rtol=1e-12)

    @given(rows(), temperatures)
    def test_of_one_member_it_is_the_member(self, logits_BC: Array, temperature: float) -> None:
        """Whatever its weight."""
        mean_BC = softmath.mean_arithmetic(logits_BC[None], temperature=temperature, weights_M=[7.0])
        expected = softmath.log_soften(logits_BC, temperature=temperature)
        np.testing.assert_allclose(mean_BC, expected, rtol=1e-12, atol=1e-12)

    def test_it_stays_exact_where_probabilities_underflow(self) -> None:
        """log(1/2 (e^-5000 + e^-6000)) = -5000 - log 2."""
        logits_MBC = np.array([[[0.0, -5000.0]], [[0.0, -6000.0]]])
        logp_BC = softmath.mean_arithmetic(logits_MBC, temperature=1.0)
        np.testing.assert_allclose(logp_BC, [[0.0, -5000.0 - math.log(2)]], rtol=1e-15)

    def test_a_class_that_every_member_rules_out_stays_out(self) -> None:
        """-inf from all is -inf; -inf from one halves the other's."""
        logits_MBC = np.array([[[0.0, -np.inf, 0.0]], [[0.0, -np.inf, -np.inf]]])
        p_BC = np.exp(softmath.mean_arithmetic(logits_MBC, temperature=3.0))
        np.testing.assert_allclose(p_BC, [[0.75, 0.0, 0.25]], rtol=1e-15)

    def test_it_does_not_re_temper(self) -> None:
        """Why it is locked: the mean at T = 1 tempered to 4 is far from the mean at T = 4."""
        logits_MBC = np.array([[[8.0, 0.0, 0.0]], [[0.0, 8.0, 0.0]]])
        at_1 = softmath.mean_arithmetic(logits_MBC, temperature=1.0)
        tempered = softmath.soften(at_1, temperature=4.0)
        taken = np.exp(softmath.mean_arithmetic(logits_MBC, temperature=4.0))
        assert np.abs(tempered - taken).max() > 0.03


class TestMeanGeometric:
    @given(ensembles(), temperatures)
    def test_at_any_temperature_it_is_the_product_of_powers(
        self, made: tuple[Array, list[float]], temperature: float
    ) -> None:
        """softmax(mean logits / T) = the normalised product of p_m^w_m at T."""
        logits_MBC, weights = made
        share_M = np.array(weights) / np.sum(weights)
        logp_MBC = np.stack([softmath.log_soften(member, temperature=temperature) for member in logits_MBC])
        product = np.exp((logp_MBC * share_M[:, None, None]).sum(axis=0))
        expected = product / product.sum(axis=-1, keepdims=True)
        mean_BC = softmath.mean_geometric(logits_MBC, weights_M=weights)
        np.testing.assert_allclose(softmath.soften(mean_BC, temperature=temperature), expected, rtol=1e-8, atol=1e-15)

    def test_one_member_that_rules_a_class_out_rules_it_out(self) -> None:
        """A factor of 0 in a product."""
        logits_MBC = np.array([[[0.0, -np.inf, 1.0]], [[0.0, 5.0, 1.0]]])
        p_BC = softmath.soften(softmath.mean_geometric(logits_MBC), temperature=1.0)
        np.testing.assert_allclose(p_BC, softmath.soften(np.array([[0.0, -np.inf, 1.0]]), temperature=1.0))


class TestBothMeans:
    @given(ensembles(), temperatures, st.randoms(use_true_random=False))
    def test_the_order_of_the_members_does_not_matter(
        self, made: tuple[Array, list[float]], temperature: float, random: Any
    ) -> None:
        """Members and weights permuted together give the same mean."""
        logits_MBC, weights = made
        order = list(range(len(weights)))
        random.shuffle(order)
        turned = [weights[i] for i in order]
        for kind in ("arithmetic", "geometric"):
            first = mean_of(kind, logits_MBC, temperature, weights)
            second = mean_of(kind, logits_MBC[order], temperature, turned)
            np.testing.assert_allclose(second, first, rtol=1e-9, atol=1e-9)

    @given(ensembles(), temperatures, st.floats(1e-3, 1e3))
    def test_only_the_proportions_of_weights_matter(
        self, made: tuple[Array, list[float]], temperature: float, factor: float
    ) -> None:
        """All weights times a constant is the same mean."""
        logits_MBC, weights = made
        for kind in ("arithmetic", "geometric"):
            first = mean_of(kind, logits_MBC, temperature, weights)
            second = mean_of(kind, logits_MBC, temperature, [factor * weight for weight in weights])
            np.testing.assert_allclose(second, first, rtol=1e-9, atol=1e-9)

    def test_equal_weights_are_the_default(self) -> None:
        """None is one each."""
        logits_MBC = np.random.default_rng(0).normal(size=(3, 2, 5))
        for kind in ("arithmetic", "geometric"):
            expected = mean_of(kind, logits_MBC, 2.0, [1.0, 1.0, 1.0])
            np.testing.assert_array_equal(expected, mean_of(kind, logits_MBC, 2.0, None))

    @pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 2, 3, 4)])
    def test_unstacked_members_are_refused(self, shape: tuple[int, ...]) -> None:
        """[rows, classes] is easily taken for [members, rows, classes]."""
        for kind in ("arithmetic", "geometric"):
            with pytest.raises(ShapeMismatchError, match="members, rows, classes"):
                mean_of(kind, np.zeros(shape), 1.0, None)


def mean_of(kind: str, logits_MBC: Array, temperature: float, weights: list[float] | None) -> Array:
    """logits_BC or logp_BC of the mean by name."""
    if kind == "arithmetic":
        mean_BC = softmath.mean_arithmetic(logits_MBC, temperature=temperature, weights_M=weights)
    else:
        mean_BC = softmath.mean_geometric(logits_MBC, weights_M=weights)
    return np.asarray(mean_BC, dtype=np.float64)


class TestCheckWeights:
    @given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
    def test_they_come_back_as_shares(self, weights: list[float]) -> None:
        """Proportions kept, sum 1."""
        share_M = softmath.check_weights(weights, len(weights))
        assert abs(share_M.sum() - 1) < 1e-12
        np.testing.assert_allclose(share_M / share_M[0], np.array(weights) / weights[0], rtol=1e-9)

    def test_numpy_weights_pass_and_large_ones_do_not_overflow(self) -> None:
        """1e308 twice is a half each."""
        np.testing.assert_array_equal([0.5, 0.5], softmath.check_weights(np.array([1e308, 1e308]), 2))

    @pytest.mark.parametrize(
        "bad",
        [[1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf], [0.0, 0.0], [1e300, 1e-300], ["a", 1.0], [True, 1]],
        ids=repr,
    )
    def test_a_weight_that_is_none_is_refused(self, bad: list[Any]) -> None:
        """Zero too: leave the member out, it would cost its time for nothing."""
        with pytest.raises(RequestError, match="leave a member out") as caught:
            softmath.check_weights(bad, 2)
        json.dumps(to_problem(caught.value), allow_nan=False)

    def test_one_weight_a_member(self) -> None:
        """Both numbers are named."""
        with pytest.raises(ShapeMismatchError, match="3 weights and 2 members"):
            softmath.check_weights([1.0, 1.0, 1.0], 2)
        with pytest.raises(ShapeMismatchError, match="at least one member"):
            softmath.check_weights(None, 0)


class TestIsLocked:
    @pytest.mark.parametrize(
        ("mean", "members", "expected"),
        [
            ("none", 1, False),
            ("none", 5, False),
            ("geometric", 1, False),
            ("geometric", 10, False),
            ("arithmetic", 1, False),
            ("arithmetic", 2, True),
            ("arithmetic", 10, True),
        ],
    )
    def test_only_an_arithmetic_mean_of_several_is_locked(self, mean: Any, members: int, expected: bool) -> None:
        """One distribution and every geometric mean re-temper exactly."""
        assert expected is softmath.is_locked(mean, members)

    @pytest.mark.parametrize("bad", ["Arithmetic", "mean", "", None, 1])
    def test_an_unknown_mean_is_refused(self, bad: Any) -> None:
        """The names there are stand in the message."""
        with pytest.raises(RequestError, match="'none', 'arithmetic' or 'geometric'"):
            softmath.is_locked(bad, 2)


class TestDivergences:
    @given(row_pairs(), temperatures)
    def test_kl_is_cross_entropy_less_entropy(self, pair: tuple[Array, Array], temperature: float) -> None:
        """KL(p, q) = CE(p, q) - H(p), never negative."""
        logp_BC, logq_BC = (softmath.log_soften(z, temperature=temperature) for z in pair)
        kl_B = softmath.kl_divergence(logp_BC, logq_BC)
        expected = reference_losses.soft_cross_entropy(logp_BC, logq_BC) - reference_losses.entropy(logp_BC)
        np.testing.assert_allclose(kl_B, expected, rtol=1e-9, atol=1e-9)
        assert (kl_B >= 0).all()

    @given(rows(), temperatures)
    def test_kl_to_itself_is_zero(self, logits_BC: Array, temperature: float) -> None:
        """Exactly."""
        logp_BC = softmath.log_soften(logits_BC, temperature=temperature)
        np.testing.assert_array_equal(softmath.kl_divergence(logp_BC, logp_BC), 0.0)

    @given(rows())
    def test_entropy_lies_between_zero_and_log_classes(self, logits_BC: Array) -> None:
        """Nats."""
        entropy_B = reference_losses.entropy(softmath.log_soften(logits_BC, temperature=1.0))
        assert (entropy_B >= 0).all()
        assert (entropy_B <= math.log(logits_BC.shape[1]) + 1e-12).all()

    def test_small_divergences_of_float32_rows_are_seen(self) -> None:
        """A gap of 1e-6 a logit is a KL near 1e-12, which float32 rounding of 1e-7 would drown as a plain sum."""
        rng = np.random.default_rng(0)
        z = rng.normal(size=(64, 1000)) * 3
        near = z + rng.normal(size=z.shape) * 1e-6
        exact = softmath.kl_divergence(*(softmath.log_soften(a, temperature=1.0) for a in (z, near)))
        logp_32 = softmath.log_soften(z, temperature=1.0)
        off_by_a_constant = softmath.log_soften(near, temperature=1.0) + 1e-7
        measured = softmath.kl_divergence(logp_32, off_by_a_constant)
        assert 1e-13 < exact.mean() < 1e-12
        np.testing.assert_allclose(measured, exact, atol=1.5e-14)  # e²/2 of e = 1e-7 is 5e-15

    def test_zeros_follow_the_conventions(self) -> None:
        """0 log 0/q is 0, 0 log 0/0 is 0, and p log p/0 is infinite."""
        with np.errstate(divide="ignore"):
            logp_BC, logq_BC = np.log([[1.0, 0.0, 0.0]]), np.log([[0.5, 0.5, 0.0]])
        np.testing.assert_allclose(softmath.kl_divergence(logp_BC, logq_BC), [math.log(2)], rtol=1e-15)
        np.testing.assert_array_equal([np.inf], softmath.kl_divergence(logq_BC, logp_BC))
        np.testing.assert_allclose(reference_losses.soft_cross_entropy(logp_BC, logq_BC), [math.log(2)])
        np.testing.assert_array_equal([np.inf], reference_losses.soft_cross_entropy(logq_BC, logp_BC))
        np.testing.assert_array_equal([0.0], reference_losses.entropy(logp_BC))

    def test_nan_is_not_hidden(self) -> None:
        """A row without a distribution has no divergence either."""
        bad, good = np.array([[np.nan, 0.0]]), np.log([[0.5, 0.5]])
        assert np.isnan(softmath.kl_divergence(bad, good)).all()
        assert np.isnan(softmath.kl_divergence(good, bad)).all()
        assert np.isnan(reference_losses.soft_cross_entropy(bad, good)).all()

    def test_rows_of_other_shapes_are_refused(self) -> None:
        """Nothing is broadcast."""
        with pytest.raises(ShapeMismatchError, match=r"\[2, 3\] and \[1, 3\]"):
            softmath.kl_divergence(np.zeros((2, 3)), np.zeros((1, 3)))


class TestCheckLabels:
    def test_sound_labels_come_back_as_int64(self) -> None:
        """From -1 to the last class, whatever the integers' width."""
        labels = softmath.check_labels(np.array([-1, 0, 2], dtype=np.int8), rows=3, classes=3)
        assert labels.dtype == np.int64
        assert labels.tolist() == [-1, 0, 2]

    def test_labels_outside_the_classes_are_named(self) -> None:
        """Row and value of each, up to eight."""
        with pytest.raises(RequestError, match="10 in row 1, -2 in row 3") as caught:
            softmath.check_labels(np.array([0, 10, -1, -2]), rows=4, classes=10)
        assert caught.value.context["labels"] == [10, -2]
        with pytest.raises(RequestError, match="and 92 more"):
            softmath.check_labels(np.full(100, 99), rows=100, classes=10)

    def test_other_shapes_and_kinds_are_refused(self) -> None:
        """One integer a row."""
        with pytest.raises(ShapeMismatchError, match="4 rows"):
            softmath.check_labels(np.array([0, 1]), rows=4, classes=2)
        with pytest.raises(RequestError, match="float64"):
            softmath.check_labels(np.array([0.0, 1.0]), rows=2, classes=2)


class TestGradients:
    @given(row_pairs(8.0), st.floats(0.5, 20.0))
    def test_the_soft_gradient_is_the_slope_of_the_cross_entropy(
        self, pair: tuple[Array, Array], temperature: float
    ) -> None:
        """(q - p)/T against central differences of CE(p, q at T), each row by itself."""
        student, teacher = pair
        logp_BC = softmath.log_soften(teacher, temperature=temperature)

        def loss_B(z: Array) -> Array:
            return reference_losses.soft_cross_entropy(logp_BC, softmath.log_soften(z, temperature=temperature))

        expected = slopes(loss_B, student)
        gradient = reference_losses.soft_gradient(student, logp_BC, temperature=temperature)
        np.testing.assert_allclose(gradient, expected, atol=1e-7)

    @given(rows(8.0), st.data())
    def test_the_hard_gradient_is_the_slope_at_temperature_one(self, student: Array, data: st.DataObject) -> None:
        """q - y a labelled row, 0 an unlabelled one, against central differences."""
        count, classes = student.shape
        labels_B = data.draw(hnp.arrays(np.int64, count, elements=st.integers(-1, classes - 1)))

        def loss_B(z: Array) -> Array:
            return np.array(
                [reference_losses.hard_cross_entropy(z[i : i + 1], labels_B[i : i + 1]) for i in range(count)]
            )

        np.testing.assert_allclose(
            reference_losses.hard_gradient(student, labels_B), slopes(loss_B, student), atol=1e-7
        )

    def test_the_soft_gradient_tends_to_logit_matching(self) -> None:
        """(q - p)/T over (z - v)/(N T²) tends to 1: the error falls as 1/T."""
        rng = np.random.default_rng(3)
        student, teacher = rng.normal(size=(2, 5, 10)) * 3
        errors: list[float] = []
        for temperature in (10.0, 100.0, 1000.0, 10000.0):
            logp_BC = softmath.log_soften(teacher, temperature=temperature)
            gradient = reference_losses.soft_gradient(student, logp_BC, temperature=temperature)
            limit = reference_losses.logit_matching_gradient_limit(student, teacher, temperature=temperature)
            errors.append(float(np.abs(gradient - limit).max() / np.abs(limit).max()))
        assert errors[-1] < 1e-3
        assert all(8 < cooler / warmer < 12 for cooler, warmer in pairwise(errors))

    def test_the_limit_needs_no_zero_mean_from_the_caller(self) -> None:
        """A constant a row on either side changes nothing."""
        rng = np.random.default_rng(4)
        student, teacher = rng.normal(size=(2, 3, 4))
        first = reference_losses.logit_matching_gradient_limit(student, teacher, temperature=5.0)
        second = reference_losses.logit_matching_gradient_limit(student + 7.0, teacher - 2.0, temperature=5.0)
        np.testing.assert_allclose(second, first, atol=1e-15)


class TestDistillationObjective:
    def test_it_is_the_weighted_sum_with_t_squared_on_the_soft_term(self) -> None:
        """Calculated by hand, with one row of three unlabelled."""
        student = np.array([[1.0, 2.0], [0.0, 0.0], [3.0, -1.0]])
        teacher = np.array([[2.0, 1.0], [4.0, 0.0], [0.0, 0.0]])
        labels_B = np.array([1, -1, 0])
        p, q4, q1 = explicit_softmax(teacher, 4.0), explicit_softmax(student, 4.0), explicit_softmax(student, 1.0)
        soft = -(p * np.log(q4)).sum(axis=1).mean() * 16
        hard = -(math.log(q1[0, 1]) + math.log(q1[2, 0])) / 2
        given = reference_losses.distillation_objective(
            student, np.log(p), temperature=4.0, labels_B=labels_B, hard_weight=0.25, soft_weight=0.75
        )
        assert abs(given - (0.75 * soft + 0.25 * hard)) < 1e-12

    @pytest.mark.parametrize("labels_B", [None, np.array([-1, -1])])
    def test_without_labels_it_is_the_soft_term_alone(self, labels_B: NDArray[np.int64] | None) -> None:
        """Not NaN."""
        student, logp_BC = np.array([[1.0, 2.0], [0.0, 3.0]]), np.log([[0.5, 0.5], [0.9, 0.1]])
        soft = reference_losses.soft_cross_entropy(logp_BC, softmath.log_soften(student, temperature=2.0)).mean()
        assert 4 * soft == reference_losses.distillation_objective(student, logp_BC, temperature=2.0, labels_B=labels_B)


def slopes(loss_B: Any, z: Array, step: float = 1e-5) -> Array:
    """d loss_B / d z by central differences; row i of the loss depends on row i of z alone."""
    out = np.zeros_like(z)
    for column in range(z.shape[1]):
        nudge = np.zeros_like(z)
        nudge[:, column] = step
        out[:, column] = (loss_B(z + nudge) - loss_B(z - nudge)) / (2 * step)
    return out


class TestHasNan:
    @pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8"])
    def test_it_is_isnan(self, dtype: str) -> None:
        """Of both signs and every payload; infinities, zeros and whole numbers are none."""
        for bits in (b"\xff" * 8, np.array(np.nan, dtype).tobytes()):
            array = np.zeros((300, 1000), dtype=dtype)
            array[0, :3] = np.inf, -np.inf, -0.0
            assert not softmath.has_nan(array)
            array.reshape(-1)[-7:-6] = np.frombuffer(bits[: array.itemsize], dtype=dtype)
            assert softmath.has_nan(array)
            assert softmath.has_nan(array[::-1, ::2]) == bool(np.isnan(array[::-1, ::2]).any())
        assert not softmath.has_nan(np.full(3, -1, dtype=np.int64))
