"""Decoupled distillation: the paper's formulas in NumPy, its identity with plain distillation, and edge cases."""

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
from softlabels.encodings import TAIL_RULES, make_encoding
from softlabels.errors import RequestError
from softlabels.losses import SoftTargetBatch, decoupled_loss, distillation_loss
from softlabels.targets import SoftTargets
from tests.softlabels.losses import reference_losses

torch.set_num_threads(1)

Array = NDArray[np.floating[Any]]
Labels = NDArray[np.int64]

temperatures = st.floats(0.5, 40.0)
weights = st.floats(0, 10)


@st.composite
def problems(draw: st.DrawFn, *, unlabelled: bool = True) -> tuple[Array, Array, Labels]:
    """A student's logits, a teacher's, and labels."""
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 6)))
    student, teacher = (draw(hnp.arrays(np.float64, shape, elements=st.floats(-12, 12))) for _ in range(2))
    return (
        student,
        teacher,
        draw(hnp.arrays(np.int64, shape[0], elements=st.integers(-1 if unlabelled else 0, shape[1] - 1))),
    )


def batch(teacher: NDArray[Any], labels: Any, temperature: float = 1.0, **changes: Any) -> SoftTargetBatch:
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


def divergence(p: Array, q: Array) -> float:
    """sum p log(p/q) of one pair of distributions, terms of p = 0 left out."""
    kept = p > 0
    return float((p[kept] * np.log(p[kept] / q[kept])).sum())


def tckd_and_nckd(student: Array, teacher: Array, label: int, temperature: float) -> tuple[float, float]:
    """Both terms of one labelled row, written from the paper: b is the pair, the rest are made to sum to 1."""
    p, q = (softmath.soften(row, temperature=temperature) for row in (teacher, student))
    others = np.arange(len(p)) != label
    pair_p, pair_q = (np.array([row[label], row[others].sum()]) for row in (p, q))
    if not others.any() or pair_p[1] == 0:
        return divergence(pair_p, pair_q), 0.0
    return divergence(pair_p, pair_q), divergence(p[others] / pair_p[1], q[others] / pair_q[1])


def reference(
    student: Array, teacher: Array, labels: Labels, temperature: float, *, alpha: float, beta: float
) -> float:
    """T² times the mean over rows of alpha TCKD + beta NCKD, of alpha KL where there is no label."""
    values = []
    for z, v, label in zip(student, teacher, labels, strict=True):
        if label >= 0:
            tckd, nckd = tckd_and_nckd(z, v, int(label), temperature)
            values.append(alpha * tckd + beta * nckd)
        else:
            p, q = (softmath.soften(row, temperature=temperature) for row in (v, z))
            values.append(alpha * divergence(p, q))
    return temperature**2 * float(np.mean(values))


class TestFormula:
    @given(problems(), temperatures, weights, weights, weights, weights)
    def test_it_equals_the_papers_formula(
        self,
        problem: tuple[Array, Array, Labels],
        temperature: float,
        alpha: float,
        beta: float,
        hard_weight: float,
        soft_weight: float,
    ) -> None:
        """All parts, in float64, labelled and unlabelled rows mixed."""
        student, teacher, labels = problem
        parts = decoupled_loss(
            torch.tensor(student),
            batch(teacher, labels, temperature),
            alpha=alpha,
            beta=beta,
            hard_weight=hard_weight,
            soft_weight=soft_weight,
        )
        soft = reference(student, teacher, labels, temperature, alpha=alpha, beta=beta)
        hard = reference_losses.hard_cross_entropy(student, labels)
        np.testing.assert_allclose(parts.soft.item(), soft, rtol=1e-8, atol=1e-9 * temperature**2)
        np.testing.assert_allclose(parts.hard.item(), hard, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(
            parts.total.item(), soft_weight * soft + hard_weight * hard, rtol=1e-8, atol=1e-8 * temperature**2
        )

    @given(problems(unlabelled=False), temperatures)
    def test_the_terms_add_up_to_plain_distillation(
        self, problem: tuple[Array, Array, Labels], temperature: float
    ) -> None:
        """KL = TCKD + (1 - p_t) NCKD, the paper's identity, row by row: value and gradient."""
        for z_C, v_C, label in zip(*problem, strict=True):
            rest = 1 - softmath.soften(v_C, temperature=temperature)[label]
            z = torch.tensor(z_C[None], requires_grad=True)
            targets = batch(v_C[None], [int(label)], temperature)
            ours = decoupled_loss(z, targets, alpha=1.0, beta=float(rest))
            plain = distillation_loss(z, targets)
            np.testing.assert_allclose(
                ours.soft.item(), temperature**2 * plain.kl.item(), rtol=1e-6, atol=1e-9 * temperature**2
            )
            np.testing.assert_allclose(
                gradient_of(ours.soft, z), gradient_of(plain.soft, z), rtol=1e-6, atol=1e-9 * temperature**2
            )

    def test_by_hand(self) -> None:
        """p = (1/2, 1/3, 1/6), q = (1/4, 1/4, 1/2), label 0: the pairs are (1/2, 1/2) and (1/4, 3/4)."""
        teacher, student = np.log([[1 / 2, 1 / 3, 1 / 6]]), np.log([[1 / 4, 1 / 4, 1 / 2]])
        tckd = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
        nckd = 2 / 3 * np.log((2 / 3) / (1 / 3)) + 1 / 3 * np.log((1 / 3) / (2 / 3))
        parts = decoupled_loss(torch.tensor(student), batch(teacher, [0]), alpha=3.0, beta=5.0, hard_weight=2.0)
        np.testing.assert_allclose(parts.soft.item(), 3 * tckd + 5 * nckd, rtol=1e-12)
        np.testing.assert_allclose(parts.total.item(), 3 * tckd + 5 * nckd + 2 * np.log(4), rtol=1e-12)

    def test_autograd_agrees_with_finite_differences(self) -> None:
        """torch's gradcheck; truncated classes and an unlabelled row among them."""
        teacher = normal(1, 4, 5)
        teacher[0, 3] = teacher[2, 1] = -np.inf
        targets = batch(teacher, [2, -1, 1, 0], 3.0)
        z = torch.tensor(normal(0, 4, 5), requires_grad=True)
        assert torch.autograd.gradcheck(lambda z: decoupled_loss(z, targets, alpha=0.7, beta=4.0).total, (z,))

    @given(problems(), temperatures, st.floats(-50, 50))
    def test_a_row_constant_changes_nothing(
        self, problem: tuple[Array, Array, Labels], temperature: float, constant: float
    ) -> None:
        """On either side."""
        student, teacher, labels = problem
        first = decoupled_loss(torch.tensor(student), batch(teacher, labels, temperature))
        moved = decoupled_loss(torch.tensor(student + constant), batch(teacher - constant, labels, temperature))
        np.testing.assert_allclose(moved.total.item(), first.total.item(), rtol=1e-7, atol=1e-8 * temperature**2)

    @given(problems(), temperatures)
    def test_the_soft_part_is_least_at_the_targets(
        self, problem: tuple[Array, Array, Labels], temperature: float
    ) -> None:
        """0 there, without gradient; nowhere below."""
        student, teacher, labels = problem
        targets = batch(teacher, labels, temperature)
        z = torch.tensor(teacher, requires_grad=True)
        parts = decoupled_loss(z, targets)
        assert abs(parts.soft.item()) < 1e-11 * temperature**2
        assert np.abs(gradient_of(parts.soft, z)).max() < 1e-11 * temperature**2
        assert decoupled_loss(torch.tensor(student), targets).soft.item() > -1e-11 * temperature**2


class TestLabels:
    def test_targets_without_labels_are_refused(self) -> None:
        """The message names the loss that needs no labels."""
        with pytest.raises(RequestError, match="distillation_loss, which needs none"):
            decoupled_loss(torch.zeros(2, 3), batch(np.zeros((2, 3)), None))

    def test_a_batch_that_happens_to_have_none_is_plain_distillation_times_alpha(self) -> None:
        """In a data set with some labels a batch may get none of them."""
        targets, z = batch(normal(1, 3, 4), [-1, -1, -1], 4.0), torch.tensor(normal(0, 3, 4), requires_grad=True)
        parts, plain = decoupled_loss(z, targets, alpha=2.5), distillation_loss(z, targets)
        np.testing.assert_allclose(parts.total.item(), 2.5 * 16 * plain.kl.item(), rtol=1e-12)
        np.testing.assert_allclose(gradient_of(parts.total, z), 2.5 * gradient_of(plain.soft, z), rtol=1e-9)

    @pytest.mark.parametrize("name", ["alpha", "beta", "hard_weight", "soft_weight"])
    @pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf"), "1", True])
    def test_bad_weights_are_refused(self, name: str, bad: Any) -> None:
        """By their names."""
        with pytest.raises(RequestError, match=name):
            decoupled_loss(torch.zeros(1, 2), batch(np.zeros((1, 2)), [0]), **{name: bad})


class TestEnds:
    def test_one_class_leaves_nothing_to_learn(self) -> None:
        """0 with a gradient of 0, not NaN."""
        z = torch.tensor(normal(0, 3, 1), requires_grad=True)
        parts = decoupled_loss(z, batch(normal(1, 3, 1), [0, -1, 0], 2.0))
        assert parts.total.item() == 0
        assert not gradient_of(parts.total, z).any()

    def test_a_label_that_the_teacher_cut_away_is_a_pair_of_0_and_1(self) -> None:
        """The label was not among the k kept classes: TCKD asks for its absence, NCKD for all the rest."""
        teacher, student = np.array([[0.0, 1.0, -np.inf]]), np.array([[0.3, 0.2, -0.4]])
        z = torch.tensor(student, requires_grad=True)
        parts = decoupled_loss(z, batch(teacher, [2], 2.0))
        expected = reference(student, teacher, np.array([2]), 2.0, alpha=1.0, beta=8.0)
        np.testing.assert_allclose(parts.soft.item(), expected, rtol=1e-12)
        assert np.isfinite(gradient_of(parts.total, z)).all()

    def test_a_teacher_that_gives_all_to_the_label_has_no_other_classes(self) -> None:
        """One class kept: NCKD is 0 and TCKD is -log q_t, even for a student that rules the others out too."""
        teacher = np.array([[0.0, -np.inf, -np.inf]] * 2)
        student = np.array([[1.0, 0.5, -1.0], [1.0, -np.inf, -np.inf]])
        z = torch.tensor(student, requires_grad=True)
        parts = decoupled_loss(z, batch(teacher, [0, 0]))
        q_t = np.exp(1.0) / np.exp(student[0]).sum()
        np.testing.assert_allclose(parts.soft.item(), -np.log(q_t) / 2, rtol=1e-12)
        assert np.isfinite(gradient_of(parts.total, z)).all()

    @pytest.mark.parametrize("tail", TAIL_RULES)
    def test_rows_of_a_cut_store_are_taken_as_they_are(self, tail: str) -> None:
        """Locked to their temperature, where probabilities are all that is needed."""
        encoding = make_encoding("topk", classes=6, params={"k": 3, "tail": tail})
        logp_BC = softmath.log_soften(normal(1, 5, 6), temperature=4.0).astype(np.float32)
        kept = SoftTargets(
            ids=np.arange(5),
            encoded=encoding.encode(logp_BC - logp_BC.max(axis=1, keepdims=True)),
            encoding=encoding,
            temperature=4.0,
            captured_temperature=4.0,
            locked=True,
            labels=np.array([0, 5, -1, 3, 2]),
        )
        targets, student = SoftTargetBatch.from_soft_targets(kept), normal(0, 5, 6)
        z = torch.tensor(student, requires_grad=True)
        parts = decoupled_loss(z, targets)
        rows_BC = 4.0 * kept.logits().astype(np.float64)
        assert kept.labels is not None
        expected = reference(student, rows_BC, kept.labels, 4.0, alpha=1.0, beta=8.0)
        np.testing.assert_allclose(parts.soft.item(), expected, rtol=1e-9)
        assert np.isfinite(gradient_of(parts.total, z)).all()

    def test_a_sure_student_keeps_its_gradient_in_float32(self) -> None:
        """q_t rounds to 1 in float32; 1 - q_t taken from it would be 0, and its logarithm -inf."""
        student, teacher = np.array([[60.0, 1.0, 0.0]]), np.array([[1.0, 2.0, 0.0]])
        z = torch.tensor(student, dtype=torch.float32, requires_grad=True)
        parts = decoupled_loss(z, batch(teacher.astype(np.float32), [0]))
        expected = reference(student, teacher, np.array([0]), 1.0, alpha=1.0, beta=8.0)
        np.testing.assert_allclose(parts.soft.item(), expected, rtol=1e-5)
        assert np.abs(gradient_of(parts.soft, z)).min() > 0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_half_precision_student_is_raised_first(self, dtype: torch.dtype) -> None:
        """The loss of 1,000 classes is float32, its gradient comes back in the student's dtype."""
        z = torch.tensor(normal(0, 4, 1000), dtype=dtype, requires_grad=True)
        targets = batch(normal(1, 4, 1000).astype(np.float32), [1, 2, -1, 999], 20.0)
        parts = decoupled_loss(z, targets)
        assert parts.total.dtype == torch.float32
        assert parts.total.item() == decoupled_loss(z.detach().float(), targets).total.item()
        (gradient,) = torch.autograd.grad(parts.total, z)
        assert gradient.dtype == dtype
        assert bool(gradient.isfinite().all())
