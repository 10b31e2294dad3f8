"""Reply formats other than encoded safetensors: Arrow, .npy, JSON, and rows that the server decodes."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.softmath import soften
from softlabels_server.api.replies import MEDIA_TYPES, accepted_format

ARROW = MEDIA_TYPES["arrow"]


class TestAccept:
    @pytest.mark.parametrize(
        ("accept", "expected"),
        [
            (None, "safetensors"),
            ("*/*", "safetensors"),
            ("application/json", "json"),
            ("application/json;q=0.5, application/x-npy", "npy"),
            ("application/vnd.apache.arrow.stream, */*;q=0.1", "arrow"),
            ("application/*;q=0.2, application/json;q=0.9", "json"),
            ("application/json;q=0, */*", "safetensors"),
            ("text/html, application/json;q=0.1", "json"),
        ],
    )
    def test_the_preferred_format(self, accept: str | None, expected: str) -> None:
        """The available format of the highest quality; safetensors where the client has no preference."""
        assert accepted_format(accept) == expected

    def test_nothing_acceptable(self, ask: Any) -> None:
        """406, and the available formats."""
        answer = ask.batch("dense", {"ids": [1]}, accept="text/html")
        assert answer.problem() == (406, "bad-request")
        assert ARROW in answer.json()["detail"]


class TestJson:
    def test_arrays_as_lists(self, ask: Any, stores: Any) -> None:
        """Metadata and arrays as lists, string ids as strings."""
        rows = stores.rows["named"]
        document = ask.batch("named", {"ids": rows.ids[[3, 1]].tolist()}, accept="application/json").json()
        assert document["arrays"]["ids"] == rows.ids[[3, 1]].tolist()
        np.testing.assert_allclose(document["arrays"]["targets"], rows.logits_BC[[3, 1]])
        assert document["metadata"]["rows"] == "2"


class TestNpy:
    def test_one_array(self, ask: Any, stores: Any) -> None:
        """As `numpy.load` reads it."""
        answer = ask.batch("dense", {"ids": [5, 2], "fields": ["targets"]}, accept="application/x-npy")
        found = np.load(io.BytesIO(answer.body), allow_pickle=False)
        np.testing.assert_array_equal(found, stores.rows["dense"].logits_BC[[5, 2]])
        assert int(answer.headers["content-length"]) == len(answer.body)

    def test_two_arrays_do_not_fit(self, ask: Any) -> None:
        """Name one."""
        assert ask.batch("dense", {"ids": [5]}, accept="application/x-npy").problem() == (422, "bad-request")


class TestArrow:
    def test_a_column_an_array(self, ask: Any, stores: Any) -> None:
        """Rows as fixed-size lists, metadata beside them."""
        pa = pytest.importorskip("pyarrow")
        answer = ask.batch("dense", {"ids": [5, 2]}, accept=ARROW)
        with pa.ipc.open_stream(io.BytesIO(answer.body)) as reader:
            table = reader.read_all()
        assert table["ids"].to_pylist() == [5, 2]
        np.testing.assert_array_equal(np.array(table["targets"].to_pylist()), stores.rows["dense"].logits_BC[[5, 2]])
        assert table.schema.metadata[b"digest"].decode() == stores.manifests["dense"].digest

    def test_without_pyarrow(self, ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """406, naming the extra."""
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        answer = ask.batch("dense", {"ids": [5]}, accept=ARROW)
        assert answer.status == 406
        assert "softlabels[arrow]" in answer.json()["detail"]


class TestDecoding:
    @pytest.mark.parametrize("temperature", [1.0, 2.5])
    def test_at_any_temperature(self, ask: Any, stores: Any, tmp_path: Path, temperature: float) -> None:
        """`p` sums to 1 and is the softmax of `logits`; both are float32."""
        truth = soften(stores.rows["dense"].logits_BC[[7, 1]], temperature=temperature)
        for decode in ("logits", "p"):
            asked = {"ids": [7, 1], "decode": decode, "temperature": temperature, "fields": ["targets", "labels"]}
            arrays, metadata = ask.batch("dense", asked).arrays(tmp_path)
            assert set(arrays) == {decode, "labels", "ids"}
            assert (arrays[decode].dtype, metadata["decode"]) == (np.dtype("f4"), decode)
            p = arrays["p"] if decode == "p" else soften(arrays["logits"], temperature=1.0)
            np.testing.assert_allclose(p, truth, atol=1e-6)

    def test_locked_targets(self, ask: Any) -> None:
        """409 at another temperature than theirs."""
        asked = {"ids": [7], "decode": "p", "temperature": 2.0}
        assert ask.batch("locked", asked).problem() == (409, "temperature-locked")

    def test_a_way_that_there_is_not(self, ask: Any) -> None:
        """Refused, with those there are."""
        assert ask.batch("dense", {"ids": [7], "decode": "softmax"}).problem() == (422, "bad-request")
