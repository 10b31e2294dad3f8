"""The audit on the device says what the reference says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from softlabels.audit import Audit, ErrorSums
from softlabels.encodings import make_encoding
from softlabels.precompute.pipeline.device_step import audited_rows, pack_figures, unpack_figures

TEMPERATURES = (1.0, 4.0, 20.0)


def figures_on_device(
    exact_BC: Tensor, decoded_BC: Tensor, *, temperatures: tuple[float, ...], **known: Any
) -> ErrorSums:
    """The figures of rows, packed and unpacked."""
    packed = pack_figures(exact_BC, decoded_BC, temperatures=temperatures, **known)
    return unpack_figures(packed.cpu().numpy(), classes=exact_BC.shape[1], temperatures=temperatures)


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
    ours.add_sums(
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


class TestHowManyRows:
    def test_all_rows_up_to_sixteen_thousand_classes(self) -> None:
        """Where measuring costs nothing beside the teacher, nothing is left out."""
        assert list(range(100))[audited_rows(37, 100, 16_384)] == list(range(100))

    @pytest.mark.parametrize("batch", [1, 7, 100, 1000])
    def test_of_longer_rows_some_by_their_number_in_the_store(self, batch: int) -> None:
        """The same rows however the shard is cut into batches."""
        found = []
        for start in range(0, 1000, batch):
            rows = np.arange(start, min(start + batch, 1000))
            found += rows[audited_rows(start, len(rows), 128_000)].tolist()
        assert found == list(range(0, 1000, 15))

    def test_many_entries_are_measured_in_blocks(self) -> None:
        """More entries than are measured at once give what the reference gives."""
        torch.set_num_threads(1)
        exact_BC = np.random.default_rng(0).normal(size=(300, 16_000)).astype(np.float32)
        exact_BC -= exact_BC.max(axis=1, keepdims=True)
        kept_BC = exact_BC.astype(np.float16).astype(np.float32)
        reference, ours = Audit((1.0,)), Audit((1.0,))
        reference.add(exact_BC, kept_BC, captured=1.0)
        ours.add_sums(
            figures_on_device(torch.from_numpy(exact_BC), torch.from_numpy(kept_BC), temperatures=(1.0,), captured=1.0)
        )
        expected, found = reference.summary(), ours.summary()
        assert found["rows"] == 300
        assert found["gradient"] == pytest.approx(expected["gradient"], rel=1e-6)
        assert found["kl_nats"]["1"] == pytest.approx(expected["kl_nats"]["1"], rel=1e-6)
