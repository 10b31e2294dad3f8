"""Truncated rows and their tail rules."""

from __future__ import annotations

import numpy as np
import pytest

from softlabels.encodings import TopK, make_encoding, row_bytes
from softlabels.errors import EncodingError, UnknownEncodingError

LOGITS = np.log(np.array([[0.5, 0.05, 0.3, 0.05, 0.1]]))


class TestTopK:
    def test_the_largest_are_kept_by_id(self) -> None:
        """Ids, log-probabilities and the exact tail mass are in three arrays."""
        encoded = TopK(classes=5, k=2).encode(LOGITS)
        assert encoded["class_ids"].tolist() == [[0, 2]]
        assert encoded["class_ids"].dtype == np.uint16
        assert np.allclose(np.exp(encoded["values"].astype(float)), [[0.5, 0.3]], rtol=1e-3)
        assert encoded["tail_mass"][0, 0] == pytest.approx(0.2, rel=1e-6)

    def test_uniform_spreads_the_tail(self) -> None:
        """Three classes of 0.2/3."""
        encoding = TopK(classes=5, k=2, tail="uniform")
        p = np.exp(encoding.decode(encoding.encode(LOGITS)).astype(float))
        assert np.allclose(p, [[0.5, 0.2 / 3, 0.3, 0.2 / 3, 0.2 / 3]], rtol=1e-3)

    def test_renormalise_makes_the_tail_impossible(self) -> None:
        """-inf outside, and the rest in proportion."""
        encoding = TopK(classes=5, k=2, tail="renormalise")
        decoded = encoding.decode(encoding.encode(LOGITS))[0]
        assert (decoded[[1, 3, 4]] == -np.inf).all()
        assert np.exp(decoded[0] - decoded[2]) == pytest.approx(5 / 3, rel=1e-3)

    def test_ghost_keeps_the_tail_as_one_class(self) -> None:
        """`entries` gives k classes and the tail; all classes come back as for uniform."""
        encoding = TopK(classes=5, k=2, tail="ghost")
        encoded = encoding.encode(LOGITS)
        ids, logp, tail = encoding.entries(encoded)
        assert ids.tolist() == [[0, 2]]
        assert np.exp(logp).sum() + np.exp(tail[0, 0]) == pytest.approx(1, rel=1e-3)
        assert np.array_equal(encoding.decode(encoded), TopK(classes=5, k=2).decode(encoded))

    @pytest.mark.parametrize(("classes", "dtype", "size"), [(65_536, "<u2", 44), (65_537, "<u4", 64)])
    def test_ids_are_as_wide_as_they_must_be(self, classes: int, dtype: str, size: int) -> None:
        """The last class decodes correctly on both sides of 65,536 classes."""
        encoding = TopK(classes=classes, k=10)
        rows = np.zeros((1, classes), np.float32)
        rows[0, -1] = 9
        encoded = encoding.encode(rows)
        assert encoded["class_ids"].dtype == np.dtype(dtype)
        assert encoded["class_ids"][0, 0] == classes - 1
        assert row_bytes(encoding) == size

    def test_it_is_locked(self) -> None:
        """A truncated row exists at one temperature."""
        assert not TopK(classes=5, k=2).retemperable

    def test_all_classes_may_be_kept(self) -> None:
        """k = C leaves no tail."""
        encoding = TopK(classes=5, k=5)
        encoded = encoding.encode(LOGITS)
        assert encoded["tail_mass"][0, 0] == 0
        assert np.allclose(encoding.decode(encoded), LOGITS, atol=2e-3)

    def test_what_float16_cannot_hold_is_refused(self) -> None:
        """A kept class 10⁶ below."""
        with pytest.raises(EncodingError, match="65,504"):
            TopK(classes=3, k=3).encode(np.array([[0.0, -1e6, -1.0]]))

    @pytest.mark.parametrize("params", [{"k": 0}, {"k": 6}, {"k": 2, "tail": "zero"}])
    def test_parameters_out_of_range_are_refused(self, params: dict[str, object]) -> None:
        """k from 1 to C, and a rule that exists."""
        with pytest.raises(UnknownEncodingError):
            make_encoding("topk", classes=5, params=params)
