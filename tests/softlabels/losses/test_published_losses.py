"""Losses against values of the papers' published implementations, stored with their sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from softlabels import softmath
from softlabels.losses import SoftTargetBatch, decoupled_loss, distillation_loss, relation_loss

torch.set_num_threads(1)

Array = NDArray[np.floating[Any]]

PUBLISHED: dict[str, Any] = json.loads(
    (Path(__file__).resolve().parents[2] / "fixtures" / "losses" / "published.json").read_text(encoding="utf-8")
)


def cases(*sources: str) -> list[Any]:
    """The kept cases of these sources, as parameters."""
    return [
        pytest.param(case, id=f"{case['source']}-{case['inputs']}-T{case['temperature']:g}")
        for case in PUBLISHED["cases"]
        if case["source"] in sources
    ]


def rows(case: dict[str, Any]) -> tuple[Array, Array, NDArray[np.int64]]:
    """Student's logits, teacher's logits and labels of a case."""
    kept = PUBLISHED["inputs"][case["inputs"]]
    return np.array(kept["student_BC"]), np.array(kept["teacher_BC"]), np.array(kept["labels_B"])


def setting(case: dict[str, Any]) -> tuple[torch.Tensor, SoftTargetBatch]:
    """The case's student, collecting gradients, and its targets."""
    student, teacher, labels = rows(case)
    targets = SoftTargetBatch(
        logits_BC=torch.tensor(teacher),
        temperature=case["temperature"],
        captured_temperature=1.0,
        locked=False,
        labels_B=torch.tensor(labels),
    )
    return torch.tensor(student, requires_grad=True), targets


def assert_gradient(loss: torch.Tensor, z: torch.Tensor, case: dict[str, Any], *, within: float) -> None:
    """The gradient with respect to the student's logits is theirs, within a share of its largest entry."""
    (gradient,) = torch.autograd.grad(loss, z)
    theirs = np.array(case["gradient_BC"])
    np.testing.assert_allclose(gradient.numpy(), theirs, rtol=0, atol=within * np.abs(theirs).max())


@pytest.mark.parametrize("case", cases("mdistiller-kd"))
def test_plain_distillation(case: dict[str, Any]) -> None:
    """T² KL of theirs; the same gradient as our T² cross-entropy."""
    z, targets = setting(case)
    parts = distillation_loss(z, targets)
    np.testing.assert_allclose(case["temperature"] ** 2 * parts.kl.item(), case["value"], rtol=1e-13)
    assert_gradient(parts.soft, z, case, within=1e-13)


@pytest.mark.parametrize("case", cases("mdistiller-dkd"))
def test_decoupled_distillation(case: dict[str, Any]) -> None:
    """Value and gradient, to rounding."""
    z, targets = setting(case)
    parts = decoupled_loss(z, targets, **case["options"])
    np.testing.assert_allclose(parts.soft.item(), case["value"], rtol=1e-13)
    assert_gradient(parts.soft, z, case, within=1e-13)


def correlation_loss_with_their_guard(case: dict[str, Any]) -> float:
    """The paper's formula with the 1e-8 that their code adds to the product of norms."""
    student, teacher, _ = rows(case)
    p, q = (softmath.soften(logits, temperature=case["temperature"]) for logits in (teacher, student))

    def distance(u: Array, v: Array) -> Array:
        du, dv = u - u.mean(axis=1, keepdims=True), v - v.mean(axis=1, keepdims=True)
        norms = np.linalg.norm(du, axis=1) * np.linalg.norm(dv, axis=1)
        return np.asarray(1 - (du * dv).sum(axis=1) / (norms + 1e-8))

    beta, gamma = case["options"]["beta"], case["options"]["gamma"]
    total = beta * distance(p, q).mean() + gamma * distance(p.T, q.T).mean()
    return float(case["temperature"] ** 2 * total)


@pytest.mark.parametrize("case", cases("dist"))
def test_correlations(case: dict[str, Any]) -> None:
    """To the 1e-8 that their code adds to a product of norms, and to rounding once the formula has it too."""
    z, targets = setting(case)
    parts = relation_loss(z, targets, **case["options"])
    np.testing.assert_allclose(correlation_loss_with_their_guard(case), case["value"], rtol=1e-12)
    np.testing.assert_allclose(parts.soft.item(), case["value"], rtol=1e-6)
    assert_gradient(parts.soft, z, case, within=2e-5)


@pytest.mark.parametrize("case", cases("standardised-kd"))
def test_standardised_distillation(case: dict[str, Any]) -> None:
    """To the 1e-7 that their code adds to the sample's deviation."""
    z, targets = setting(case)
    parts = distillation_loss(z, targets, standardise="sample")
    np.testing.assert_allclose(case["temperature"] ** 2 * parts.kl.item(), case["value"], rtol=3e-7)
    assert_gradient(parts.soft, z, case, within=1e-6)


@pytest.mark.parametrize("case", cases("standardised-dkd"))
def test_standardised_decoupled_distillation(case: dict[str, Any]) -> None:
    """To the 1e-7 that their code adds to the sample's deviation."""
    z, targets = setting(case)
    parts = decoupled_loss(z, targets, standardise="sample", **case["options"])
    np.testing.assert_allclose(parts.soft.item(), case["value"], rtol=3e-7)
    assert_gradient(parts.soft, z, case, within=1e-6)


def test_every_kept_case_is_tested_and_has_its_source() -> None:
    """Repository, commit, file and function."""
    tested = {"mdistiller-kd", "mdistiller-dkd", "dist", "standardised-kd", "standardised-dkd"}
    assert {case["source"] for case in PUBLISHED["cases"]} == set(PUBLISHED["sources"]) == tested
    for source in PUBLISHED["sources"].values():
        assert {"repository", "commit", "file", "function", "licence"} <= set(source)
