"""GET /health, /v1/stores and /v1/stores/{name}."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels import __version__
from softlabels.documents import seal
from softlabels.manifest import Manifest
from softlabels.wire import from_bytes


class TestHealth:
    def test_it_says_what_serves(self, ask: Any) -> None:
        """Status, version and how many stores there are."""
        answer = ask("GET", "/health")
        assert answer.status == 200
        assert answer.json() == {"status": "ok", "version": __version__, "stores": 7}


class TestList:
    def test_every_store_is_listed(self, ask: Any, stores: Any) -> None:
        """In order of their names, with what a client needs to choose."""
        listed = ask("GET", "/v1/stores").json()["stores"]
        assert [entry["name"] for entry in listed] == sorted(stores.rows)
        by_name = {entry["name"]: entry for entry in listed}
        assert by_name["halves"] == {
            "name": "halves",
            "rows": 100,
            "classes": 7,
            "encoding": "f16",
            "digest": stores.manifests["halves"].digest,
            "finished": True,
            "url": f"{ask.base}/halves",
        }
        assert by_name["begun"]["finished"] is False

    def test_a_store_of_a_newer_format_is_listed_with_the_reason(
        self, serve: Any, write: Any, rows_of: Any, tmp_path: Path
    ) -> None:
        """It is there, so it is not left out; asking for it says to upgrade."""
        write(tmp_path / "good", rows_of())
        write(tmp_path / "newer", rows_of())
        document = {"format": "softlabels-store", "format_version": 99}
        (tmp_path / "newer" / "manifest.json").write_bytes(seal(document))
        ask = serve(tmp_path)
        good, newer = ask("GET", "/v1/stores").json()["stores"]
        assert good["rows"] == 100
        assert (newer["name"], newer["problem"]["code"]) == ("newer", "format-version")
        answer = ask("GET", "/v1/stores/newer")
        assert answer.problem() == (501, "format-version")
        assert "upgrade" in answer.json()["detail"]
        assert ask.batch("newer", {"ids": [0]}).problem() == (501, "format-version")


class TestDescription:
    def test_the_manifest_comes_whole(self, ask: Any, stores: Any) -> None:
        """The client can rebuild it, and its digest is the one announced."""
        document = ask("GET", "/v1/stores/sparse").json()
        assert document["finished"] is True
        assert Manifest.from_json(document["manifest"]) == stores.manifests["sparse"]
        assert Manifest.from_json(document["manifest"]).digest == document["digest"]

    @pytest.mark.parametrize("tag", ['"{}"', 'W/"{}"', '"x", "{}"', "*"])
    def test_a_copy_of_this_version_is_not_sent_again(self, ask: Any, tag: str) -> None:
        """The ETag is the quoted digest; If-None-Match with it gives 304 and no body."""
        first = ask("GET", "/v1/stores/dense")
        digest = first.json()["digest"]
        assert first.headers["etag"] == f'"{digest}"'
        again = ask("GET", "/v1/stores/dense", if_none_match=tag.format(digest))
        assert (again.status, again.body, again.headers["etag"]) == (304, b"", f'"{digest}"')

    def test_a_copy_of_another_version_is(self, ask: Any) -> None:
        """Any other tag gives the manifest."""
        assert ask("GET", "/v1/stores/dense", if_none_match='"other"').status == 200

    def test_an_unknown_store(self, ask: Any) -> None:
        """404, saying where to look."""
        answer = ask("GET", "/v1/stores/imagenet")
        assert answer.problem() == (404, "unknown-store")
        assert "/v1/stores" in answer.json()["detail"]

    @pytest.mark.parametrize("name", ["..", "%2e%2e", "..%2f..", "%00", ".hidden", "a%2fb", "x" * 5000, "%ff"])
    def test_a_name_that_no_store_may_have(self, ask: Any, name: str) -> None:
        """Nothing outside the folder can be named."""
        answer = ask("GET", f"/v1/stores/{name}")
        assert answer.problem() in {(404, "unknown-store"), (404, "not-found")}


class TestReplacedStore:
    def test_a_new_version_is_served_and_the_old_one_refused(
        self, serve: Any, write: Any, rows_of: Any, tmp_path: Path
    ) -> None:
        """Clients that pinned the old version hear of it; others get the new rows."""
        old, new = rows_of(1), rows_of(2)
        before = write(tmp_path / "served" / "x", old)
        ask = serve(tmp_path / "served")
        assert ask.batch("x", {"ids": [0], "digest": before.digest}).status == 200

        after = write(tmp_path / "x", new)
        shutil.move(tmp_path / "served" / "x", tmp_path / "old")
        shutil.move(tmp_path / "x", tmp_path / "served" / "x")

        assert ask.batch("x", {"ids": [0], "digest": before.digest}).problem() == (412, "store-changed")
        answer = ask.batch("x", {"ids": [0]})
        assert answer.headers["softlabels-digest"] == after.digest
        np.testing.assert_array_equal(from_bytes(answer.body)[0]["targets"], new.logits_BC[:1])
        assert ask("GET", "/v1/stores/x").headers["etag"] == f'"{after.digest}"'

    def test_a_store_that_comes_to_be_finished(self, serve: Any, write: Any, rows_of: Any, tmp_path: Path) -> None:
        """Shards show as they are committed; the finished store is another version."""
        rows = rows_of(3)
        write(tmp_path / "x", rows, shards=1)
        ask = serve(tmp_path)
        begun = ask("GET", "/v1/stores/x").json()
        assert begun["finished"] is False
        assert ask.batch("x", {"ids": [40]}).problem() == (409, "rows-not-committed")
        write(tmp_path / "x", rows, shards=1)
        answer = ask.batch("x", {"ids": [40], "digest": begun["digest"]})
        np.testing.assert_array_equal(from_bytes(answer.body)[0]["targets"], rows.logits_BC[40:41])
        write(tmp_path / "x", rows)
        assert ask("GET", "/v1/stores/x").json()["finished"] is True
        assert ask.batch("x", {"ids": [99], "digest": begun["digest"]}).problem() == (412, "store-changed")
        assert ask.batch("x", {"ids": [99]}).status == 200

    def test_stores_come_and_go(self, serve: Any, write: Any, rows_of: Any, tmp_path: Path) -> None:
        """A store made later is found; one deleted is gone, though it was open."""
        root = tmp_path / "served"
        root.mkdir()
        ask = serve(root)
        assert ask("GET", "/health").json()["stores"] == 0
        write(root / "late", rows_of())
        assert ask.batch("late", {"ids": [0]}).status == 200
        shutil.rmtree(root / "late")
        assert ask.batch("late", {"ids": [0]}).problem() == (404, "unknown-store")
        assert ask("GET", "/v1/stores").json() == {"stores": []}
