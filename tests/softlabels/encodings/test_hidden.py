"""Hidden states: small rows, one head for a store, and the teacher's own logits at any temperature."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import softlabels
from softlabels.audit import Audit
from softlabels.encodings import Hidden, hidden_encoding, make_encoding, row_bytes
from softlabels.encodings.hidden import KEPT_AS, KeptAs
from softlabels.encodings.selection import parse_encoding
from softlabels.errors import (
    EncodingError,
    ManifestError,
    NonFiniteLogitsError,
    ShapeMismatchError,
    UnknownEncodingError,
)
from softlabels.manifest import IdSpec, TemperatureSpec, TransferSetSpec
from softlabels.store import StoreWriter, plan_store
from softlabels.store.shard_checks import Report
from softlabels.store.verify import verify
from softlabels.transfer_set import sample_fingerprints

CLASSES, WIDTH, ROWS = 2_000, 48, 30


def head(kind: str = "f32") -> np.ndarray:
    """A head whose numbers need this type."""
    weights = np.random.default_rng(0).normal(size=(CLASSES, WIDTH)).astype(np.float32) / 4
    if kind == "f16":
        return weights.astype(np.float16).astype(np.float32)
    if kind == "bf16":
        return (weights.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return weights


def states(rows: int = ROWS) -> np.ndarray:
    """Hidden states as they come from a last normalisation, a few of their numbers much larger than the rest."""
    found = np.random.default_rng(1).normal(size=(rows, WIDTH)).astype(np.float32)
    found[:, 3] *= 8
    return found


def exact(hidden: np.ndarray, weights: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """The logits in float64, each row's largest 0."""
    z = hidden.astype(np.float64) @ weights.T.astype(np.float64) + (0 if bias is None else bias)
    return np.asarray(z - z.max(axis=1, keepdims=True))


class TestRows:
    @pytest.mark.parametrize(("kept_as", "bound"), [("f32", 1e-5), ("f16", 0.02), ("bf16", 0.15), ("q8", 0.6)])
    def test_logits_come_back(self, kept_as: KeptAs, bound: float) -> None:
        """Whatever a row's numbers are kept as; with the bias, in NumPy and in torch alike."""
        bias = np.linspace(-1, 1, CLASSES).astype(np.float32)
        encoding = hidden_encoding(head(), bias, kept_as=kept_as)
        encoded = encoding.encode(states())
        decoded = encoding.decode(encoded)
        assert decoded.dtype == np.float32
        assert (decoded.max(axis=1) == 0).all()
        np.testing.assert_allclose(decoded, exact(states(), head(), bias), atol=bound)
        tensors = {name: torch.from_numpy(array) for name, array in encoded.items()}
        np.testing.assert_allclose(encoding.decode_torch(tensors).numpy(), decoded, atol=1e-4)
        for name, tensor in encoding.encode_torch(torch.from_numpy(states())).items():
            assert tensor.numpy().dtype == encoding.fields[name].dtype
            np.testing.assert_array_equal(tensor.numpy(), encoded[name])

    def test_a_row_takes_the_width_and_not_the_classes(self) -> None:
        """Two bytes a number of the hidden state in f16, one and a scale in q8."""
        sizes = {kept_as: row_bytes(hidden_encoding(head(), kept_as=kept_as)) for kept_as in KEPT_AS}
        assert sizes == {"f32": 4 * WIDTH, "f16": 2 * WIDTH, "bf16": 2 * WIDTH, "q8": WIDTH + 4}

    def test_a_cap_and_a_scale_are_applied(self) -> None:
        """As models do that scale or cap their logits after the head."""
        encoding = hidden_encoding(head(), kept_as="f32", scale=0.5, softcap=3.0)
        z = 3 * np.tanh(states().astype(np.float64) @ head().T.astype(np.float64) * 0.5 / 3)
        expected = z - z.max(axis=1, keepdims=True)
        encoded = encoding.encode(states())
        np.testing.assert_allclose(encoding.decode(encoded), expected, atol=1e-5)
        tensors = {name: torch.from_numpy(array) for name, array in encoded.items()}
        np.testing.assert_allclose(encoding.decode_torch(tensors).numpy(), expected, atol=1e-5)

    @pytest.mark.parametrize("kept_as", KEPT_AS)
    def test_no_rows(self, kept_as: KeptAs) -> None:
        """An empty batch is one of no rows, in both libraries."""
        encoding = hidden_encoding(head(), kept_as=kept_as)
        assert encoding.decode(encoding.encode(states(0))).shape == (0, CLASSES)
        tensors = encoding.encode_torch(torch.from_numpy(states(0)))
        assert encoding.decode_torch(tensors).shape == (0, CLASSES)

    def test_a_row_of_zeros(self) -> None:
        """Has a scale of 0 in q8, and decodes to zeros."""
        encoding = hidden_encoding(head(), kept_as="q8")
        assert not encoding.decode(encoding.encode(np.zeros((1, WIDTH), np.float32))).any()

    def test_leading_axes_are_kept(self) -> None:
        """Rows of several views decode at once."""
        encoding = hidden_encoding(head(), kept_as="q8")
        encoded = {name: array.reshape(5, 6, -1) for name, array in encoding.encode(states()).items()}
        assert encoding.decode(encoded).shape == (5, 6, CLASSES)

    def test_it_pickles_without_what_it_derived(self) -> None:
        """For workers: the head travels once, as it is kept."""
        encoding = hidden_encoding(head("f16"))
        encoding.decode(encoding.encode(states()))
        raw = pickle.dumps(encoding)
        assert len(raw) < 1.1 * head("f16").nbytes / 2
        again = pickle.loads(raw)
        np.testing.assert_array_equal(again.decode(again.encode(states())), encoding.decode(encoding.encode(states())))


class TestHead:
    @pytest.mark.parametrize(("kind", "dtype"), [("f32", "<f4"), ("f16", "<f2"), ("bf16", "<u2")])
    def test_it_is_kept_without_loss_in_as_few_bytes_as_that_takes(self, kind: str, dtype: str) -> None:
        """A half-precision teacher's head takes half the bytes, and not a bit changes."""
        encoding = hidden_encoding(head(kind), kept_as="f32")
        assert encoding.head_CD.dtype.str == dtype
        again = make_encoding("hidden", classes=CLASSES, params=encoding.params, constants=encoding.constants)
        assert isinstance(again, Hidden)
        expected = states() @ head(kind).T
        np.testing.assert_array_equal(
            again.decode(again.encode(states())), expected - expected.max(axis=1, keepdims=True)
        )

    @pytest.mark.parametrize(
        ("params", "constants"),
        [
            ({"kept_as": "q4"}, {"head": head()}),
            ({"kept_as": 8}, {"head": head()}),
            ({"softcap": -1.0}, {"head": head()}),
            ({"scale": 0.0}, {"head": head()}),
            ({"scale": float("nan")}, {"head": head()}),
            ({"width": 3}, {"head": head()}),
            ({}, {}),
            ({}, {"bias": np.zeros(CLASSES, np.float32)}),
            ({}, {"head": head()[:5]}),
            ({}, {"head": head()[:, :0]}),
            ({}, {"head": head().astype(np.float64)}),
            ({}, {"head": np.full((CLASSES, 2), np.nan, np.float32)}),
            ({}, {"head": head(), "bias": np.zeros(3, np.float32)}),
            ({}, {"head": head(), "other": head()}),
        ],
    )
    def test_what_is_no_head_is_refused(self, params: dict[str, object], constants: dict[str, np.ndarray]) -> None:
        """Parameters and arrays may come from a damaged or hostile manifest."""
        with pytest.raises(UnknownEncodingError):
            make_encoding("hidden", classes=CLASSES, params=params, constants=constants)


class TestRefusals:
    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e5])
    def test_by_row(self, value: float) -> None:
        """NaN, Inf and values outside the range of float16, in both libraries."""
        encoding, rows = hidden_encoding(head()), states(4)
        rows[2, 7] = value
        for attempt in (lambda: encoding.encode(rows), lambda: encoding.encode_torch(torch.from_numpy(rows))):
            with pytest.raises(EncodingError) as refused:
                attempt()
            assert refused.value.context["rows"] == [2]

    def test_logits_in_place_of_hidden_states(self) -> None:
        """Rows of all classes are refused, with the width that is expected."""
        with pytest.raises(ShapeMismatchError, match="48 numbers"):
            hidden_encoding(head()).encode(np.zeros((2, CLASSES), np.float32))

    def test_a_job_that_says_something_else(self) -> None:
        """Unknown keys and kinds are named when the job is read."""
        assert parse_encoding({"name": "hidden", "kept_as": "q8"}).row_kind == "hidden_states"
        with pytest.raises(UnknownEncodingError, match="kept_as"):
            parse_encoding({"name": "hidden", "kept": "q8"})
        with pytest.raises(UnknownEncodingError, match="q4"):
            parse_encoding({"name": "hidden", "kept_as": "q4"})
        with pytest.raises(EncodingError, match="head of the teacher"):
            parse_encoding("hidden").make(classes=10)


class TestStore:
    def test_the_head_is_bound_by_its_digest(self, tmp_path: Path) -> None:
        """It is a file beside the rows; with one changed byte of it nothing is decoded."""
        encoding = hidden_encoding(head("f16"), kept_as="q8")
        assert write_states(tmp_path, encoding, encoding.encode(states())).sound
        batch = softlabels.open(tmp_path).batch([4, 2])
        np.testing.assert_allclose(batch.logits(), exact(states(), head("f16"))[[4, 2]], atol=0.6)
        np.testing.assert_allclose(batch.p(4.0).sum(axis=1), 1, atol=1e-5)
        path = tmp_path / "encoding" / "head.npy"
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
        with pytest.raises(ManifestError, match="not what was written"):
            softlabels.open(tmp_path)

    def test_a_hidden_state_that_is_not_finite_is_found(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A writer refuses it; `verify` checks the stored numbers too, without computing logits."""
        encoding = hidden_encoding(head("f16"))
        assert write_states(tmp_path / "good", encoding, {"targets": states().astype("<f2")}).sound
        broken = states().astype("<f2")
        broken[5, 1] = np.nan
        with pytest.raises(NonFiniteLogitsError):
            write_states(tmp_path / "refused", encoding, {"targets": broken})
        monkeypatch.setattr("softlabels.store.writer.check_values", lambda *given: None)  # as writers of 0.1.0
        report = write_states(tmp_path / "bad", encoding, {"targets": broken})
        assert "NaN or Inf" in str(report.faults[0])
        assert report.faults[0].rows == (5, 5)


def write_states(root: Path, encoding: Hidden, encoded: dict[str, np.ndarray]) -> Report:
    """A store of these rows as they are, verified."""
    plan = plan_store(
        name="h",
        samples=ROWS,
        ids=IdSpec(kind="int", dense_start=0),
        encoding=encoding,
        temperature=TemperatureSpec(default=2.0, captured=1.0, locked=False),
        mean="none",
        teachers=(),
        transfer_set=TransferSetSpec(name="x", source="x:y", arguments={}),
    )
    writer = StoreWriter.create(root, plan, encoding=encoding)
    with writer.claim(0) as claim:
        claim.commit(
            encoded=encoded,
            ids=np.arange(ROWS),
            fingerprints=sample_fingerprints(states()),
            audit=Audit((1.0,)).to_json(),
        )
    writer.finish()
    return verify(root)
