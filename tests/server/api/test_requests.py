"""What a batch request is read as, whatever bytes come."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softlabels.errors import RequestError, SoftLabelsError
from softlabels_server import Settings, StoreFolder
from softlabels_server.api.batch import plan_batch
from softlabels_server.api.requests import BatchRequest, BatchSelection, from_binary, from_json
from softlabels_server.catalog import ServedStore
from softlabels_server.fast_path.socket_writer import as_view

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
REQUESTS = st.fixed_dictionaries(
    {"ids": st.lists(st.integers(-5, 120) | st.text(max_size=3), max_size=5) | ANY_JSON},
    optional={
        "fields": st.lists(st.sampled_from(["targets", "labels", "ids", "x"])) | ANY_JSON,
        "temperature": st.floats() | ANY_JSON,
        "transfer_set": ANY_JSON,
        "digest": ANY_JSON,
    },
)


@pytest.fixture(scope="module")
def served(stores: Any) -> dict[str, ServedStore]:
    """One store of integer ids, one of strings."""
    folder = StoreFolder(stores.root)
    return {name: folder.get(name) for name in ("dense", "named")}


def blames_the_caller(error: SoftLabelsError) -> bool:
    """Whether its status says that the request is at fault, and not the server."""
    return 400 <= error.status < 500


def answer(body: bytes, store: ServedStore) -> int | SoftLabelsError:
    """How many rows the reply has, or why there is none."""
    try:
        request = from_json(body, store.manifest, Settings())
        buffers, _ = plan_batch(store, request, Settings()).buffers()
    except SoftLabelsError as error:
        return error
    return len(request.ids) if sum(len(as_view(buffer)) for buffer in buffers) > 0 else -1


class TestJson:
    @given(document=REQUESTS | ANY_JSON, name=st.sampled_from(["dense", "named"]))
    def test_any_json_is_answered_or_refused(self, served: dict[str, ServedStore], document: Any, name: str) -> None:
        """Nothing but the product's own errors comes out, and none of the kind that blames the server."""
        found = answer(json.dumps(document).encode(), served[name])
        assert blames_the_caller(found) if isinstance(found, SoftLabelsError) else found == len(document["ids"])

    @given(body=st.binary(max_size=64) | st.text(alphabet='{}[]":,ids 0123.eE-NaN\\u', max_size=64).map(str.encode))
    def test_any_bytes_are_answered_or_refused(self, served: dict[str, ServedStore], body: bytes) -> None:
        """Also those that are no JSON."""
        found = answer(body, served["dense"])
        assert blames_the_caller(found) if isinstance(found, SoftLabelsError) else found > 0

    def test_what_is_left_out_is_left_open(self, served: dict[str, ServedStore]) -> None:
        """Only ids are needed."""
        request = from_json(b'{"ids": [2, 1]}', served["dense"].manifest, Settings())
        assert request.ids.tolist() == [2, 1]
        assert request.options == BatchRequest(ids=[2, 1])

    @pytest.mark.parametrize(
        ("body", "path"),
        [
            (b'{"ids": [1], "spans": [[0, true]]}', "`spans[0][1]`"),
            (b'{"ids": [1], "views": [9223372036854775808]}', "`views[0]`"),
            (b'{"ids": [1], "fields": ["targets", 3]}', "`fields[1]`"),
            (b'{"ids": [1], "decode": "bits"}', "`decode`"),
            (b'{"ids": [1, 2], "views": [0]}', "`views` has 1 entries for 2 ids"),
            (b'{"ids": [1], "temprature": 2}', "did you mean `temperature`"),
            (b'{"ids": [1], "\\ud800": 2}', "surrogates not allowed"),
        ],
    )
    def test_the_message_names_the_field(self, served: dict[str, ServedStore], body: bytes, path: str) -> None:
        """By its path in the body."""
        with pytest.raises(RequestError, match=re.escape(path)):
            from_json(body, served["dense"].manifest, Settings())


class TestBinary:
    @given(
        body=st.binary(max_size=40), query=st.text(max_size=30) | st.sampled_from(["fields=targets", "temperature=2"])
    )
    def test_any_bytes_are_read_or_refused(self, body: bytes, query: str) -> None:
        """Body and query string."""
        try:
            found: BatchSelection | SoftLabelsError = from_binary(body, query, Settings())
        except SoftLabelsError as error:
            found = error
        assert blames_the_caller(found) if isinstance(found, SoftLabelsError) else found.ids.tobytes() == body

    def test_the_query_says_the_rest(self) -> None:
        """Fields apart by commas, the temperature as a number, digests as they are."""
        request = from_binary(bytes(8), "fields=targets,ids&temperature=2.5&transfer_set=a-1&digest=b", Settings())
        assert request.ids.tolist() == [0]
        assert request.options.fields == ["targets", "ids"]
        assert (request.options.temperature, request.options.transfer_set, request.options.digest) == (2.5, "a-1", "b")


class TestPlan:
    def test_the_size_is_known_beforehand(self, served: dict[str, ServedStore]) -> None:
        """`reply_bytes` is what the arrays come to, without their checksum."""
        plan = plan_batch(served["dense"], from_binary(bytes(40), "", Settings()), Settings())
        assert plan.reply_bytes == 5 * (7 * 4 + 4 + 8)
        _, *arrays, checksum = plan.buffers()[0]
        assert sum(len(as_view(array)) for array in arrays) == plan.reply_bytes
        assert len(as_view(checksum)) == 4

    def test_rows_are_not_joined_into_one_piece(self, served: dict[str, ServedStore]) -> None:
        """One buffer a field behind the header, and the checksum, so that nothing is copied before it is sent."""
        plan = plan_batch(served["dense"], from_binary(bytes(40), "", Settings()), Settings())
        header, *arrays = plan.buffers()[0]
        assert isinstance(header, bytes)
        assert [type(buffer) for buffer in arrays] == [np.ndarray] * 4
