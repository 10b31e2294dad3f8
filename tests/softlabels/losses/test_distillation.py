"""Distillation losses: values against the NumPy reference, gradients against the paper's closed forms."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor, nn

from softlabels import losses, softmath
from softlabels.errors import (
    EmptyBatchError,
    NonFiniteLogitsError,
    RequestError,
    ShapeMismatchError,
    TemperatureLockedError,
)
from softlabels.losses import (
    DistillationLoss,
    SoftTargetBatch,
    distillation_loss,
    hard_loss,
    logit_matching_loss,
    soft_loss,
)
from tests.softlabels.losses import reference_losses

torch.set_num_threads(1)

Array = NDArray[np.float64]

temperatures = st.floats(0.5, 40.0)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Array, Array, NDArray[np.int64]]:
    """A student's logits, a teacher's, and labels of which some are -1."""
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 6)))
    elements = st.floats(-20, 20)
    student, teacher = (
        draw(hnp.arrays(np.float64, shape, elements=elements)),
        draw(hnp.arrays(np.float64, shape, elements=elements)),
    )
    return student, teacher, draw(hnp.arrays(np.int64, shape[0], elements=st.integers(-1, shape[1] - 1)))


def batch(
    logits_BC: NDArray[Any],
    *,
    temperature: float = 1.0,
    captured: float = 1.0,
    locked: bool = False,
    labels: NDArray[Any] | list[int] | None = None,
) -> SoftTargetBatch:
    """Targets of a teacher's logits as they were captured."""
    return SoftTargetBatch(
        logits_BC=torch.tensor(logits_BC),
        temperature=temperature,
        captured_temperature=captured,
        locked=locked,
        labels_B=None if labels is None else torch.tensor(labels),
    )


def leaf(student: NDArray[Any]) -> Tensor:
    """A student's logits that collect gradients."""
    return torch.tensor(student, requires_grad=True)


def gradient_of(loss: Tensor, z: Tensor) -> Array:
    """d loss / dz."""
    (gradient,) = torch.autograd.grad(loss, z)
    return gradient.numpy()


def normal(seed: int, *shape: int) -> Array:
    """Reproducible logits of spread 3."""
    return np.random.default_rng(seed).normal(size=shape) * 3


class TestDistillationLoss:
    @given(problems(), temperatures, st.floats(0, 2), st.floats(0, 2))
    def test_it_equals_the_reference(
        self,
        problem: tuple[Array, Array, NDArray[np.int64]],
        temperature: float,
        hard_weight: float,
        soft_weight: float,
    ) -> None:
        """All parts, in float64."""
        student, teacher, labels = problem
        logp_BC = softmath.log_soften(teacher, temperature=temperature)
        targets = batch(teacher, temperature=temperature, labels=labels)
        parts = distillation_loss(torch.tensor(student), targets, hard_weight=hard_weight, soft_weight=soft_weight)
        logq_BC = softmath.log_soften(student, temperature=temperature)
        expected = reference_losses.distillation_objective(
            student, logp_BC, temperature=temperature, labels_B=labels, hard_weight=hard_weight, soft_weight=soft_weight
        )
        np.testing.assert_allclose(parts.total.item(), expected, rtol=1e-9, atol=1e-9)
        soft = temperature**2 * reference_losses.soft_cross_entropy(logp_BC, logq_BC).mean()
        np.testing.assert_allclose(parts.soft.item(), soft, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(
            parts.hard.item(), reference_losses.hard_cross_entropy(student, labels), rtol=1e-9, atol=1e-12
        )
        np.testing.assert_allclose(
            parts.kl.item(), softmath.kl_divergence(logp_BC, logq_BC).mean(), rtol=1e-7, atol=1e-9
        )

    @given(problems(), temperatures)
    def test_float32_equals_the_reference_to_float32(
        self, problem: tuple[Array, Array, NDArray[np.int64]], temperature: float
    ) -> None:
        """Within 1e-5 of the value and T² 1e-5."""
        student, teacher, labels = problem
        targets = batch(teacher.astype(np.float32), temperature=temperature, labels=labels)
        parts = distillation_loss(torch.tensor(student.astype(np.float32)), targets)
        logp_BC = softmath.log_soften(teacher, temperature=temperature)
        expected = reference_losses.distillation_objective(student, logp_BC, temperature=temperature, labels_B=labels)
        np.testing.assert_allclose(parts.total.item(), expected, rtol=1e-5, atol=1e-5 * temperature**2 + 1e-5)

    @given(problems(), temperatures)
    def test_the_soft_gradient_is_the_closed_form(
        self, problem: tuple[Array, Array, NDArray[np.int64]], temperature: float
    ) -> None:
        """T² (q - p)/T / B, by autograd."""
        student, teacher, _ = problem
        z = leaf(student)
        gradient = gradient_of(soft_loss(z, batch(teacher, temperature=temperature)), z)
        logp_BC = softmath.log_soften(teacher, temperature=temperature)
        expected = (
            reference_losses.soft_gradient(student, logp_BC, temperature=temperature) * temperature**2 / len(student)
        )
        np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-12 * temperature)

    @given(problems())
    def test_the_hard_gradient_is_the_closed_form(self, problem: tuple[Array, Array, NDArray[np.int64]]) -> None:
        """(q - y)/labelled at T = 1, by autograd; unlabelled rows get none."""
        student, teacher, labels = problem
        z = leaf(student)
        gradient = gradient_of(hard_loss(z, batch(teacher, temperature=9.0, labels=labels)), z)
        expected = reference_losses.hard_gradient(student, labels) / max(1, int((labels >= 0).sum()))
        np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-12)
        assert not gradient[labels == -1].any()

    @given(problems(), temperatures, st.floats(0, 2), st.floats(0, 2))
    def test_the_gradient_of_the_total_is_the_weighted_sum(
        self,
        problem: tuple[Array, Array, NDArray[np.int64]],
        temperature: float,
        hard_weight: float,
        soft_weight: float,
    ) -> None:
        """Soft and hard closed forms with their weights."""
        student, teacher, labels = problem
        z = leaf(student)
        targets = batch(teacher, temperature=temperature, labels=labels)
        parts = distillation_loss(z, targets, hard_weight=hard_weight, soft_weight=soft_weight)
        logp_BC = softmath.log_soften(teacher, temperature=temperature)
        soft = reference_losses.soft_gradient(student, logp_BC, temperature=temperature) * temperature**2 / len(student)
        hard = reference_losses.hard_gradient(student, labels) / max(1, int((labels >= 0).sum()))
        np.testing.assert_allclose(
            gradient_of(parts.total, z), soft_weight * soft + hard_weight * hard, rtol=1e-9, atol=1e-12 * temperature
        )

    def test_autograd_agrees_with_finite_differences(self) -> None:
        """torch's own gradcheck, labelled and unlabelled rows mixed."""
        targets = batch(normal(1, 4, 5), temperature=3.0, labels=[2, -1, 0, -1])
        assert torch.autograd.gradcheck(lambda z: distillation_loss(z, targets).total, (leaf(normal(0, 4, 5)),))

    def test_labelled_and_unlabelled_rows_mix_as_calculated_by_hand(self) -> None:
        """Soft over all three rows, hard over the two labelled ones."""
        student = np.array([[1.0, 2.0], [0.0, 0.5], [3.0, -1.0]])
        teacher = np.array([[2.0, 1.0], [4.0, 0.0], [0.0, 0.0]])
        p = np.exp(teacher / 4) / np.exp(teacher / 4).sum(axis=1, keepdims=True)
        q4 = np.exp(student / 4) / np.exp(student / 4).sum(axis=1, keepdims=True)
        q1 = np.exp(student) / np.exp(student).sum(axis=1, keepdims=True)
        soft = 16 * -(p * np.log(q4)).sum() / 3
        hard = -(np.log(q1[0, 1]) + np.log(q1[2, 0])) / 2
        targets = batch(teacher, temperature=4.0, labels=[1, -1, 0])
        parts = distillation_loss(torch.tensor(student), targets, hard_weight=0.5)
        np.testing.assert_allclose([parts.soft.item(), parts.hard.item()], [soft, hard], rtol=1e-12)
        np.testing.assert_allclose(parts.total.item(), soft + 0.5 * hard, rtol=1e-12)

    @pytest.mark.parametrize("labels", [None, [-1, -1, -1]])
    def test_a_batch_without_labels_has_the_soft_term_alone(self, labels: list[int] | None) -> None:
        """No NaN in value or gradient, whatever the hard weight."""
        targets, z = batch(normal(1, 3, 4), temperature=4.0, labels=labels), leaf(normal(0, 3, 4))
        parts, soft = distillation_loss(z, targets, hard_weight=100.0), soft_loss(z, targets)
        assert parts.hard.item() == 0.0
        assert parts.total.item() == soft.item()
        np.testing.assert_array_equal(gradient_of(parts.total, z), gradient_of(soft, z))

    def test_a_student_that_knows_the_targets_has_no_kl_and_no_soft_gradient(self) -> None:
        """While the cross-entropy stays at the targets' entropy."""
        teacher = normal(0, 3, 4)
        z = leaf(teacher + 5.0)
        parts = distillation_loss(z, batch(teacher, temperature=4.0))
        assert 0.0 <= parts.kl.item() < 1e-12
        assert np.abs(gradient_of(parts.total, z)).max() < 1e-12
        assert parts.soft.item() > 1.0

    def test_kl_carries_no_gradient(self) -> None:
        """It is for the log; `total` is what is minimised."""
        parts = distillation_loss(leaf(normal(0, 2, 3)), batch(normal(1, 2, 3), temperature=2.0))
        assert not parts.kl.requires_grad
        assert parts.total.requires_grad


class TestTemperature:
    def test_no_loss_takes_a_temperature(self) -> None:
        """T comes with the targets, so it cannot be another one and T² cannot be applied twice."""
        for loss in (distillation_loss, soft_loss, hard_loss, logit_matching_loss, DistillationLoss):
            names = set(inspect.signature(loss).parameters)
            assert not names & {"temperature", "T", "tau", "t"}

    def test_t_squared_keeps_the_balance_when_t_changes(self) -> None:
        """In the high-T regime the gradient of the soft term hardly changes; without T² it falls as 1/T²."""
        student, teacher = normal(0, 8, 10), normal(1, 8, 10)
        scaled, plain = [], []
        for temperature in (50.0, 100.0, 200.0, 400.0):
            z = leaf(student)
            size = float(np.linalg.norm(gradient_of(soft_loss(z, batch(teacher, temperature=temperature)), z)))
            scaled.append(size)
            plain.append(size / temperature**2)
        assert max(scaled) / min(scaled) < 1.05
        assert all(3.8 < cooler / warmer < 4.2 for cooler, warmer in pairwise(plain))

    def test_the_soft_gradient_tends_to_logit_matching(self) -> None:
        """With zero-mean logits to (z - v)/(N T²) before T²: the error falls as 1/T."""
        student, teacher = (np.asarray(reference_losses.zero_mean(normal(seed, 6, 10))) for seed in (0, 1))
        limit_N = (student - teacher) / 10
        errors: list[float] = []
        for temperature in (10.0, 100.0, 1000.0, 10000.0):
            z = leaf(student)
            by_autograd = gradient_of(soft_loss(z, batch(teacher, temperature=temperature)), z) * len(student)
            limit = reference_losses.logit_matching_gradient_limit(student, teacher, temperature=temperature)
            np.testing.assert_allclose(limit * temperature**2, limit_N, atol=1e-12)
            errors.append(float(np.abs(by_autograd / temperature**2 - limit).max() / np.abs(limit).max()))
        assert errors[-1] < 1e-3
        assert all(8 < cooler / warmer < 12 for cooler, warmer in pairwise(errors))

    @given(problems(), temperatures, temperatures)
    def test_rows_captured_at_another_temperature_are_the_same_targets(
        self, problem: tuple[Array, Array, NDArray[np.int64]], captured: float, temperature: float
    ) -> None:
        """Tempered with one T and used at another is as if used at the other from the start."""
        student, teacher, labels = (torch.tensor(part).numpy() for part in problem)
        direct = distillation_loss(torch.tensor(student), batch(teacher, temperature=temperature, labels=labels))
        kept_BC = reference_losses.shift_rows(teacher / captured)
        again = batch(kept_BC, captured=captured, temperature=temperature, labels=labels)
        np.testing.assert_allclose(
            [float(part) for part in distillation_loss(torch.tensor(student), again)],
            [float(part) for part in direct],
            rtol=1e-7,
            atol=1e-9,
        )

    def test_the_student_is_softened_with_the_targets_temperature_of_a_locked_batch(self) -> None:
        """A locked mean at T = 4 is used as it is: p at 4, q at 4, T² of 4."""
        logits_MBC, student = normal(0, 3, 5, 6), normal(1, 5, 6)
        logp_BC = softmath.mean_arithmetic(logits_MBC, temperature=4.0)
        targets = batch(reference_losses.shift_rows(logp_BC), temperature=4.0, captured=4.0, locked=True)
        expected = reference_losses.distillation_objective(student, logp_BC, temperature=4.0)
        np.testing.assert_allclose(float(distillation_loss(torch.tensor(student), targets).total), expected, rtol=1e-12)


class TestKnownMistakes:
    """What re-implementations get wrong, each measured against this one."""

    TEMPERATURE = 4.0

    def student_and_targets(self) -> tuple[Tensor, SoftTargetBatch]:
        """Six rows of ten classes."""
        return leaf(normal(0, 6, 10)), batch(normal(1, 6, 10), temperature=self.TEMPERATURE)

    def kl_of_torch(self, z: Tensor, targets: SoftTargetBatch, reduction: str) -> Tensor:
        """torch's KLDivLoss at the targets' temperature."""
        logq_BC = torch.log_softmax(z / self.TEMPERATURE, dim=1)
        return nn.KLDivLoss(reduction=reduction, log_target=True)(logq_BC, targets.log_p())  # type: ignore[no-any-return]

    def test_batchmean_times_t_squared_is_ours_but_for_the_entropy(self) -> None:
        """Same gradient; the value is less by T² H(p), a constant; our `kl` is theirs before T²."""
        z, targets = self.student_and_targets()
        theirs = self.kl_of_torch(z, targets, "batchmean") * self.TEMPERATURE**2
        parts = distillation_loss(z, targets)
        entropy = reference_losses.entropy(targets.log_p().numpy()).mean()
        np.testing.assert_allclose((parts.soft - theirs).item(), self.TEMPERATURE**2 * entropy, rtol=1e-12)
        np.testing.assert_allclose(gradient_of(parts.soft, z), gradient_of(theirs, z), rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(parts.kl.item() * self.TEMPERATURE**2, theirs.item(), rtol=1e-9)

    def test_reduction_mean_is_too_small_by_the_number_of_classes(self) -> None:
        """torch's default divides by rows times classes."""
        z, targets = self.student_and_targets()
        with pytest.warns(UserWarning, match="batchmean"):
            theirs = self.kl_of_torch(z, targets, "mean") * self.TEMPERATURE**2
        ours = gradient_of(soft_loss(z, targets), z)
        np.testing.assert_allclose(gradient_of(theirs, z) * 10, ours, rtol=1e-9, atol=1e-15)

    def test_leaving_t_squared_out_is_too_small_by_t_squared(self) -> None:
        """16 here."""
        z, targets = self.student_and_targets()
        ours = gradient_of(soft_loss(z, targets), z)
        theirs = gradient_of(self.kl_of_torch(z, targets, "batchmean"), z)
        np.testing.assert_allclose(theirs * self.TEMPERATURE**2, ours, rtol=1e-9, atol=1e-15)


class TestZerosAndPrecision:
    def test_a_class_of_probability_zero_adds_nothing(self) -> None:
        """-inf in the targets, and in the student where the targets rule the class out too."""
        teacher = np.array([[0.0, 1.0, -np.inf], [0.0, -np.inf, -np.inf]])
        student = np.array([[0.5, 0.0, 2.0], [1.0, 0.0, -np.inf]])
        z, targets = leaf(student), batch(teacher, temperature=2.0, labels=[0, -1])
        parts = distillation_loss(z, targets)
        logp_BC = softmath.log_soften(teacher, temperature=2.0)
        expected = reference_losses.distillation_objective(
            student, logp_BC, temperature=2.0, labels_B=np.array([0, -1]), hard_weight=0.5
        )
        np.testing.assert_allclose(parts.total.item(), expected, rtol=1e-12)
        gradient = gradient_of(parts.total, z)
        assert np.isfinite(gradient).all()
        np.testing.assert_allclose(
            gradient,
            4 * reference_losses.soft_gradient(student, logp_BC, temperature=2.0) / 2
            + 0.5 * reference_losses.hard_gradient(student, np.array([0, -1])),
            atol=1e-12,
        )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_half_precision_student_is_raised_first(self, dtype: torch.dtype) -> None:
        """The loss of 1,000 classes is float32, its gradient comes back in the student's dtype."""
        z = torch.tensor(normal(0, 4, 1000), dtype=dtype, requires_grad=True)
        targets = batch(normal(1, 4, 1000).astype(np.float32), temperature=20.0, labels=[1, 2, -1, 999])
        parts = distillation_loss(z, targets)
        wide = distillation_loss(z.detach().float(), targets)
        assert parts.total.dtype == torch.float32
        assert parts.total.item() == wide.total.item()
        (gradient,) = torch.autograd.grad(parts.total, z)
        assert gradient.dtype == dtype
        assert bool(gradient.isfinite().all())

    def test_half_precision_targets_are_raised_before_they_are_re_tempered(self) -> None:
        """float16 rows times a factor would lose digits."""
        stored = torch.tensor(normal(1, 4, 50), dtype=torch.float16)
        halves = SoftTargetBatch(logits_BC=stored, temperature=3.0, captured_temperature=1.0, locked=False)
        singles = SoftTargetBatch(logits_BC=stored.float(), temperature=3.0, captured_temperature=1.0, locked=False)
        assert torch.equal(singles.tempered(), halves.tempered())
        assert halves.log_p().dtype == torch.float32


class TestLogitMatching:
    @given(problems(), st.floats(0.5, 8.0))
    def test_it_is_half_the_mean_squared_difference(
        self, problem: tuple[Array, Array, NDArray[np.int64]], captured: float
    ) -> None:
        """Of zero-meaned logits; the teacher's are got back from rows captured at another T."""
        student, teacher, _ = problem
        z = leaf(student)
        loss = logit_matching_loss(z, batch(teacher / captured, captured=captured, temperature=20.0))
        gap = reference_losses.zero_mean(student) - reference_losses.zero_mean(teacher)
        np.testing.assert_allclose(loss.item(), 0.5 * (gap**2).mean(), rtol=1e-9, atol=1e-12)
        expected = gap / gap.size  # (z - v)/N a row, and the mean over rows
        np.testing.assert_allclose(gradient_of(loss, z), expected, rtol=1e-9, atol=1e-12)

    def test_it_is_the_limit_of_the_soft_term_at_high_temperature(self) -> None:
        """Gradients of both agree within 1e-3 at T = 10,000."""
        student, teacher = normal(0, 6, 10), normal(1, 6, 10)
        z = leaf(student)
        matching = gradient_of(logit_matching_loss(z, batch(teacher)), z)
        soft = gradient_of(soft_loss(z, batch(teacher, temperature=10000.0)), z)
        assert np.abs(soft - matching).max() < 1e-3 * np.abs(matching).max()

    def test_a_row_constant_changes_nothing(self) -> None:
        """On either side."""
        student, teacher = torch.tensor(normal(0, 3, 4)), normal(1, 3, 4)
        first = logit_matching_loss(student, batch(teacher))
        torch.testing.assert_close(logit_matching_loss(student + 9.0, batch(teacher - 4.0)), first)

    def test_locked_targets_are_refused(self) -> None:
        """They are no logits of any teacher."""
        targets = batch(normal(1, 3, 4), temperature=4.0, captured=4.0, locked=True)
        with pytest.raises(TemperatureLockedError, match="no teacher's logits"):
            logit_matching_loss(torch.zeros(3, 4), targets)

    def test_rows_without_a_mean_are_refused(self) -> None:
        """-inf has no distance to anything."""
        targets = batch(np.array([[0.0, 1.0], [0.0, -np.inf]]))
        with pytest.raises(NonFiniteLogitsError, match=r"rows \[1\]"):
            logit_matching_loss(torch.zeros(2, 2), targets)


class TestModule:
    def test_it_is_the_total_of_the_function(self) -> None:
        """With the weights it was made with; frameworks get one scalar."""
        z, targets = torch.tensor(normal(0, 3, 4)), batch(normal(1, 3, 4), temperature=2.0, labels=[0, 1, -1])
        module = DistillationLoss(hard_weight=0.1, soft_weight=0.9)
        assert torch.equal(distillation_loss(z, targets, hard_weight=0.1, soft_weight=0.9).total, module(z, targets))
        assert "hard_weight=0.1, soft_weight=0.9" in repr(module)
        assert not module.state_dict()

    @pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
    def test_bad_weights_are_refused_when_it_is_made(self, bad: float) -> None:
        """At construction, not at the first step."""
        with pytest.raises(RequestError, match="hard_weight"):
            DistillationLoss(hard_weight=bad)
        with pytest.raises(RequestError, match="soft_weight"):
            distillation_loss(torch.zeros(1, 2), batch(np.zeros((1, 2))), soft_weight=bad)


ALL_LOSSES = [lambda z, t: distillation_loss(z, t).total, soft_loss, hard_loss, logit_matching_loss, DistillationLoss()]


@pytest.mark.parametrize("loss", ALL_LOSSES, ids=["distillation", "soft", "hard", "matching", "module"])
class TestPairing:
    def test_another_number_of_classes_is_refused(self, loss: Any) -> None:
        """Both numbers are named."""
        with pytest.raises(ShapeMismatchError, match=r"\[4, 9\] and the targets have 10 classes"):
            loss(torch.zeros(4, 9), batch(np.zeros((4, 10))))

    def test_another_number_of_rows_is_refused(self, loss: Any) -> None:
        """Nothing is broadcast, not even one row."""
        with pytest.raises(ShapeMismatchError, match="1 rows and there are targets for 4"):
            loss(torch.zeros(1, 10), batch(np.zeros((4, 10))))

    def test_a_student_of_another_rank_is_refused(self, loss: Any) -> None:
        """[rows, 1, classes] is not [rows, classes]."""
        with pytest.raises(ShapeMismatchError, match=r"\[4, 1, 10\]"):
            loss(torch.zeros(4, 1, 10), batch(np.zeros((4, 10))))

    def test_an_empty_batch_is_refused(self, loss: Any) -> None:
        """A mean over nothing would be NaN."""
        with pytest.raises(EmptyBatchError, match="no rows"):
            loss(torch.zeros(0, 10), batch(np.zeros((0, 10))))

    def test_targets_on_another_device_are_refused(self, loss: Any) -> None:
        """The message says how to move them."""
        with pytest.raises(RequestError, match=r"targets.to\(device\)"):
            loss(torch.zeros(4, 10), batch(np.zeros((4, 10))).to("meta"))


class TestModuleSurface:
    def test_every_public_loss_reads_the_targets_alone(self) -> None:
        """Each has the form (student_logits_BC, targets, *, weights): what a further loss has to look like."""
        for loss in (distillation_loss, soft_loss, hard_loss, logit_matching_loss):
            names = list(inspect.signature(loss).parameters.values())
            assert [name.name for name in names[:2]] == ["student_logits_BC", "targets"]
            assert all(name.kind is inspect.Parameter.KEYWORD_ONLY for name in names[2:])
            assert loss.__module__.startswith(losses.__name__ + ".")
