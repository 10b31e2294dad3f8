"""View transforms: seeds, identity, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from softlabels.errors import JobError
from softlabels.views import SeededTransform, as_view_transform, load_view_transform, view_seeds


class TestTransforms:
    def test_a_batch_does_not_change_a_view(self) -> None:
        """A view depends on its own seed, not on the rest of the batch."""
        transform = SeededTransform(lambda sample: sample + torch.randn(3))
        manifest_free_seeds = view_seeds("k", np.arange(4), np.zeros(4, dtype=np.int64))
        together = [transform.view(torch.zeros(3), seed=int(s), parameters=np.empty(0)) for s in manifest_free_seeds]
        alone = transform.view(torch.zeros(3), seed=int(manifest_free_seeds[2]), parameters=np.empty(0))
        assert torch.equal(together[2], alone)

    def test_settings_count_for_the_identity_and_addresses_do_not(self) -> None:
        """Two equal modules are the same transform, two with other settings are not."""
        assert as_view_transform(torch.nn.Dropout(0.2)).identity == as_view_transform(torch.nn.Dropout(0.2)).identity
        assert as_view_transform(torch.nn.Dropout(0.2)).identity != as_view_transform(torch.nn.Dropout(0.3)).identity

    def test_what_makes_no_views_is_refused(self, tmp_path: Path) -> None:
        """The message names what was returned instead."""
        with pytest.raises(JobError, match="is no view transform"):
            as_view_transform(3)
        with pytest.raises(JobError, match="a view is a tensor or an array"):
            SeededTransform(lambda sample: "view").view(torch.zeros(2), seed=1, parameters=np.empty(0))
        (tmp_path / "t.py").write_text("def make(size):\n    return lambda sample: sample\n")
        with pytest.raises(JobError, match="failed with TypeError"):
            load_view_transform("t.py:make", base=tmp_path)
