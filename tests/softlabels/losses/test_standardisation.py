"""Logit standardisation: z-scores against NumPy, before plain and decoupled distillation, and edge cases."""

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
from softlabels.errors import NonFiniteLogitsError, RequestError, TemperatureLockedError
from softlabels.losses import (
    Deviation,
    SoftTargetBatch,
    decoupled_loss,
    distillation_loss,
    standardise_logits,
)
from tests.softlabels.losses import reference_losses

torch.set_num_threads(1)

Array = NDArray[np.float64]

temperatures = st.floats(0.5, 10.0)
deviations: Any = st.sampled_from(["population", "sample"])
DDOF = {"population": 0, "sample": 1}


@st.composite
def problems(draw: st.DrawFn) -> tuple[Array, Array]:
    """A student's logits and a teacher's, in steps of 1/8, constant rows among them."""
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 6)))
    student, teacher = (draw(hnp.arrays(np.int64, shape, elements=st.integers(-80, 80))) / 8 for _ in range(2))
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
    """Reproducible logits of spread 3."""
    return np.random.default_rng(seed).normal(size=shape) * 3


def gradient_of(loss: Tensor, z: Tensor) -> Array:
    """d loss / dz."""
    (gradient,) = torch.autograd.grad(loss, z)
    return gradient.numpy()


def z_scores(logits: Array, deviation: str) -> Array:
    """The paper's pre-process before the base temperature; zeros where a row is constant."""
    scores = np.zeros_like(logits)
    for row, out in zip(logits, scores, strict=True):
        if np.ptp(row) > 0:
            out[:] = (row - row.mean()) / row.std(ddof=DDOF[deviation])
    return scores


class TestZScores:
    @given(problems(), deviations)
    def test_they_equal_numpys(self, problem: tuple[Array, Array], deviation: Deviation) -> None:
        """Mean 0 and deviation 1 a row, zeros for a constant one."""
        scores = standardise_logits(torch.tensor(problem[0]), deviation=deviation)
        np.testing.assert_allclose(scores.numpy(), z_scores(problem[0], deviation), rtol=1e-11, atol=1e-12)

    def test_the_papers_deviation_is_the_default(self) -> None:
        """That of all C classes."""
        scores = standardise_logits(torch.tensor(normal(0, 4, 7)))
        np.testing.assert_allclose(scores.square().mean(dim=1).numpy(), 1.0, rtol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e4])
    def test_a_constant_row_is_zeros_without_gradient(self, dtype: torch.dtype, value: float) -> None:
        """Its deviation is 0 but for rounding, and rounding divided by itself would look like logits."""
        z = torch.full((2, 11), value, dtype=dtype, requires_grad=True)
        scores = standardise_logits(z)
        assert not scores.detach().numpy().any()
        assert not gradient_of((scores * torch.arange(11)).sum(), z).any()

    def test_an_unknown_deviation_names_the_nearest(self) -> None:
        """And what both mean."""
        with pytest.raises(RequestError, match=r"did you mean `sample`\?.*authors' code"):
            standardise_logits(torch.zeros(1, 2), deviation="samples")  # type: ignore[arg-type]


class TestInFrontOfPlainDistillation:
    @given(problems(), temperatures, deviations)
    def test_it_equals_the_papers_formula(
        self, problem: tuple[Array, Array], temperature: float, deviation: Deviation
    ) -> None:
        """T² CE of softmax(z-score/T), and the labels' term on the student's own logits."""
        student, teacher = problem
        labels = np.arange(len(student)) % student.shape[1]
        parts = distillation_loss(
            torch.tensor(student),
            batch(teacher, temperature, labels),
            hard_weight=0.1,
            soft_weight=9.0,
            standardise=deviation,
        )
        logp, logq = (softmath.log_soften(z_scores(x, deviation), temperature=temperature) for x in (teacher, student))
        soft = temperature**2 * reference_losses.soft_cross_entropy(logp, logq).mean()
        hard = reference_losses.hard_cross_entropy(student, labels)
        np.testing.assert_allclose(parts.soft.item(), soft, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(parts.total.item(), 9 * soft + 0.1 * hard, rtol=1e-9, atol=1e-9)
        kl = softmath.kl_divergence(logp, logq).mean()
        np.testing.assert_allclose(parts.kl.item(), kl, rtol=1e-6, atol=1e-9)

    def test_the_samples_deviation_is_a_larger_temperature(self) -> None:
        """By sqrt(C/(C - 1)): the gap between the paper's algorithm and its authors' code."""
        student, teacher, factor = torch.tensor(normal(0, 6, 5)), normal(1, 6, 5), np.sqrt(5 / 4)
        sample = distillation_loss(student, batch(teacher, 2.0), standardise="sample").soft
        population = distillation_loss(student, batch(teacher, 2.0 * factor), standardise="population").soft
        np.testing.assert_allclose(sample.item() * factor**2, population.item(), rtol=1e-12)

    @given(problems(), st.floats(0.25, 4.0), st.floats(-9, 9))
    def test_neither_scale_nor_shift_of_a_student_counts(
        self, problem: tuple[Array, Array], scale: float, shift: float
    ) -> None:
        """What the paper is after: relations without range."""
        student, teacher = problem
        first = distillation_loss(torch.tensor(student), batch(teacher, 2.0), standardise="population")
        other = distillation_loss(torch.tensor(scale * student + shift), batch(teacher, 2.0), standardise="population")
        np.testing.assert_allclose(other.soft.item(), first.soft.item(), rtol=1e-9)

    def test_a_student_at_any_scale_of_the_teacher_has_learnt(self) -> None:
        """No divergence and no gradient left, for plain and decoupled distillation."""
        teacher = normal(1, 6, 5)
        targets = batch(teacher, 2.0, [0, 1, 2, 3, 4, -1])
        for loss in (distillation_loss, decoupled_loss):
            z = torch.tensor(0.4 * teacher - 2, requires_grad=True)
            parts = loss(z, targets, standardise="population")
            assert parts.kl.item() < 1e-13
            assert np.abs(gradient_of(parts.soft, z)).max() < 1e-12

    def test_the_temperature_that_rows_were_captured_at_does_not_matter(self) -> None:
        """Z-scores undo it; the batch's temperature is the base temperature."""
        student, teacher = torch.tensor(normal(0, 3, 4)), normal(1, 3, 4)
        first = distillation_loss(student, batch(teacher, 3.0), standardise="population").total
        again = distillation_loss(student, batch(teacher / 8, 3.0, captured_temperature=8.0), standardise="population")
        np.testing.assert_allclose(again.total.item(), first.item(), rtol=1e-12)


@pytest.mark.parametrize("loss", [distillation_loss, decoupled_loss])
@pytest.mark.parametrize("deviation", ["population", "sample"])
class TestInFrontOfEither:
    def test_autograd_agrees_with_finite_differences(self, loss: Any, deviation: Deviation) -> None:
        """torch's gradcheck; a teacher's constant row and an unlabelled one among them."""
        teacher = normal(1, 4, 5)
        teacher[2] = 3.0
        targets = batch(teacher, 2.0, [2, -1, 0, 4])
        z = torch.tensor(normal(0, 4, 5), requires_grad=True)
        assert torch.autograd.gradcheck(lambda z: loss(z, targets, standardise=deviation).total, (z,))

    def test_it_is_the_loss_of_z_scores(self, loss: Any, deviation: Deviation) -> None:
        """A pre-process and nothing else."""
        student, teacher = normal(0, 4, 5), normal(1, 4, 5)
        labels = [2, -1, 0, 4]
        scored = loss(
            torch.tensor(z_scores(student, deviation)), batch(z_scores(teacher, deviation), 2.0, labels)
        ).soft.item()
        ours = loss(torch.tensor(student), batch(teacher, 2.0, labels), standardise=deviation).soft.item()
        np.testing.assert_allclose(ours, scored, rtol=1e-10)

    def test_locked_targets_are_refused(self, loss: Any, deviation: Deviation) -> None:
        """They hold no teacher's logits."""
        targets = batch(normal(1, 3, 4), 4.0, [0, 1, 2], captured_temperature=4.0, locked=True)
        with pytest.raises(TemperatureLockedError, match="no teacher's logits to standardise"):
            loss(torch.zeros(3, 4), targets, standardise=deviation)

    def test_rows_of_cut_classes_are_refused(self, loss: Any, deviation: Deviation) -> None:
        """-inf has no z-score."""
        with pytest.raises(NonFiniteLogitsError, match=r"rows \[1\].*without `standardise`"):
            loss(torch.zeros(2, 2), batch(np.array([[0.0, 1.0], [0.0, -np.inf]]), 1.0, [0, 1]), standardise=deviation)

    def test_a_student_without_an_opinion_gives_no_soft_gradient(self, loss: Any, deviation: Deviation) -> None:
        """A row of equal logits has no soft gradient; the labels give it one."""
        z = torch.zeros(2, 3, requires_grad=True)
        parts = loss(z, batch(normal(1, 2, 3), 2.0, [0, 2]), standardise=deviation)
        assert not gradient_of(parts.soft, z).any()
        assert gradient_of(loss(z, batch(normal(1, 2, 3), 2.0, [0, 2]), standardise=deviation).total, z).any()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_half_precision_student_is_raised_first(
        self, loss: Any, deviation: Deviation, dtype: torch.dtype
    ) -> None:
        """The loss of 1,000 classes is float32, its gradient comes back in the student's dtype."""
        z = torch.tensor(normal(0, 4, 1000), dtype=dtype, requires_grad=True)
        targets = batch(normal(1, 4, 1000).astype(np.float32), 2.0, [1, 2, -1, 999])
        parts = loss(z, targets, standardise=deviation)
        assert parts.total.dtype == torch.float32
        assert parts.total.item() == loss(z.detach().float(), targets, standardise=deviation).total.item()
        (gradient,) = torch.autograd.grad(parts.total, z)
        assert gradient.dtype == dtype
        assert bool(gradient.isfinite().all())
