"""What counts as running out of memory, and how much a process took."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from softlabels.errors import TeacherError
from softlabels.precompute import teacher_from_module
from softlabels.precompute.pipeline.device import MemoryMeter, is_out_of_memory

EXBIBYTE = 1 << 60


class Greedy(nn.Module):
    """Asks for more memory than any machine has."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Never comes to an answer."""
        return torch.empty(EXBIBYTE, dtype=torch.uint8)


class TestOutOfMemory:
    def test_a_teacher_for_which_main_memory_does_not_do(self) -> None:
        """Recognised through the error that names the teacher."""
        with pytest.raises(TeacherError) as caught:
            teacher_from_module(Greedy(), name="t").logits(torch.zeros(1))
        assert is_out_of_memory(caught.value)

    def test_numpy_and_devices_say_it_in_their_own_way(self) -> None:
        """Both are known."""
        with pytest.raises(MemoryError) as caught:
            np.empty(EXBIBYTE, dtype=np.uint8)
        assert is_out_of_memory(caught.value)
        assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))

    def test_other_errors_are_none(self) -> None:
        """A halved batch would not mend them."""
        assert not is_out_of_memory(TeacherError("a teacher fails"))
        assert not is_out_of_memory(None)


class TestMemoryMeter:
    def test_a_peak_stays_when_the_memory_is_given_back(self) -> None:
        """It is the largest that the process took; what may be taken in all is more than that."""
        meter = MemoryMeter(torch.device("cpu"))
        before = meter.peak_bytes()
        taken = np.ones(64 << 20, dtype=np.uint8)
        del taken
        assert meter.peak_bytes() >= max(before, 64 << 20)
        assert meter.limit_bytes() > meter.peak_bytes()
