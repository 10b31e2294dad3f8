"""Adversarial rows at critical class counts: each row is encoded within the stated bound, or refused by number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from softlabels.encodings import (
    Basis,
    Encoding,
    Hidden,
    Quantised,
    Sampled,
    TopK,
    hidden_encoding,
    make_encoding,
    rng_keys,
    row_bytes,
)
from softlabels.encodings.basis_learning import build_basis, spectrum_of
from softlabels.encodings.hidden import KEPT_AS
from softlabels.encodings.quantised import FLOOR
from softlabels.errors import EncodingError

CLASS_COUNTS = (2, 10, 1_000, 14_000, 21_841, 32_768, 65_536, 65_537, 131_073, 262_144)
"""Both sides of every change in id width, and the sizes of real label sets and vocabularies."""

Rows = NDArray[np.float32]


def usual(classes: int) -> Rows:
    return np.random.default_rng(classes).normal(0, 2, size=(2, classes)).astype(np.float32)


def one_hot(classes: int) -> Rows:
    rows = np.full((2, classes), -80.0, dtype=np.float32)
    rows[0, 0] = rows[1, classes - 1] = 0
    return rows


def uniform(classes: int) -> Rows:
    return np.zeros((2, classes), dtype=np.float32)


def ties(classes: int) -> Rows:
    return -(np.arange(2 * classes).reshape(2, classes) % 3).astype(np.float32)


def minus_infinity(classes: int) -> Rows:
    rows = usual(classes)
    rows[:, classes // 2] = -np.inf
    return rows


def denormals(classes: int) -> Rows:
    return -(np.arange(classes, dtype=np.float32) * np.float32(1e-45))[None]


def huge(classes: int) -> Rows:
    rows = usual(classes)
    rows[:, 0] = 1e30
    return rows


def one_far_below(classes: int) -> Rows:
    rows = usual(classes)
    rows[:, -1] = -1e4
    return rows


def not_a_number(classes: int) -> Rows:
    rows = usual(classes)
    rows[1, 0] = np.nan
    return rows


def infinity(classes: int) -> Rows:
    rows = usual(classes)
    rows[1, 0] = np.inf
    return rows


KINDS = (usual, one_hot, uniform, ties, minus_infinity, denormals, huge, one_far_below)
UNSOUND = (not_a_number, infinity)
PLAIN = ("f32", "f16", "bf16", "q8", "q6", "q5", "q4", "q3", "q2")
PLAIN_OF_MANY = ("f32", "f16", "bf16", "q8", "q3")


def encodings(classes: int) -> list[Encoding]:
    """One encoding of each kind that this number of classes allows."""
    k = min(classes, 12)
    found = [make_encoding(name, classes=classes) for name in (PLAIN if classes <= 1_000 else PLAIN_OF_MANY)]
    found += [TopK(classes=classes, k=k, tail=tail) for tail in ("uniform", "ghost", "renormalise")]
    found.append(Sampled(classes=classes, head=min(classes - 1, 5), draws=20))
    if classes <= 1_000:  # with a head of ones and zeros, hidden states are logits
        found += [hidden_encoding(np.eye(classes, dtype=np.float32), kept_as=kept_as) for kept_as in KEPT_AS]
    if 10 <= classes <= 1_000:
        found += [learnt(classes, residual_bits) for residual_bits in (0, 4)]
    return found


def learnt(classes: int, residual_bits: int) -> Basis:
    """A basis from rows of low rank."""
    rng = np.random.default_rng(0)
    pilot = rng.normal(size=(200, 6)) @ rng.normal(size=(6, classes)) + 0.1 * rng.normal(size=(200, classes))
    size = 24 + (classes * residual_bits) // 8
    basis = build_basis(spectrum_of(pilot), row_bytes=size, head=min(4, classes - 1), residual_bits=residual_bits)
    assert basis is not None
    return basis


def attempt(
    encoding: Encoding, rows: Rows, keys: NDArray[np.uint64]
) -> tuple[dict[str, NDArray[Any]] | None, list[int]]:
    """The encoded rows, or None and the rows that were refused."""
    try:
        return encoding.encode(rows, keys_B=keys), []
    except EncodingError as error:
        return None, error.context["rows"]


def shifted(rows: Rows) -> Rows:
    """Rows as an encoding receives them: the largest at 0."""
    moved: Rows = rows - rows.max(axis=1, keepdims=True)
    return moved


@pytest.mark.parametrize("classes", CLASS_COUNTS)
class TestEveryEncoding:
    @pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
    def test_a_row_is_kept_within_the_bound_or_refused(self, classes: int, kind: Callable[[int], Rows]) -> None:
        """NumPy encodes within the encoding's stated bounds; torch accepts and refuses the same rows."""
        rows = shifted(kind(classes))
        keys = rng_keys("adversarial", np.arange(len(rows)))
        for encoding in encodings(classes):
            # What is far below or impossible may be refused, anything tamer not.
            may_refuse = kind in (minus_infinity, huge, one_far_below)
            encoded, refused = attempt(encoding, rows, keys)
            if encoded is None:
                assert may_refuse, (encoding.name, refused)
                assert refused, encoding.name
                with pytest.raises(EncodingError):
                    encoding.encode_torch(torch.from_numpy(rows), keys_B=keys)
                continue
            decoded = encoding.decode(encoded)
            assert decoded.shape == rows.shape
            assert decoded.dtype == np.float32
            check_bound(encoding, rows.astype(np.float64), encoded, decoded.astype(np.float64))
            check_torch(encoding, rows, keys, encoded, decoded)

    @pytest.mark.parametrize("kind", UNSOUND, ids=lambda kind: kind.__name__)
    def test_rows_that_are_no_distributions_are_refused(self, classes: int, kind: Callable[[int], Rows]) -> None:
        """NaN and +inf, by row number, in both libraries."""
        rows = kind(classes)
        keys = rng_keys("adversarial", np.arange(len(rows)))
        for encoding in encodings(classes):
            with pytest.raises(EncodingError) as refused:
                encoding.encode(rows, keys_B=keys)
            assert refused.value.context["rows"] == [1]
            with pytest.raises(EncodingError) as refused:
                encoding.encode_torch(torch.from_numpy(rows), keys_B=keys)
            assert refused.value.context["rows"] == [1]


def check_torch(
    encoding: Encoding, rows: Rows, keys: NDArray[np.uint64], encoded: dict[str, NDArray[Any]], decoded: Rows
) -> None:
    """Torch decodes to the same bits and encodes to the same bytes, but for values on a rounding edge."""
    tensors = {name: torch.from_numpy(array.copy()) for name, array in encoded.items()}
    again = encoding.decode_torch(tensors).numpy()
    assert np.array_equal(again.view(np.int32) & 0x7FFFFFFF, decoded.view(np.int32) & 0x7FFFFFFF), encoding.name
    assert np.array_equal(again, decoded), encoding.name
    for name, tensor in encoding.encode_torch(torch.from_numpy(rows), keys_B=keys).items():
        assert tensor.numpy().dtype == encoding.fields[name].dtype
        differing = (tensor.numpy() != encoded[name]).mean()
        # A basis of hardly any bytes in a row shows a single flipped bit as a large share.
        assert differing <= (0.1 if encoding.name == "basis" else 0.01), (encoding.name, name)


def check_bound(
    encoding: Encoding, z: NDArray[np.float64], encoded: dict[str, NDArray[Any]], decoded: NDArray[np.float64]
) -> None:
    """The bounds in each encoding's module docstring."""
    for name, array in encoded.items():
        assert array.shape == (len(z), *encoding.fields[name].row_shape)
    assert sum(array.nbytes for array in encoded.values()) == len(z) * row_bytes(encoding)
    if isinstance(encoding, Quantised):
        check_quantised(encoding, z, encoded["targets"], decoded)
    elif isinstance(encoding, TopK):
        check_topk(encoding, z, decoded, encoded)
    elif isinstance(encoding, Sampled):
        check_sampled(encoding, z, decoded)
    elif isinstance(encoding, Basis):
        assert np.isfinite(decoded).all()
        assert (decoded.argmax(axis=1) == z.argmax(axis=1)).all() or (decoded.max(axis=1) == 0).all()
    elif isinstance(encoding, Hidden):
        check_hidden(encoding, z, decoded)
    else:
        relative = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8}[encoding.name]
        finite = np.isfinite(z)
        error = np.abs(decoded[finite] - z[finite])
        assert (error <= relative * np.abs(z[finite]) + 2.0**-25).all(), encoding.name
        assert (decoded[~finite] == -np.inf).all()


def check_hidden(encoding: Hidden, z: NDArray[np.float64], decoded: NDArray[np.float64]) -> None:
    step = np.abs(z).max(axis=1, keepdims=True) / 127
    relative = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8, "q8": 0.0}[encoding.kept_as]
    half_steps = step * 0.5001 if encoding.kept_as == "q8" else 0.0
    # Twice: the row's largest is brought to 0 after decoding.
    bound = 2 * (relative * np.abs(z) + half_steps) + 2.0**-23 * np.abs(z).max() + 2.0**-25
    assert (np.abs(decoded - z) <= bound).all(), encoding.kept_as
    assert (decoded.max(axis=1) == 0).all()


def check_quantised(
    encoding: Quantised, z: NDArray[np.float64], packed: NDArray[np.uint8], decoded: NDArray[np.float64]
) -> None:
    header = np.ascontiguousarray(packed[:, :4]).view("<f2").astype(np.float64)
    lo, step = header[:, :1], header[:, 1:]
    assert (lo >= -97).all()
    slack = 2.0**-20 * np.abs(lo) + 2.0**-24
    z = np.maximum(z, -FLOOR)
    error = np.abs(decoded - np.maximum(z, lo))
    order = np.argsort(-z, axis=1, kind="stable")
    head = order[:, : encoding.head]
    assert (np.take_along_axis(error, head, 1) <= np.abs(lo) * 2.0 ** -(encoding.bits + 8) + slack).all()
    rest = order[:, encoding.head :]
    assert (np.take_along_axis(error, rest, 1) <= step / 2 * 1.0001 + slack).all()
    top = np.take_along_axis(z, rest[:, :1], 1)
    widest = 1.003 * (top - lo) / ((1 << encoding.bits) - 1)
    assert (step <= widest + 2.0**-24 + 0.003 * np.abs(lo) / ((1 << encoding.bits) - 1)).all()


def check_topk(
    encoding: TopK, z: NDArray[np.float64], decoded: NDArray[np.float64], encoded: dict[str, NDArray[Any]]
) -> None:
    logp = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    ids = encoded["class_ids"].astype(np.int64)
    assert all(len(set(row)) == encoding.k for row in ids.tolist())
    kept, exact = np.take_along_axis(decoded, ids, 1), np.take_along_axis(logp, ids, 1)
    finite = np.isfinite(exact)
    assert (np.abs(kept[finite] - exact[finite]) <= 2.0**-11 * np.abs(exact[finite]) + 2.0**-21).all()
    p = np.exp(logp)
    np.put_along_axis(p, ids, 0.0, 1)
    assert np.allclose(encoded["tail_mass"][:, 0], p.sum(axis=1), rtol=1e-5, atol=1e-30)
    total = np.exp(decoded).sum(axis=1)
    if encoding.tail != "renormalise":
        assert np.allclose(total, 1, atol=0.01)


def check_sampled(encoding: Sampled, z: NDArray[np.float64], decoded: NDArray[np.float64]) -> None:
    q = np.exp(decoded)
    assert np.allclose(q.sum(axis=1), 1, atol=1e-5)
    assert ((q > 0).sum(axis=1) <= encoding.head + encoding.draws).all()
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    assert (q[p == 0] == 0).all()
