"""Encoded bytes reach the student's device and are decoded there, to the same bits as on the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from softlabels.encodings import make_encoding
from softlabels.losses import SoftTargetBatch
from softlabels.targets import SoftTargets

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "q8", "q4"])
def test_decoding_there_is_decoding_here(device: str, name: str) -> None:
    """From read-only memory, as a reply's is; labels come along."""
    logits_BC = np.random.default_rng(0).normal(size=(9, 40)).astype(np.float32)
    logits_BC -= logits_BC.max(axis=1, keepdims=True)
    encoding = make_encoding(name, classes=40)
    encoded = encoding.encode(logits_BC)
    for array in encoded.values():
        array.flags.writeable = False
    targets = SoftTargets(
        ids=np.arange(9),
        encoded=encoded,
        encoding=encoding,
        temperature=4.0,
        captured_temperature=1.0,
        locked=False,
        labels=np.arange(9),
    )
    there = SoftTargetBatch.from_soft_targets(targets, device=device).logits_BC
    assert there.device.type == device
    np.testing.assert_array_equal(there.cpu().numpy(), targets.logits())
