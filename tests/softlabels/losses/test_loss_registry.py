"""Losses by name: arguments of `make_loss`, its modules, and their errors."""

from __future__ import annotations

import copy
import inspect
import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from softlabels.errors import EmptyBatchError, NonFiniteLogitsError, RequestError, ShapeMismatchError
from softlabels.losses import (
    LOSS_NAMES,
    DecoupledLoss,
    DistillationLoss,
    LossParts,
    NamedLoss,
    RelationLoss,
    SoftTargetBatch,
    decoupled_loss,
    distillation_loss,
    make_loss,
    relation_loss,
)

torch.set_num_threads(1)

FUNCTIONS: dict[str, Any] = {"kd": distillation_loss, "dkd": decoupled_loss, "dist": relation_loss}
CLASSES: dict[str, type[NamedLoss]] = {"kd": DistillationLoss, "dkd": DecoupledLoss, "dist": RelationLoss}
NAMES = list(LOSS_NAMES)
VARIANTS = [("kd", {}), ("dkd", {}), ("dist", {}), *((n, {"standardise": "population"}) for n in ("kd", "dkd"))]


def targets(rows: int = 4, classes: int = 10, *, temperature: float = 3.0) -> SoftTargetBatch:
    """Labelled targets of random logits, the last row unlabelled."""
    logits = np.random.default_rng(1).normal(size=(rows, classes)) * 3
    labels = [*range(rows - 1), -1] if rows else []
    return SoftTargetBatch(
        logits_BC=torch.tensor(logits),
        temperature=temperature,
        captured_temperature=1.0,
        locked=False,
        labels_B=torch.tensor(labels, dtype=torch.int64),
    )


def student(rows: int = 4, classes: int = 10) -> torch.Tensor:
    """A student's logits."""
    return torch.tensor(np.random.default_rng(0).normal(size=(rows, classes)))


class TestMakeLoss:
    def test_every_name_has_its_class(self) -> None:
        """And every class its name."""
        assert {name: type(make_loss(name)) for name in LOSS_NAMES} == CLASSES

    @pytest.mark.parametrize("name", NAMES)
    def test_the_options_are_the_functions_with_its_defaults(self, name: str) -> None:
        """One list of options a loss, however it is called."""
        of_function = {
            key: parameter.default
            for key, parameter in inspect.signature(FUNCTIONS[name]).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        assert make_loss(name).options == of_function
        assert not set(of_function) & {"temperature", "T", "tau", "t"}

    @pytest.mark.parametrize(("given", "meant"), [("dkdd", "dkd"), ("DIST", "dist"), ("distt", "dist")])
    def test_an_unknown_name_names_the_nearest(self, given: str, meant: str) -> None:
        """And all there are."""
        with pytest.raises(RequestError, match=rf"did you mean `{meant}`\?.*kd, dkd, dist"):
            make_loss(given)

    @pytest.mark.parametrize("name", ["", "huber", None, 3, ["kd"]])
    def test_a_name_near_to_none_names_all(self, name: Any) -> None:
        """Without a guess."""
        with pytest.raises(RequestError, match="known are kd, dkd, dist"):
            make_loss(name)

    def test_an_unknown_option_names_the_nearest(self) -> None:
        """And what the loss takes: the temperature for one is not among it."""
        with pytest.raises(RequestError, match=r"'dkd' has no option 'bet'; did you mean `beta`\?.*alpha, beta"):
            make_loss("dkd", bet=2.0)
        with pytest.raises(RequestError, match="no option 'temperature'"):
            make_loss("kd", temperature=4.0)
        with pytest.raises(RequestError, match="no option 'standardise'"):
            make_loss("dist", standardise="population")

    @pytest.mark.parametrize("bad", ["8", True, None, -1, float("nan"), float("inf"), [1.0], 10**400])
    def test_a_weight_that_is_none_is_refused_when_it_is_made(self, bad: Any) -> None:
        """At construction, not at the first step; strings from a command line too."""
        with pytest.raises(RequestError, match="beta is"):
            make_loss("dkd", beta=bad)

    @pytest.mark.parametrize("bad", [True, "both", 0])
    def test_a_bad_deviation_is_refused_when_it_is_made(self, bad: Any) -> None:
        """The two that there are get named."""
        with pytest.raises(RequestError, match=r"'population'.*'sample'"):
            make_loss("kd", standardise=bad)

    def test_whole_numbers_are_weights(self) -> None:
        """JSON writes 8 for 8.0."""
        assert make_loss("dkd", beta=2).options["beta"] == 2.0


@pytest.mark.parametrize(("name", "options"), VARIANTS)
class TestModule:
    def test_it_is_its_function(self, name: str, options: dict[str, Any]) -> None:
        """`parts` is all of it, calling it the total, for frameworks that want one scalar."""
        module = make_loss(name, soft_weight=0.7, **options)
        expected = FUNCTIONS[name](student(), targets(), soft_weight=0.7, **options)
        parts = module.parts(student(), targets())
        assert isinstance(parts, LossParts)
        assert [float(part) for part in parts] == [float(part) for part in expected]
        assert torch.equal(module(student(), targets()), expected.total)
        assert all(part.ndim == 0 for part in parts)
        assert not parts.kl.requires_grad

    def test_it_has_nothing_to_train_or_save(self, name: str, options: dict[str, Any]) -> None:
        """So a student's checkpoint may hold it or not."""
        module = make_loss(name, **options)
        assert not module.state_dict()
        assert not list(module.parameters())

    def test_it_prints_and_travels_with_its_options(self, name: str, options: dict[str, Any]) -> None:
        """To another process, and into a copy."""
        module = make_loss(name, hard_weight=0.25, **options)
        assert "hard_weight=0.25" in repr(module)
        for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
            assert other.options == module.options
            assert torch.equal(other(student(), targets()), module(student(), targets()))

    def test_options_may_change_between_steps(self, name: str, options: dict[str, Any]) -> None:
        """As a warm-up does."""
        module = make_loss(name, hard_weight=0.0, **options)
        full = module(student(), targets())
        module.soft_weight = 0.5
        torch.testing.assert_close(module(student(), targets()), 0.5 * full)

    def test_t_squared_is_in_the_soft_part_once(self, name: str, options: dict[str, Any]) -> None:
        """A divergence's gradient falls as 1/T² and so hardly changes with T² before it; a correlation's grows."""
        sizes = []
        for temperature in (50.0, 100.0, 200.0):
            z = student(classes=6).requires_grad_()
            soft = make_loss(name, **options).parts(z, targets(classes=6, temperature=temperature)).soft
            sizes.append(float(torch.autograd.grad(soft, z)[0].norm()))
        growth = 4.0 if name == "dist" else 1.0
        assert [after / before for before, after in pairwise(sizes)] == pytest.approx([growth, growth], rel=0.1)

    def test_another_shape_or_device_is_refused(self, name: str, options: dict[str, Any]) -> None:
        """Nothing is broadcast; an empty batch has no mean."""
        loss = make_loss(name, **options)
        with pytest.raises(ShapeMismatchError, match=r"\[4, 9\] and the targets have 10 classes"):
            loss(torch.zeros(4, 9), targets())
        with pytest.raises(ShapeMismatchError, match="1 rows and there are targets for 4"):
            loss(torch.zeros(1, 10), targets())
        with pytest.raises(EmptyBatchError, match="no rows"):
            loss(torch.zeros(0, 10), targets(0))
        with pytest.raises(RequestError, match=r"targets.to\(device\)"):
            loss(student(), targets().to("meta"))

    def test_mixed_precision_around_it_changes_nothing(self, name: str, options: dict[str, Any]) -> None:
        """Frameworks run a whole step under autocast; the loss stays in float32."""
        z, loss = student().bfloat16(), make_loss(name, **options)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = loss(z, targets())
        assert mixed.dtype == torch.float32
        assert mixed.item() == loss(z, targets()).item()

    @pytest.mark.parametrize("side", ["student", "targets"])
    def test_a_row_of_nan_never_looks_like_a_loss(self, name: str, options: dict[str, Any], side: str) -> None:
        """The total is NaN, or the row is named."""
        z, aims = student(), targets()
        (z if side == "student" else aims.logits_BC)[1, 2] = float("nan")
        if side == "targets" and "standardise" in options:
            with pytest.raises(NonFiniteLogitsError, match=r"rows \[1\]"):
                make_loss(name, **options)(z, aims)
        else:
            assert make_loss(name, **options)(z, aims).isnan()
