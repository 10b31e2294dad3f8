"""Batches of soft targets as tensors: checks, temperatures, devices, and decoding on the student's device."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from softlabels import softmath
from softlabels.encodings import make_encoding
from softlabels.errors import RequestError, ShapeMismatchError, TemperatureError, TemperatureLockedError
from softlabels.losses import SoftTargetBatch
from softlabels.targets import SoftTargets

Array = NDArray[np.float64]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def batch(
    logits_BC: NDArray[Any],
    *,
    temperature: float = 1.0,
    captured: float = 1.0,
    locked: bool = False,
    labels: NDArray[Any] | list[int] | None = None,
) -> SoftTargetBatch:
    """Targets of a teacher's logits as they were captured."""
    return SoftTargetBatch(
        logits_BC=torch.tensor(logits_BC),
        temperature=temperature,
        captured_temperature=captured,
        locked=locked,
        labels_B=None if labels is None else torch.tensor(labels),
    )


def normal(seed: int, *shape: int) -> Array:
    """Reproducible logits of spread 3."""
    return np.random.default_rng(seed).normal(size=shape) * 3


class TestSoftTargetBatch:
    @pytest.mark.parametrize("labels", [[0, 3, 0], [0, -2, 0], [0, -100, 0]])
    def test_labels_outside_the_classes_are_named(self, labels: list[int]) -> None:
        """Also torch's own -100: here unlabelled is -1."""
        with pytest.raises(RequestError, match=f"{labels[1]} in row 1"):
            batch(np.zeros((3, 3)), labels=labels)

    def test_one_integer_label_a_row(self) -> None:
        """Other counts and kinds are refused, narrow integers widened."""
        with pytest.raises(ShapeMismatchError, match="3 rows"):
            batch(np.zeros((3, 3)), labels=[0, 1])
        with pytest.raises(RequestError, match="float"):
            batch(np.zeros((3, 3)), labels=np.zeros(3))
        narrow = batch(np.zeros((3, 3)), labels=np.array([0, -1, 2], dtype=np.int16))
        assert narrow.labels_B is not None
        assert narrow.labels_B.dtype == torch.int64

    @pytest.mark.parametrize("shape", [(3,), (3, 3, 3), (3, 0)])
    def test_anything_but_rows_by_classes_is_refused(self, shape: tuple[int, ...]) -> None:
        """With its shape."""
        with pytest.raises(ShapeMismatchError, match=r"\[rows, classes\]"):
            batch(np.zeros(shape))

    def test_integers_are_no_logits(self) -> None:
        """They may be encoded rows or labels."""
        with pytest.raises(ShapeMismatchError, match="int64"):
            batch(np.zeros((2, 3), dtype=np.int64))

    @pytest.mark.parametrize("bad", [0, -1.0, float("nan"), "4", True])
    def test_bad_temperatures_are_refused(self, bad: Any) -> None:
        """The one used and the one captured."""
        with pytest.raises(TemperatureError):
            batch(np.zeros((2, 3)), temperature=bad)
        with pytest.raises(TemperatureError):
            batch(np.zeros((2, 3)), captured=bad)

    def test_a_locked_batch_has_one_temperature(self) -> None:
        """Both are named."""
        with pytest.raises(TemperatureLockedError, match=r"(?s)4.*2"):
            batch(np.zeros((2, 3)), temperature=2.0, captured=4.0, locked=True)

    def test_log_p_is_the_target_at_its_temperature(self) -> None:
        """Against the reference."""
        teacher = normal(0, 3, 5)
        expected = softmath.log_soften(teacher, temperature=7.0)
        given_BC = batch(teacher / 2, captured=2.0, temperature=7.0).log_p()
        np.testing.assert_allclose(given_BC.numpy(), expected, rtol=1e-12)

    def test_to_moves_rows_and_labels_and_keeps_the_rest(self) -> None:
        """The batch it came from stays where it is."""
        here = batch(np.zeros((2, 3)), temperature=4.0, captured=4.0, locked=True, labels=[0, -1])
        there = here.to("meta")
        assert there.labels_B is not None
        assert here.labels_B is not None
        assert (there.logits_BC.device.type, there.labels_B.device.type) == ("meta", "meta")
        assert (here.logits_BC.device.type, here.labels_B.device.type) == ("cpu", "cpu")
        assert (there.temperature, there.captured_temperature, there.locked) == (4.0, 4.0, True)
        assert batch(np.zeros((2, 3))).to(torch.device("cpu")).labels_B is None

    def test_it_crosses_a_process_border(self) -> None:
        """A DataLoader's worker hands batches over."""
        sent = batch(normal(0, 2, 3), temperature=4.0, labels=[0, -1])
        got = pickle.loads(pickle.dumps(sent))
        assert torch.equal(sent.logits_BC, got.logits_BC)
        assert (got.temperature, got.locked) == (4.0, False)


class TestFromSoftTargets:
    def targets(self, logits_BC: NDArray[np.float32], labels: NDArray[np.int64] | None) -> SoftTargets:
        """A batch as a store gives it."""
        encoding = make_encoding("f32", classes=logits_BC.shape[1])
        return SoftTargets(
            ids=np.arange(len(logits_BC)),
            encoded=encoding.encode(logits_BC),
            encoding=encoding,
            temperature=6.0,
            captured_temperature=2.0,
            locked=False,
            labels=labels,
        )

    def test_it_is_the_same_distribution_and_labels(self) -> None:
        """p of both, at the temperature the batch carries."""
        soft = self.targets(normal(0, 4, 5).astype(np.float32), np.array([0, -1, 4, 2]))
        made = SoftTargetBatch.from_soft_targets(soft)
        np.testing.assert_allclose(made.log_p().exp().numpy(), soft.p(), rtol=1e-6)
        assert (made.temperature, made.captured_temperature, made.locked) == (6.0, 2.0, False)
        assert made.labels_B is not None
        assert made.labels_B.tolist() == [0, -1, 4, 2]

    def test_without_labels(self) -> None:
        """None stays None."""
        soft = self.targets(np.zeros((2, 3), dtype=np.float32), None)
        assert SoftTargetBatch.from_soft_targets(soft).labels_B is None

    @pytest.mark.parametrize("encoding_name", ["f32", "f16", "bf16"])
    def test_read_only_rows_are_copied_without_a_warning(self, encoding_name: str) -> None:
        """Rows of a reply are a read-only view; torch would warn, and a write would change the view."""
        encoding = make_encoding(encoding_name, classes=3)
        encoded = dict(encoding.encode(np.zeros((2, 3), dtype=np.float32)))
        labels = np.array([0, 1])
        for array in (*encoded.values(), labels):
            array.flags.writeable = False
        soft = SoftTargets(
            ids=np.arange(2),
            encoded=encoded,
            encoding=encoding,
            temperature=1.0,
            captured_temperature=1.0,
            locked=False,
            labels=labels,
        )
        made = SoftTargetBatch.from_soft_targets(soft)
        made.logits_BC.add_(1.0)
        assert all(not array.any() for array in encoded.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "q8", "q4"])
def test_rows_decode_on_the_device_as_on_the_host(device: str, name: str) -> None:
    """To the same bits, from read-only memory, as a reply's is, with the labels."""
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
