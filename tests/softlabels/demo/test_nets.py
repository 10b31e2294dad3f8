"""The paper's nets: their shapes, their dropout, and what they take."""

from __future__ import annotations

import pytest
import torch

from softlabels.demo.nets import ByteDropout, student_mlp, teacher_mlp

torch.set_num_threads(1)


def shapes(model: torch.nn.Module) -> list[tuple[int, ...]]:
    """The shapes of the weight matrices, first layer first."""
    return [tuple(parameter.shape) for parameter in model.parameters() if parameter.ndim == 2]


class TestTheNets:
    def test_the_student_is_784_800_800_10(self) -> None:
        """Section 3 of the paper."""
        assert shapes(student_mlp()) == [(800, 784), (800, 800), (10, 800)]

    def test_the_teacher_is_784_1200_1200_10(self) -> None:
        """Section 3 of the paper."""
        assert shapes(teacher_mlp()) == [(1200, 784), (1200, 1200), (10, 1200)]

    def test_bytes_and_scaled_floats_give_the_same_logits(self) -> None:
        """uint8 is scaled inside, so that a transfer set stays the bytes it was."""
        images = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8)
        model = student_mlp().eval()
        torch.testing.assert_close(model(images), model(images.float() / 255))

    def test_other_sizes_fit(self) -> None:
        """8 x 8 digits, a narrow net, another number of classes."""
        model = student_mlp(in_features=64, hidden=30, classes=7)
        assert model(torch.zeros(2, 8, 8, dtype=torch.uint8)).shape == (2, 7)

    def test_only_the_teacher_drops_units(self) -> None:
        """In training mode two passes differ for the teacher alone; in eval mode for neither."""
        images = torch.randint(0, 256, (4, 28, 28), dtype=torch.uint8)
        teacher, student = teacher_mlp(), student_mlp()
        assert not torch.equal(teacher(images), teacher(images))
        assert torch.equal(student(images), student(images))
        teacher.eval()
        assert torch.equal(teacher(images), teacher(images))


class TestByteDropout:
    @pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
    def test_the_share_dropped_and_the_mean_are_right(self, rate: float) -> None:
        """Over a million units, within five standard deviations."""
        torch.manual_seed(0)
        out = ByteDropout(rate)(torch.ones(1_000, 1_000))
        applied = round(rate * 256) / 256
        deviation = (applied * (1 - applied) / 1e6) ** 0.5
        assert abs(float((out == 0).float().mean()) - applied) < 5 * deviation
        assert abs(float(out.mean()) - 1.0) < 5 * deviation / (1 - applied)

    def test_units_are_dropped_independently(self) -> None:
        """Neighbours, whose bytes come from one 64-bit draw, agree as often as chance has it."""
        torch.manual_seed(0)
        kept = (ByteDropout(0.5)(torch.ones(1_000, 1_000)) != 0).flatten()
        for distance in (1, 2, 4, 7, 8):
            agree = float((kept[:-distance] == kept[distance:]).float().mean())
            assert abs(agree - 0.5) < 5 * 0.5 / 1e3

    def test_gradients_pass_where_units_did(self) -> None:
        """And with the same scale."""
        units = torch.ones(50, 50, requires_grad=True)
        out = ByteDropout(0.5)(units)
        out.sum().backward()
        assert units.grad is not None
        torch.testing.assert_close(units.grad, out.detach())

    def test_eval_mode_and_rate_zero_change_nothing(self) -> None:
        """The very same tensor comes back."""
        units = torch.ones(3, 3)
        assert ByteDropout(0.5).eval()(units) is units
        assert ByteDropout(0.0)(units) is units

    @pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
    def test_a_rate_that_is_none_is_refused(self, rate: float) -> None:
        """It says what a rate is."""
        with pytest.raises(ValueError, match="a dropout rate is at least 0 and below 1"):
            ByteDropout(rate)
