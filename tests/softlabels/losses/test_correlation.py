"""The correlation loss: the paper's formulas in NumPy, invariances, and rows without a correlation."""

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
from softlabels.errors import RequestError
from softlabels.losses import SoftTargetBatch, relation_loss
from tests.softlabels.losses import reference_losses

torch.set_num_threads(1)

Array = NDArray[np.floating[Any]]

temperatures = st.floats(1.0, 20.0)
weights = st.floats(0, 4)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Array, Array]:
    """A student's logits and a teacher's, in steps of 1/8: what varies does so by more than rounding."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    student, teacher = (draw(hnp.arrays(np.int64, shape, elements=st.integers(-40, 40))) / 8 for _ in range(2))
    return student, teacher


def batch(teacher: NDArray[Any], temperature: float = 1.0, labels: Any = None, **changes: Any) -> SoftTargetBatch:
    """Targets of a teacher's logits."""
    given_ = {"captured_temperature": 1.0, "locked": False} | changes
    return SoftTargetBatch(
        logits_BC=torch.tensor(teacher),
        temperature=temperature,
        labels_B=None if labels is None else torch.tensor(labels),
        **given_,
    )


def normal(seed: int, *shape: int) -> Array:
    """Reproducible logits of spread 2."""
    return np.random.default_rng(seed).normal(size=shape) * 2


def gradient_of(loss: Tensor, z: Tensor) -> Array:
    """d loss / dz."""
    (gradient,) = torch.autograd.grad(loss, z)
    return gradient.numpy()


def distance(u: Array, v: Array) -> float:
    """1 - Pearson's correlation of the paper; 0 where u, the teacher's, does not vary, 1 where v alone does not."""
    if np.ptp(u) == 0:
        return 0.0
    if np.ptp(v) == 0:
        return 1.0
    du, dv = u - u.mean(), v - v.mean()
    return 1 - float((du * dv).sum() / np.sqrt((du**2).sum() * (dv**2).sum()))


def reference(student: Array, teacher: Array, temperature: float, *, beta: float, gamma: float) -> float:
    """T² (beta inter + gamma intra), means over rows and over classes."""
    p, q = (softmath.soften(logits, temperature=temperature) for logits in (teacher, student))
    inter = float(np.mean([distance(u, v) for u, v in zip(p, q, strict=True)]))
    intra = float(np.mean([distance(u, v) for u, v in zip(p.T, q.T, strict=True)]))
    return temperature**2 * (beta * inter + gamma * intra)


class TestFormula:
    @given(problems(), temperatures, weights, weights, st.integers(-1, 0))
    def test_it_equals_the_papers_formula(
        self, problem: tuple[Array, Array], temperature: float, beta: float, gamma: float, label: int
    ) -> None:
        """All parts, in float64."""
        student, teacher = problem
        labels = np.full(len(student), label)
        parts = relation_loss(
            torch.tensor(student),
            batch(teacher, temperature, labels),
            beta=beta,
            gamma=gamma,
            hard_weight=0.3,
            soft_weight=1.7,
        )
        soft = reference(student, teacher, temperature, beta=beta, gamma=gamma)
        hard = reference_losses.hard_cross_entropy(student, labels)
        tolerance = 1e-8 * temperature**2
        np.testing.assert_allclose(parts.soft.item(), soft, rtol=1e-8, atol=tolerance)
        np.testing.assert_allclose(parts.total.item(), 1.7 * soft + 0.3 * hard, rtol=1e-8, atol=2 * tolerance)
        kl = softmath.kl_divergence(*(softmath.log_soften(x, temperature=temperature) for x in (teacher, student)))
        np.testing.assert_allclose(parts.kl.item(), kl.mean(), rtol=1e-7, atol=1e-9)

    def test_by_hand(self) -> None:
        """p = (.5, .3, .2) and q = (.2, .5, .3): deviations (.5, -.1, -.4)/3 and (-.4, .5, -.1)/3, correlation -1/2."""
        parts = relation_loss(torch.log(torch.tensor([[0.2, 0.5, 0.3]])), batch(np.log([[0.5, 0.3, 0.2]])), beta=2.0)
        np.testing.assert_allclose(parts.soft.item(), 2 * 1.5, rtol=1e-6)

    def test_autograd_agrees_with_finite_differences(self) -> None:
        """torch's gradcheck; a class truncated in every row, a row without relations, unlabelled rows among them."""
        teacher = normal(1, 5, 4)
        teacher[:, 2], teacher[3] = -np.inf, 0.0
        targets = batch(teacher, 3.0, [0, -1, 3, 1, -1])
        z = torch.tensor(normal(0, 5, 4), requires_grad=True)
        assert torch.autograd.gradcheck(lambda z: relation_loss(z, targets, beta=0.7, gamma=1.3).total, (z,))

    @given(problems(), temperatures)
    def test_a_row_constant_changes_nothing(self, problem: tuple[Array, Array], temperature: float) -> None:
        """On either side."""
        student, teacher = problem
        first = relation_loss(torch.tensor(student), batch(teacher, temperature))
        moved = relation_loss(torch.tensor(student + 7), batch(teacher - 3, temperature))
        np.testing.assert_allclose(moved.soft.item(), first.soft.item(), rtol=1e-7, atol=1e-8 * temperature**2)

    @given(problems(), temperatures)
    def test_the_soft_part_is_least_at_the_targets(self, problem: tuple[Array, Array], temperature: float) -> None:
        """0 there; between 0 and 2 (beta + gamma) T² anywhere."""
        student, teacher = problem
        targets = batch(teacher, temperature)
        assert abs(relation_loss(torch.tensor(teacher), targets).soft.item()) < 1e-11 * temperature**2
        other = relation_loss(torch.tensor(student), targets, beta=1.0, gamma=1.0).soft.item()
        assert -1e-11 * temperature**2 <= other <= (4 + 1e-9) * temperature**2

    def test_at_the_targets_there_is_no_gradient(self) -> None:
        """A minimum."""
        z = torch.tensor(normal(0, 6, 5), requires_grad=True)
        parts = relation_loss(z, batch(normal(0, 6, 5), 2.0))
        assert np.abs(gradient_of(parts.soft, z)).max() < 1e-14

    def test_a_student_of_another_scale_in_probabilities_has_learnt_the_classes_relations(self) -> None:
        """q = 1/C + (p - 1/C)/3 correlates perfectly with p in every row; plain distillation would still pull."""
        p = softmath.soften(normal(0, 6, 5), temperature=1.0)
        student = np.log(0.2 + (p - 0.2) / 3)
        parts = relation_loss(torch.tensor(student), batch(np.log(p)))
        assert abs(parts.soft.item()) < 1e-12
        assert parts.kl.item() > 0.05


class TestEnds:
    def test_a_batch_of_one_row_has_no_relations_between_rows(self) -> None:
        """The intra-class term is 0 without gradient, not NaN; the row's own relations are learnt."""
        z = torch.tensor(normal(0, 1, 5), requires_grad=True)
        targets = batch(normal(1, 1, 5), 2.0)
        both, inter = relation_loss(z, targets), relation_loss(z, targets, gamma=0.0)
        assert both.soft.item() == inter.soft.item()
        np.testing.assert_array_equal(gradient_of(both.soft, z), gradient_of(inter.soft, z))
        assert relation_loss(z, targets, beta=0.0).soft.item() == 0

    def test_one_class_leaves_nothing_to_learn(self) -> None:
        """0 with a gradient of 0."""
        z = torch.tensor(normal(0, 3, 1), requires_grad=True)
        parts = relation_loss(z, batch(normal(1, 3, 1)))
        assert parts.total.item() == 0
        assert not gradient_of(parts.total, z).any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_student_without_an_opinion_counts_as_uncorrelated(self, dtype: torch.dtype) -> None:
        """As one whose last layer starts at 0: 1 a row and class, and no gradient where any would be rounding."""
        z = torch.zeros(6, 7, dtype=dtype, requires_grad=True)
        targets = batch(normal(1, 6, 7), 3.0, [0, 1, 2, 3, 4, 5])
        parts = relation_loss(z, targets, beta=1.0, gamma=1.0)
        assert parts.soft.item() == pytest.approx(9 * 2)
        assert not gradient_of(parts.soft, z).any()
        assert gradient_of(relation_loss(z, targets).total, z).any()  # the labels get it going

    def test_classes_cut_from_every_row_add_nothing(self) -> None:
        """But count: the mean is over all C classes, so that cutting does not change the others' weight."""
        teacher, student = normal(1, 5, 6), normal(0, 5, 6)
        teacher[:, 4:] = -np.inf
        z = torch.tensor(student, requires_grad=True)
        parts = relation_loss(z, batch(teacher, 2.0))
        np.testing.assert_allclose(parts.soft.item(), reference(student, teacher, 2.0, beta=2.0, gamma=2.0), rtol=1e-12)
        assert np.isfinite(gradient_of(parts.total, z)).all()

    def test_rare_classes_are_correlated_in_float32_as_in_float64(self) -> None:
        """Probabilities of 1e-25, the squares of whose differences are 0 in float32."""
        student, teacher = normal(0, 6, 4), normal(1, 6, 4)
        student[:, 3] -= 58
        teacher[:, 3] -= 58
        wide = relation_loss(torch.tensor(student), batch(teacher)).soft.item()
        narrow = relation_loss(torch.tensor(student.astype(np.float32)), batch(teacher.astype(np.float32)))
        np.testing.assert_allclose(narrow.soft.item(), wide, rtol=1e-4)

    def test_locked_targets_are_as_good_as_any(self) -> None:
        """Probabilities at one temperature are all that is compared."""
        logits_MBC, student = normal(0, 3, 5, 6), normal(1, 5, 6)
        logp_BC = softmath.mean_arithmetic(logits_MBC, temperature=4.0)
        targets = batch(logp_BC, 4.0, captured_temperature=4.0, locked=True)
        expected = reference(student, 4.0 * np.asarray(logp_BC), 4.0, beta=2.0, gamma=2.0)
        np.testing.assert_allclose(relation_loss(torch.tensor(student), targets).soft.item(), expected, rtol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_half_precision_student_is_raised_first(self, dtype: torch.dtype) -> None:
        """The loss of 1,000 classes is float32, its gradient comes back in the student's dtype."""
        z = torch.tensor(normal(0, 4, 1000), dtype=dtype, requires_grad=True)
        targets = batch(normal(1, 4, 1000).astype(np.float32), 4.0, [1, 2, -1, 999])
        parts = relation_loss(z, targets)
        assert parts.total.dtype == torch.float32
        assert parts.total.item() == relation_loss(z.detach().float(), targets).total.item()
        (gradient,) = torch.autograd.grad(parts.total, z)
        assert gradient.dtype == dtype
        assert bool(gradient.isfinite().all())

    @pytest.mark.parametrize("name", ["beta", "gamma", "hard_weight", "soft_weight"])
    def test_bad_weights_are_refused(self, name: str) -> None:
        """By their names."""
        with pytest.raises(RequestError, match=name):
            relation_loss(torch.zeros(2, 2), batch(np.zeros((2, 2))), **{name: -1.0})
