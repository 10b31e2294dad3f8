"""A teacher is frozen and stays in eval mode, and gives its last layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from softlabels.errors import TeacherError
from softlabels.precompute.teachers import teacher_from_module


class TestModes:
    def test_a_model_in_training_mode_is_frozen(self, net: nn.Module, batch: Tensor) -> None:
        """Dropout is off and statistics are fixed, whatever mode it came in; no gradient is kept."""
        expected = net(batch).detach()
        teacher = teacher_from_module(net.train(), name="net")
        assert torch.equal(teacher.logits(batch), expected)
        assert not any(parameter.requires_grad for parameter in teacher.model.parameters())

    def test_a_model_that_sets_itself_back_is_refused(self, load) -> None:
        """The part that is in training mode is named."""
        with pytest.raises(TeacherError, match=r"training mode \(drop\)"):
            load("nets.py:Rebel").logits(torch.randn(4, 6))


class TestHiddenStates:
    def test_hidden_states_and_head_give_the_logits(self, load, net: nn.Module, batch: Tensor, tmp_path: Path) -> None:
        """logits = hidden @ weight.T + bias, and the last layer is not computed for them."""
        save_file(net.state_dict(), tmp_path / "net.safetensors")
        teacher = load(weights="net.safetensors", head="fc")
        hidden = teacher.hidden(batch)
        assert hidden.shape == (7, 8)
        torch.testing.assert_close(teacher.head().logits(hidden), net(batch))
        assert torch.equal(teacher.logits(batch), net(batch))  # nothing of the hook is left behind

    def test_a_head_that_does_not_exist(self, load, batch: Tensor) -> None:
        """Not named, not there, or not linear: each says so."""
        with pytest.raises(TeacherError, match="no last layer is known"):
            load().hidden(batch)
        with pytest.raises(TeacherError, match="has no layer 'classifier'; its own are features, norm, drop, fc"):
            load(head="classifier")
        with pytest.raises(TeacherError, match="it is a BatchNorm1d"):
            load(head="norm").head()
