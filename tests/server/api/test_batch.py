"""POST /v1/stores/{name}/batch, asked over a real connection and read back by the safetensors library."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from softlabels.ids import from_fixed_bytes
from softlabels.wire import from_bytes


class TestRows:
    @pytest.mark.parametrize("name", ["dense", "halves", "sparse"])
    def test_rows_come_in_the_order_asked(self, ask: Any, stores: Any, tmp_path: Path, name: str) -> None:
        """Integer ids, dense or not, in any order and more than once; the reply's ids say whose rows they are."""
        rows = stores.rows[name]
        pick = np.array([3, 99, 0, 3, 3, 57])
        arrays, metadata = ask.binary(name, rows.ids[pick]).arrays(tmp_path)
        assert arrays["ids"].tolist() == rows.ids[pick].tolist()
        assert arrays["labels"].tolist() == rows.labels[pick].tolist()
        decoded = stores.manifests[name].make_encoding().decode(arrays)
        np.testing.assert_allclose(decoded, rows.logits_BC[pick], rtol=2**-8)
        assert metadata["rows"] == "6"

    def test_bytes_are_those_on_disk(self, ask: Any, stores: Any, tmp_path: Path) -> None:
        """What plain zarr-python reads from the store is what the server returns, to the bit."""
        group = zarr.open_group(str(stores.root / "halves"), mode="r")
        arrays, _ = ask.binary("halves", stores.rows["halves"].ids, "?fields=targets,labels,fingerprints").arrays(
            tmp_path
        )
        for field in ("targets", "labels", "fingerprints", "ids"):
            kept = np.asarray(group[field][:])  # type: ignore[index]
            assert (kept.dtype, kept.tobytes()) == (arrays[field].dtype, arrays[field].tobytes()), field

    def test_binary_and_json_ask_the_same(self, ask: Any, stores: Any) -> None:
        """Both bodies give the same bytes back."""
        ids = stores.rows["dense"].ids[::7]
        binary = ask.binary("dense", ids, "?fields=targets,fingerprints&temperature=2.5")
        spoken = {"ids": ids.tolist(), "fields": ["targets", "fingerprints"], "temperature": 2.5}
        assert binary.body == ask.batch("dense", spoken).body

    def test_string_ids(self, ask: Any, stores: Any, tmp_path: Path) -> None:
        """String ids travel as JSON and come back as fixed-width UTF-8."""
        rows = stores.rows["named"]
        asked = rows.ids[[5, 5, 80]].tolist()
        arrays, _ = ask.batch("named", {"ids": asked}).arrays(tmp_path)
        assert from_fixed_bytes(arrays["ids"]).tolist() == asked
        np.testing.assert_array_equal(arrays["targets"], rows.logits_BC[[5, 5, 80]])

    def test_the_own_reader_reads_it_too(self, ask: Any, stores: Any) -> None:
        """`softlabels.wire` and the safetensors library agree about the reply."""
        arrays, metadata = from_bytes(ask.batch("dense", {"ids": [1, 2]}).body)
        np.testing.assert_array_equal(arrays["targets"], stores.rows["dense"].logits_BC[[1, 2]])
        assert metadata["store"] == "dense"

    def test_threads_get_their_own_rows(self, ask: Any, stores: Any) -> None:
        """Eight clients at once, batches from one row to all: no client gets another's rows."""
        truth = stores.rows["dense"].logits_BC

        def many(seed: int) -> int:
            rng = np.random.default_rng(seed)
            for _ in range(40):
                ids = rng.integers(0, len(truth), size=rng.integers(1, 101))
                arrays, _ = from_bytes(ask.binary("dense", ids).body)
                np.testing.assert_array_equal(arrays["ids"], ids)
                np.testing.assert_array_equal(arrays["targets"], truth[ids])
            return 40

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(many, range(8))) == 320


class TestFields:
    @pytest.mark.parametrize(
        ("document", "expected"),
        [
            ({}, {"targets", "labels", "ids"}),
            ({"fields": None}, {"targets", "labels", "ids"}),
            ({"fields": ["targets"]}, {"targets", "ids"}),
            ({"fields": ["labels", "labels", "ids"]}, {"labels", "ids"}),
            ({"fields": ["fingerprints", "targets"]}, {"fingerprints", "targets", "ids"}),
            ({"fields": []}, {"ids"}),
        ],
    )
    def test_the_caller_chooses(self, ask: Any, tmp_path: Path, document: dict[str, Any], expected: set[str]) -> None:
        """Only what was asked for comes back, and always the ids."""
        arrays, _ = ask.batch("dense", {"ids": [4], **document}).arrays(tmp_path)
        assert set(arrays) == expected

    def test_a_store_without_labels_returns_none(self, ask: Any, tmp_path: Path) -> None:
        """Labels that were not asked for by name are left out where the store has none."""
        arrays, _ = ask.batch("unlabelled", {"ids": [4]}).arrays(tmp_path)
        assert set(arrays) == {"targets", "ids"}

    def test_asking_for_what_is_not_kept(self, ask: Any) -> None:
        """Labels asked for by name where there are none are an error, and so is a field that no store has."""
        assert ask.batch("unlabelled", {"ids": [4], "fields": ["labels"]}).problem() == (422, "unknown-field")
        answer = ask.batch("dense", {"ids": [4], "fields": ["logits"]})
        assert answer.problem() == (422, "unknown-field")
        assert "targets" in answer.json()["detail"]


class TestMetadata:
    def test_what_a_reply_says_of_itself(self, ask: Any, stores: Any, tmp_path: Path) -> None:
        """Store, version, encoding and temperatures come with every batch, as strings."""
        _, metadata = ask.batch("halves", {"ids": [1000], "temperature": 20}).arrays(tmp_path)
        assert metadata == {
            "format": "softlabels-batch/2",
            "store": "halves",
            "digest": stores.manifests["halves"].digest,
            "encoding": json.dumps({"name": "f16", "params": {}}),
            "classes": "7",
            "temperature": "20.0",
            "captured_temperature": "1.0",
            "locked": "false",
            "rows": "1",
        }

    def test_a_locked_store_says_so(self, ask: Any, tmp_path: Path) -> None:
        """Its temperature is the one that it was captured at."""
        _, metadata = ask.batch("locked", {"ids": [1], "temperature": 3}).arrays(tmp_path)
        assert (metadata["temperature"], metadata["captured_temperature"], metadata["locked"]) == ("3.0", "3.0", "true")

    def test_the_default_temperature_is_the_stores(self, ask: Any, tmp_path: Path) -> None:
        """A request without one gets the store's."""
        _, metadata = ask.batch("dense", {"ids": [1], "temperature": None}).arrays(tmp_path)
        assert metadata["temperature"] == "4.0"


class TestBadInput:
    @pytest.mark.parametrize(
        ("document", "status", "code"),
        [
            pytest.param({"ids": []}, 422, "empty-batch", id="empty batch"),
            pytest.param({"ids": [0, 5000]}, 404, "unknown-id", id="unknown id"),
            pytest.param({"ids": [-1]}, 404, "unknown-id", id="negative id"),
            pytest.param({"ids": ["0"]}, 422, "bad-ids", id="string id"),
            pytest.param({"ids": [0, "1"]}, 422, "bad-ids", id="mixed ids"),
            pytest.param({"ids": [0.0]}, 422, "bad-ids", id="float id"),
            pytest.param({"ids": [True, 1]}, 422, "bad-ids", id="boolean id"),
            pytest.param({"ids": [None]}, 422, "bad-ids", id="null id"),
            pytest.param({"ids": [[0], [1]]}, 422, "bad-ids", id="nested ids"),
            pytest.param({"ids": [2**63]}, 422, "bad-ids", id="id beyond int64"),
            pytest.param({"ids": [10**40]}, 422, "bad-ids", id="huge id"),
            pytest.param({"ids": 3}, 422, "bad-request", id="ids no list"),
            pytest.param({}, 422, "bad-request", id="no ids"),
            pytest.param([0, 1], 422, "bad-request", id="no object"),
            pytest.param("null", 422, "bad-request", id="null"),
            pytest.param('{"ids": [0', 422, "bad-request", id="cut JSON"),
            pytest.param("", 422, "bad-request", id="no body"),
            pytest.param("[" * 100_000, 422, "bad-request", id="deep JSON"),
            pytest.param('{"ids": [' + "9" * 5000 + "]}", 422, "bad-request", id="endless number"),
            pytest.param({"ids": [0], "temprature": 2}, 422, "bad-request", id="misspelt key"),
            pytest.param({"ids": [0], "fields": "targets"}, 422, "bad-request", id="fields no list"),
            pytest.param({"ids": [0], "fields": [1]}, 422, "bad-request", id="field no name"),
            pytest.param({"ids": [0], "transfer_set": 7}, 422, "bad-request", id="fingerprint no string"),
            pytest.param({"ids": [0], "digest": 7}, 422, "bad-request", id="digest no string"),
            pytest.param({"ids": [0], "temperature": 0}, 422, "bad-temperature", id="T of 0"),
            pytest.param({"ids": [0], "temperature": -1.5}, 422, "bad-temperature", id="T below 0"),
            pytest.param({"ids": [0], "temperature": "4"}, 422, "bad-temperature", id="T a string"),
            pytest.param({"ids": [0], "temperature": True}, 422, "bad-temperature", id="T true"),
            pytest.param({"ids": [0], "temperature": [4]}, 422, "bad-temperature", id="T a list"),
            pytest.param('{"ids": [0], "temperature": NaN}', 422, "bad-temperature", id="T NaN"),
            pytest.param('{"ids": [0], "temperature": Infinity}', 422, "bad-temperature", id="T infinite"),
            pytest.param('{"ids": [0], "temperature": 1e999}', 422, "bad-temperature", id="T overflowing"),
            pytest.param({"ids": [0], "transfer_set": "0" * 32 + "-100"}, 409, "fingerprint-mismatch", id="other data"),
            pytest.param({"ids": [0], "digest": "0" * 64}, 412, "store-changed", id="other version"),
        ],
    )
    def test_json(self, ask: Any, document: object, status: int, code: str) -> None:
        """Each has its status and code, and says what to do."""
        answer = ask.batch("dense", document)
        assert answer.problem() == (status, code)
        assert len(answer.json()["detail"]) > 20

    @pytest.mark.parametrize(
        ("ids", "status", "code"),
        [
            pytest.param(["größe/000.png", "missing"], 404, "unknown-id", id="unknown"),
            pytest.param(["größe/000.png" + "x" * 30], 404, "unknown-id", id="longer than any"),
            pytest.param([""], 422, "bad-ids", id="empty"),
            pytest.param(["größe/000.png\0"], 422, "bad-ids", id="NUL at the end"),
            pytest.param(["\ud800"], 422, "bad-ids", id="half a surrogate pair"),
            pytest.param([5], 422, "bad-ids", id="integer"),
            pytest.param(["a", 5], 422, "bad-ids", id="mixed"),
        ],
    )
    def test_string_ids(self, ask: Any, ids: list[Any], status: int, code: str) -> None:
        """Ids that a store of string ids cannot hold or does not."""
        assert ask.batch("named", {"ids": ids}).problem() == (status, code)

    @pytest.mark.parametrize(
        ("body", "query", "status", "code"),
        [
            pytest.param(b"", "", 422, "empty-batch", id="empty batch"),
            pytest.param(b"1234567", "", 422, "bad-ids", id="seven bytes"),
            pytest.param(bytes([255] * 8), "", 404, "unknown-id", id="unknown id"),
            pytest.param(bytes(7) + b"\x80", "", 404, "unknown-id", id="least id of all"),
            pytest.param(bytes(8), "?temperature=NaN", 422, "bad-temperature", id="T NaN"),
            pytest.param(bytes(8), "?temperature=warm", 422, "bad-temperature", id="T a word"),
            pytest.param(bytes(8), "?temperature=", 422, "bad-temperature", id="T empty"),
            pytest.param(bytes(8), "?temperature=0", 422, "bad-temperature", id="T of 0"),
            pytest.param(bytes(8), "?fields=", 422, "unknown-field", id="field empty"),
            pytest.param(bytes(8), "?fields=targets,logits", 422, "unknown-field", id="unknown field"),
            pytest.param(bytes(8), "?field=targets", 422, "bad-request", id="misspelt key"),
            pytest.param(bytes(8), "?ids=3", 422, "bad-request", id="ids twice"),
            pytest.param(bytes(8), "?temperature=2&temperature=3", 422, "bad-request", id="key twice"),
            pytest.param(bytes(8), "?transfer_set=abc", 409, "fingerprint-mismatch", id="other data"),
            pytest.param(bytes(8), "?digest=abc", 412, "store-changed", id="other version"),
        ],
    )
    def test_binary(self, ask: Any, body: bytes, query: str, status: int, code: str) -> None:
        """The same for binary ids and query parameters."""
        path = f"/v1/stores/dense/batch{query}"
        assert ask("POST", path, body=body, content_type="application/octet-stream").problem() == (status, code)

    def test_binary_ids_for_a_store_of_strings(self, ask: Any) -> None:
        """Its ids are strings, and the answer says so."""
        assert ask.binary("named", np.arange(3)).problem() == (422, "bad-ids")

    def test_many_long_strings_cost_no_memory(self, serve: Any, stores: Any) -> None:
        """One long id beside many short is refused before NumPy gives each the room of the longest: 240 GB here."""
        ask = serve(stores.root)
        ids = ["a"] * 60_000 + ["b" * 1_000_000]
        assert ask.batch("named", {"ids": ids}).problem() == (404, "unknown-id")

    def test_query_parameters_beside_json(self, ask: Any) -> None:
        """They would be skipped in silence, so they are refused."""
        answer = ask(
            "POST", "/v1/stores/dense/batch?temperature=2", body=b'{"ids": [0]}', content_type="application/json"
        )
        assert answer.problem() == (422, "bad-request")

    @pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", ""])
    def test_another_media_type(self, ask: Any, media_type: str) -> None:
        """The body is not guessed at."""
        answer = ask("POST", "/v1/stores/dense/batch", body=b'{"ids": [0]}', content_type=media_type)
        assert answer.problem() == (415, "bad-request")
        assert "application/json" in answer.json()["detail"]

    def test_a_media_type_with_parameters(self, ask: Any) -> None:
        """`application/json; charset=utf-8` is JSON."""
        answer = ask(
            "POST", "/v1/stores/dense/batch", body=b'{"ids": [0]}', content_type="Application/JSON; charset=utf-8"
        )
        assert answer.status == 200

    def test_an_unknown_store(self, ask: Any) -> None:
        """404 with the name that was probably meant."""
        answer = ask.batch("dens", {"ids": [0]})
        assert answer.problem() == (404, "unknown-store")
        assert "'dense'" in answer.json()["detail"]

    def test_a_temperature_that_the_store_is_locked_against(self, ask: Any) -> None:
        """409, with the temperature that can be had."""
        answer = ask.batch("locked", {"ids": [0], "temperature": 4})
        assert answer.problem() == (409, "temperature-locked")
        assert answer.json()["context"] == {"captured": 3.0, "wanted": 4.0}

    def test_the_right_transfer_set_passes(self, ask: Any, stores: Any) -> None:
        """The store's own fingerprint is no mismatch."""
        own = stores.manifests["dense"].transfer_set.fingerprint
        assert ask.batch("dense", {"ids": [0], "transfer_set": own}).status == 200


class TestPinnedVersion:
    def test_the_right_version_passes(self, ask: Any, stores: Any) -> None:
        """As `digest` or in If-Match, quoted as an entity tag."""
        digest = stores.manifests["dense"].digest
        assert ask.batch("dense", {"ids": [0], "digest": digest}).status == 200
        assert ask.batch("dense", {"ids": [0]}, if_match=f'"other", "{digest}"').status == 200
        assert ask.batch("dense", {"ids": [0]}, if_match="*").status == 200

    def test_another_version_is_refused(self, ask: Any, stores: Any) -> None:
        """412 tells the version there is."""
        answer = ask.batch("dense", {"ids": [0]}, if_match='"abc"')
        assert answer.problem() == (412, "store-changed")
        assert answer.json()["context"]["store"] == stores.manifests["dense"].digest


class TestUnfinishedStore:
    def test_committed_rows_can_be_had(self, ask: Any, stores: Any, tmp_path: Path) -> None:
        """Two of four shards are committed: 64 rows."""
        arrays, _ = ask.batch("begun", {"ids": [63, 0]}).arrays(tmp_path)
        np.testing.assert_array_equal(arrays["targets"], stores.rows["begun"].logits_BC[[63, 0]])

    def test_other_rows_are_an_error(self, ask: Any) -> None:
        """Never zeros, also when only one row of many is not there."""
        assert ask.batch("begun", {"ids": [0, 64]}).problem() == (409, "rows-not-committed")

    def test_it_has_no_fingerprint_to_match(self, ask: Any) -> None:
        """Before every row is committed the data cannot be compared."""
        assert ask.batch("begun", {"ids": [0], "transfer_set": "abc"}).problem() == (409, "fingerprint-mismatch")


class TestLimits:
    def test_too_many_ids(self, serve: Any, stores: Any) -> None:
        """413 says how many may be asked for, in JSON and binary alike; exactly so many pass."""
        ask = serve(stores.root, max_batch_ids=10)
        for answer in (ask.batch("dense", {"ids": [0] * 11}), ask.binary("dense", np.zeros(11, np.int64))):
            assert answer.problem() == (413, "batch-too-large")
            assert answer.json()["context"] == {"most": 10}
        assert ask.batch("dense", {"ids": [0] * 10}).status == 200

    def test_too_large_a_reply(self, serve: Any, stores: Any) -> None:
        """Rows count by the fields asked for: 28 bytes of targets, 4 of labels, 8 of ids, 16 of fingerprints."""
        ask = serve(stores.root, max_reply_bytes=400)
        assert ask.batch("dense", {"ids": [0] * 10}).status == 200
        answer = ask.batch("dense", {"ids": [0] * 10, "fields": ["targets", "labels", "fingerprints"]})
        assert answer.problem() == (413, "batch-too-large")
        assert answer.json()["context"] == {"most": 7}


class TestDamage:
    def test_a_flipped_bit_is_an_error(self, serve: Any, write: Any, rows_of: Any, tmp_path: Path) -> None:
        """A chunk whose checksum fails is never returned; other chunks still are."""
        write(tmp_path / "torn", rows_of())
        shard = tmp_path / "torn" / "targets" / "c" / "0" / "0"
        damaged = bytearray(shard.read_bytes())
        damaged[5] ^= 1
        shard.write_bytes(damaged)
        ask = serve(tmp_path)
        assert ask.batch("torn", {"ids": [0]}).problem() == (500, "checksum-mismatch")
        assert ask.batch("torn", {"ids": [8]}).status == 200
        assert ask.batch("torn", {"ids": [7]}).problem() == (500, "checksum-mismatch")
