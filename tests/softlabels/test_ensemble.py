"""Ensemble means in torch against the NumPy reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from softlabels import softmath
from softlabels.ensemble import Combined, combine
from softlabels.errors import RequestError, ShapeMismatchError, TeacherError, TeacherShapeError, TemperatureError
from tests.softlabels.losses import reference_losses

torch.set_num_threads(1)

Array = NDArray[np.float32]

temperatures = st.floats(0.25, 50.0)


@st.composite
def ensembles(draw: st.DrawFn) -> tuple[Array, list[float]]:
    """float32 logits_MBC of 1 to 4 members and a weight for each."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 8)))
    logits_MBC = draw(hnp.arrays(np.float32, shape, elements=st.floats(-50, 50, width=32)))
    weights = draw(st.lists(st.floats(0.01, 50.0), min_size=shape[0], max_size=shape[0]))
    return logits_MBC, weights


def members_of(logits_MBC: NDArray[Any]) -> list[Tensor]:
    """One tensor a member."""
    return [torch.tensor(member) for member in logits_MBC]


def reference(mean: str, logits_MBC: Array, temperature: float, weights: list[float] | None) -> NDArray[np.float64]:
    """What the store keeps, by the numpy reference in float64."""
    wide_MBC = logits_MBC.astype(np.float64)
    if softmath.is_locked(softmath.check_mean(mean), len(wide_MBC)):
        mixed_BC = softmath.mean_arithmetic(wide_MBC, temperature=temperature, weights_M=weights)
    else:
        mixed_BC = softmath.mean_geometric(wide_MBC, weights_M=weights)
    return np.asarray(reference_losses.shift_rows(mixed_BC), dtype=np.float64)


class TestCombine:
    @given(ensembles(), temperatures, st.sampled_from(["arithmetic", "geometric"]))
    def test_it_agrees_with_the_reference(
        self, made: tuple[Array, list[float]], temperature: float, mean: softmath.Mean
    ) -> None:
        """Within 1e-6 (1 + max |z/T|) in logits, and 1e-6 in probabilities at the captured temperature times that."""
        logits_MBC, weights = made
        combined = combine(members_of(logits_MBC), mean=mean, temperature=temperature, weights=weights)
        expected = reference(mean, logits_MBC, temperature, weights)
        spread = np.abs(logits_MBC).max() / combined.captured_temperature
        given_BC = combined.logits_BC.numpy()
        np.testing.assert_allclose(given_BC, expected, rtol=0, atol=1e-6 * (1 + 2 * spread))
        np.testing.assert_allclose(
            softmath.soften(given_BC, temperature=1.0),
            softmath.soften(expected, temperature=1.0),
            rtol=0,
            atol=1e-6 * (1 + 2 * spread),
        )

    @given(ensembles(), temperatures, st.sampled_from(["arithmetic", "geometric"]))
    def test_rows_come_shifted_as_float32(
        self, made: tuple[Array, list[float]], temperature: float, mean: softmath.Mean
    ) -> None:
        """Each row's largest entry is 0."""
        combined = combine(members_of(made[0]), mean=mean, temperature=temperature, weights=made[1])
        assert combined.logits_BC.dtype == torch.float32
        assert (combined.logits_BC.amax(dim=1) == 0).all()

    @given(ensembles(), temperatures, st.sampled_from(["arithmetic", "geometric"]), st.randoms(use_true_random=False))
    def test_the_order_of_the_members_does_not_matter(
        self, made: tuple[Array, list[float]], temperature: float, mean: softmath.Mean, random: Any
    ) -> None:
        """But for rounding."""
        logits_MBC, weights = made
        order = list(range(len(weights)))
        random.shuffle(order)
        first = combine(members_of(logits_MBC), mean=mean, temperature=temperature, weights=weights)
        turned = [weights[i] for i in order]
        second = combine(members_of(logits_MBC[order]), mean=mean, temperature=temperature, weights=turned)
        tolerance = 1e-6 * (1 + 2 * float(np.abs(logits_MBC).max()) / first.captured_temperature)
        torch.testing.assert_close(second.logits_BC, first.logits_BC, rtol=0, atol=tolerance)

    @pytest.mark.parametrize("mean", ["none", "arithmetic", "geometric"])
    def test_one_member_stays_itself_and_open(self, mean: softmath.Mean) -> None:
        """Its own logits at T = 1, whatever the mean and the job's temperature."""
        z = torch.tensor([[1.0, 4.0, 2.0]])
        combined = combine([z], mean=mean, temperature=7.0, weights=[3.0])
        assert torch.equal(torch.tensor([[-3.0, 0.0, -2.0]]), combined.logits_BC)
        assert (combined.captured_temperature, combined.locked) == (1.0, False)

    def test_the_geometric_mean_stays_open(self) -> None:
        """Captured at 1: it re-tempers to every temperature."""
        combined = combine(members_of(np.zeros((3, 2, 4))), mean="geometric", temperature=7.0)
        assert (combined.captured_temperature, combined.locked) == (1.0, False)

    def test_the_arithmetic_mean_of_several_is_locked_to_its_temperature(self) -> None:
        """softmax of the rows is the mean at the job's temperature."""
        logits_MBC = np.array([[[8.0, 0.0]], [[0.0, 0.0]]], dtype=np.float32)
        combined = combine(members_of(logits_MBC), mean="arithmetic", temperature=4.0, weights=[3.0, 1.0])
        assert (combined.captured_temperature, combined.locked) == (4.0, True)
        first = 0.75 / (1 + np.exp(-2)) + 0.25 * 0.5
        np.testing.assert_allclose(torch.softmax(combined.logits_BC, dim=1), [[first, 1 - first]], rtol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
    def test_members_of_any_float_are_averaged_in_float32(self, dtype: torch.dtype, mean: softmath.Mean) -> None:
        """A half-precision teacher's values are exact in float32; the mean is not rounded to its precision."""
        rng = np.random.default_rng(1)
        members = [torch.tensor(member, dtype=dtype) for member in rng.normal(size=(3, 5, 11)) * 4]
        combined = combine(members, mean=mean, temperature=2.0)
        exact_MBC = np.stack([member.to(torch.float64).numpy() for member in members])
        assert combined.logits_BC.dtype == torch.float32
        expected = reference_losses.shift_rows(
            softmath.mean_arithmetic(exact_MBC, temperature=2.0)
            if mean == "arithmetic"
            else softmath.mean_geometric(exact_MBC)
        )
        np.testing.assert_allclose(combined.logits_BC.numpy(), expected, rtol=0, atol=1e-5)

    def test_members_of_different_floats_mix(self) -> None:
        """One teacher may run in half precision and another not."""
        halves, doubles = torch.zeros(2, 3, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.float64)
        combined = combine([halves, doubles], mean="geometric", temperature=1.0)
        assert torch.equal(torch.zeros(2, 3), combined.logits_BC)

    def test_a_large_row_constant_costs_no_digits(self) -> None:
        """Shifted before averaging, and float64 before rounding."""
        z = torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64)
        combined = combine([z + 1e9, z - 1e9], mean="geometric", temperature=1.0)
        torch.testing.assert_close(combined.logits_BC, torch.tensor([[-3.0, -2.0, 0.0]]))

    @pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
    def test_a_class_ruled_out_is_no_nan(self, mean: softmath.Mean) -> None:
        """-inf from all members, and from one."""
        logits_MBC = np.array([[[0.0, -np.inf, 1.0]], [[0.0, -np.inf, -np.inf]]], dtype=np.float32)
        combined = combine(members_of(logits_MBC), mean=mean, temperature=2.0)
        expected = reference(mean, logits_MBC, 2.0, None)
        np.testing.assert_allclose(combined.logits_BC.numpy(), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
    def test_a_nan_of_one_member_is_seen_in_the_result(self, mean: softmath.Mean) -> None:
        """In its row and in no other."""
        members = members_of(np.zeros((2, 2, 3), dtype=np.float32))
        members[1][0, 1] = torch.nan
        nan_B = combine(members, mean=mean, temperature=2.0).logits_BC.isnan().any(dim=1)
        assert nan_B.tolist() == [True, False]

    def test_neither_the_members_nor_their_graph_are_touched(self) -> None:
        """Members are read only, and no gradient is kept."""
        members = [torch.ones(2, 3, requires_grad=True), torch.full((2, 3), 2.0, requires_grad=True)]
        combined = combine(members, mean="geometric", temperature=1.0)
        assert not combined.logits_BC.requires_grad
        assert all(bool((member == value).all()) for member, value in zip(members, (1.0, 2.0), strict=True))

    def test_an_empty_batch_is_an_empty_batch(self) -> None:
        """The last shard of a set may be empty on one device."""
        combined = combine([torch.zeros(0, 3), torch.zeros(0, 3)], mean="arithmetic", temperature=2.0)
        assert combined.logits_BC.shape == (0, 3)


class TestRefusals:
    def test_members_that_disagree_are_named_with_their_shapes(self) -> None:
        """By number, and by name where there is one."""
        members = [torch.zeros(4, 10), torch.zeros(4, 9)]
        with pytest.raises(TeacherShapeError, match=r"member 0: \[4, 10\], member 1: \[4, 9\]") as caught:
            combine(members, mean="geometric", temperature=1.0)
        assert caught.value.context["shapes"] == [[4, 10], [4, 9]]
        with pytest.raises(TeacherShapeError, match=r"member 1 \(small\): \[4, 9\]"):
            combine(members, mean="geometric", temperature=1.0, names=["large", "small"])

    @pytest.mark.parametrize("shape", [(10,), (4, 10, 1), (), (4, 0)])
    def test_anything_but_rows_by_classes_is_refused(self, shape: tuple[int, ...]) -> None:
        """Even where all members agree on it."""
        with pytest.raises(TeacherShapeError, match=r"\[rows, classes\]"):
            combine([torch.zeros(shape), torch.zeros(shape)], mean="geometric", temperature=1.0)

    def test_class_numbers_are_no_logits(self) -> None:
        """An argmax was taken too early."""
        with pytest.raises(TeacherError, match=r"member 0 returns torch.int64"):
            combine([torch.zeros(4, 10, dtype=torch.int64)], mean="none", temperature=1.0)

    def test_no_members_are_refused(self) -> None:
        """There is nothing to average."""
        with pytest.raises(TeacherShapeError, match="no member"):
            combine([], mean="geometric", temperature=1.0)

    def test_several_members_need_a_mean(self) -> None:
        """The choices are named."""
        with pytest.raises(RequestError, match="'geometric', which gives targets at every temperature"):
            combine([torch.zeros(1, 2)] * 2, mean="none", temperature=1.0)

    def test_an_unknown_mean_is_refused(self) -> None:
        """By name."""
        name: Any = "harmonic"
        with pytest.raises(RequestError, match="harmonic"):
            combine([torch.zeros(1, 2)], mean=name, temperature=1.0)

    @pytest.mark.parametrize("bad", [0.0, float("nan"), "4"])
    def test_a_bad_temperature_is_refused_even_where_it_would_not_be_used(self, bad: Any) -> None:
        """A geometric mean does not depend on it, a job file with T = 0 is still wrong."""
        with pytest.raises(TemperatureError):
            combine([torch.zeros(1, 2)], mean="geometric", temperature=bad)

    def test_bad_weights_are_refused(self) -> None:
        """One a member, each above 0."""
        members = [torch.zeros(1, 2), torch.zeros(1, 2)]
        with pytest.raises(ShapeMismatchError, match="1 weights and 2 members"):
            combine(members, mean="geometric", temperature=1.0, weights=[1.0])
        with pytest.raises(RequestError, match="above 0"):
            combine(members, mean="arithmetic", temperature=1.0, weights=[1.0, 0.0])


class TestCombined:
    def test_it_cannot_be_changed(self) -> None:
        """A locked result stays locked."""
        combined = Combined(logits_BC=torch.zeros(1, 2), captured_temperature=4.0, locked=True)
        with pytest.raises(AttributeError):
            combined.locked = False  # type: ignore[misc]  # the test is that this fails
