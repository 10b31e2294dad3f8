"""The audit on the device says what the reference says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from softlabels.audit import Audit
from softlabels.encodings import make_encoding
from softlabels.precompute.device_audit import figures_on_device

TEMPERATURES = (1.0, 4.0, 20.0)


@pytest.mark.parametrize(
    ("name", "params"),
    [("f16", {}), ("q4", {"head": 4}), ("topk", {"k": 12, "tail": "renormalise"}), ("topk", {"k": 12})],
)
@pytest.mark.parametrize("captured", [1.0, 4.0])
def test_it_agrees_with_numpy(name: str, params: dict[str, object], captured: float) -> None:
    """Every figure, with classes cut off (infinite KL) and without, at each temperature."""
    torch.set_num_threads(1)
    encoding = make_encoding(name, classes=60, params=params)
    logits_BC = (5 * np.random.default_rng(0).normal(size=(300, 60))).astype(np.float32)
    logits_BC -= logits_BC.max(axis=1, keepdims=True)
    encoded = encoding.encode_torch(torch.from_numpy(logits_BC))
    reference, ours = Audit(TEMPERATURES), Audit(TEMPERATURES)
    arrays = {key: tensor.numpy() for key, tensor in encoded.items()}
    tail = arrays.get("tail_mass")
    reference.add(logits_BC, encoding.decode(arrays), captured=captured, dropped_mass_B=tail)
    ours.absorb(
        figures_on_device(
            torch.from_numpy(logits_BC),
            encoding.decode_torch(encoded),
            temperatures=TEMPERATURES,
            captured=captured,
            dropped_mass_B=encoded.get("tail_mass"),
        )
    )
    expected, found = reference.summary(), ours.summary()
    assert found["top1_agreement"] == expected["top1_agreement"]
    assert found["infinite_kl_rows"] == expected["infinite_kl_rows"]
    assert found["dropped_mass"] == pytest.approx(expected["dropped_mass"], rel=1e-9, abs=1e-12)
    assert found["gradient"] == pytest.approx(expected["gradient"], rel=1e-6)
    for temperature, figures in expected["kl_nats"].items():
        assert found["kl_nats"][temperature] == pytest.approx(figures, rel=1e-6, abs=1e-12)
