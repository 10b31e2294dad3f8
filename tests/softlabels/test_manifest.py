"""Manifests: what their JSON form keeps, and messages that name the field at fault."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

import pytest

from softlabels.class_list import make_class_list
from softlabels.documents import canonical_json
from softlabels.encodings import make_encoding
from softlabels.errors import FormatVersionError, ManifestError
from softlabels.manifest import (
    FORMAT_VERSION,
    IdSpec,
    Manifest,
    TemperatureSpec,
    TransferSetSpec,
    check_encoding,
)
from softlabels.store import plan_store
from softlabels.store.store_plan import check_store_name


@pytest.fixture
def plan() -> Manifest:
    """The manifest of an unfinished store: 100 samples of 4 classes."""
    return plan_store(
        name="store",
        samples=100,
        ids=IdSpec(kind="int", dense_start=0),
        encoding=make_encoding("f16", classes=4),
        temperature=TemperatureSpec(default=4, captured=1.0, locked=False),
        mean="none",
        teachers=(),
        transfer_set=TransferSetSpec(name="x", source="x:y", arguments={}, labelled=True),
        container="zarr",
        rows_per_shard=32,
        rows_per_chunk=8,
    )


class TestJson:
    def test_it_reads_back(self, plan: Manifest) -> None:
        """Through JSON text: the same manifest, the same digest."""
        again = Manifest.from_json(json.loads(json.dumps(plan.to_json())))
        assert (again, again.digest) == (plan, plan.digest)

    def test_the_digest_is_that_of_the_canonical_json(self, plan: Manifest) -> None:
        """So any language can compute it. Numbers stay as they were written: 4 is not 4.0."""
        document = plan.to_json()
        assert document["temperature"] == {"captured": 1.0, "default": 4, "locked": False}
        assert b'"default":4,' in canonical_json(document)
        assert plan.digest == hashlib.sha256(canonical_json(document)).hexdigest()

    def test_what_is_none_is_left_out(self, plan: Manifest) -> None:
        """A field that a later version adds leaves older digests as they are."""
        assert not {"ledger", "views", "members", "class_list"} & set(plan.to_json())

    def test_finishing_names_the_plan(self, plan: Manifest) -> None:
        """The manifest of the finished store says which plan it came from."""
        done = plan.finish(ledger="0" * 64, fingerprint="f", audit={}, metadata_sha256={})
        assert (done.finished, done.plan_sha256, done.transfer_set.fingerprint) == (True, plan.digest, "f")


class TestMessages:
    @pytest.mark.parametrize(
        ("path", "value", "words"),
        [
            (("classes",), 0, "classes"),
            (("layout", "rows"), 101, "layout"),
            (("shards", "count"), 7, r"shards\.count"),
            (("shards", "rows_per_chunk"), 7, "shards"),
            (("arrays", "targets", "dtype"), "|O", "dtype"),
            (("arrays", "ids", "dtype"), "<f8", r"arrays\.ids"),
            (("temperature", "locked"), 0, r"temperature\.locked"),
            (("temperature", "captured"), float("inf"), r"temperature\.captured"),
            (("name",), "store\n", "name"),
            (("shardz",), {}, "did you mean `shards`"),
        ],
    )
    def test_they_name_the_path(self, plan: Manifest, path: tuple[str, ...], value: Any, words: str) -> None:
        """Of the field that is wrong, missing, unknown or contradicts another."""
        document: Any = copy.deepcopy(plan.to_json())
        table = document
        for key in path[:-1]:
            table = table[key]
        table[path[-1]] = value
        with pytest.raises(ManifestError, match=words):
            Manifest.from_json(document)

    def test_a_newer_format_asks_for_an_upgrade(self, plan: Manifest) -> None:
        """Whatever else is in it: its fields may mean something else."""
        with pytest.raises(FormatVersionError, match="upgrade"):
            Manifest.from_json({**plan.to_json(), "format_version": FORMAT_VERSION + 1, "more": 1})

    def test_an_encoding_of_other_arrays(self, plan: Manifest) -> None:
        """Rows of another width would be decoded as other classes."""
        assert check_encoding(plan, plan.make_encoding()).name == "f16"
        with pytest.raises(ManifestError, match="targets"):
            check_encoding(plan, make_encoding("f16", classes=5))

    @pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../a", "a\n", "a" * 129])
    def test_a_name_that_is_no_path_segment(self, name: str) -> None:
        """It stands in URLs and on disk."""
        with pytest.raises(ManifestError):
            check_store_name(name)


class TestClassLists:
    def test_names_have_to_fit_the_classes(self, plan: Manifest) -> None:
        """As many as there are columns, with the digest beside them."""
        names = make_class_list(["a", "b", "c", "d"])
        document = {**plan.to_json(), "class_list": {"sha256": names.sha256, "names": ["a", "b", "c", "d"]}}
        assert Manifest.from_json(document).class_list == names
        document["class_list"]["names"] = ["a", "b", "d", "c"]
        with pytest.raises(ManifestError, match=r"class_list\.names"):
            Manifest.from_json(document)
