"""Inconsistent manifests are refused; whatever they say, nothing crashes and nothing large is allocated."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import softlabels
from softlabels.documents import open_sealed, seal
from softlabels.encodings import ENCODING_NAMES
from softlabels.errors import FormatVersionError, ManifestError, SoftLabelsError, UnknownEncodingError
from softlabels.manifest import FORMAT_VERSION, Manifest

Path_ = tuple[str | int, ...]
HUGE = 1 << 62

TEACHER = {"name": "a", "model": "m:f", "arguments": {}, "weight": 1.0}

LIES: dict[str, tuple[Path_, Any]] = {
    "a name that climbs": (("name",), "../../etc"),
    "a name with a slash": (("name",), "a/b"),
    "an empty name": (("name",), ""),
    "an unknown container": (("container",), "pickle"),
    "a container that is a list": (("container",), ["zarr"]),
    "a pickled type": (("arrays", "targets", "dtype"), "|O"),
    "a void type": (("arrays", "targets", "dtype"), "|V8"),
    "a string type": (("arrays", "targets", "dtype"), "<U4"),
    "a record type": (("arrays", "targets", "dtype"), [["a", "<f4"]]),
    "big-endian": (("arrays", "targets", "dtype"), ">f2"),
    "a type of no width": (("arrays", "targets", "dtype"), "<f1"),
    "other classes": (("arrays", "targets", "row_shape"), [5]),
    "an endless row": (("arrays", "targets", "row_shape"), [HUGE]),
    "an endless product": (("arrays", "fingerprints", "row_shape"), [1 << 31] * 8),
    "nine axes": (("arrays", "fingerprints", "row_shape"), [1] * 9),
    "a negative extent": (("arrays", "targets", "row_shape"), [-4]),
    "an empty extent": (("arrays", "targets", "row_shape"), [0]),
    "a fractional extent": (("arrays", "targets", "row_shape"), [4.0]),
    "a true extent": (("arrays", "targets", "row_shape"), [True]),
    "an array that climbs": (("arrays", "../../x"), {"dtype": "<f2", "row_shape": [4]}),
    "an array of no name": (("arrays", ""), {"dtype": "<f2", "row_shape": [4]}),
    "ids of another type": (("arrays", "ids", "dtype"), "<f8"),
    "fingerprints of another width": (("arrays", "fingerprints", "row_shape"), [8]),
    "labels of another type": (("arrays", "labels", "dtype"), "<i8"),
    "classes that are none": (("classes",), 0),
    "classes without end": (("classes",), HUGE),
    "true classes": (("classes",), True),
    "rows without end": (("layout", "rows"), HUGE),
    "other rows than samples": (("layout", "rows"), 101),
    "no rows": (("layout", "samples"), 0),
    "an unknown layout": (("layout", "kind"), "scattered"),
    "views that do not add up": (("layout", "views"), 2),
    "an unknown encoding": (("encoding", "name"), "pickle"),
    "an encoding that is a list": (("encoding", "name"), []),
    "parameters that it does not take": (("encoding", "params"), {"x": 1}),
    "parameters that are no table": (("encoding", "params"), [1]),
    "learnt arrays that climb": (("encoding", "constants"), ["../../x"]),
    "a temperature of nought": (("temperature", "default"), 0),
    "a negative temperature": (("temperature", "captured"), -1.0),
    "a temperature in words": (("temperature", "default"), "4"),
    "locked elsewhere than captured": (("temperature", "locked"), True),
    "locked perhaps": (("temperature", "locked"), 0),
    "chunks that do not divide": (("shards", "rows_per_chunk"), 7),
    "chunks of nothing": (("shards", "rows_per_chunk"), 0),
    "too many shards": (("shards", "count"), HUGE),
    "too few shards": (("shards", "count"), 1),
    "an unknown compression": (("shards", "compression"), "pickle"),
    "a compression that is a table": (("shards", "compression"), {}),
    "ids from nowhere": (("ids", "dense_start"), "0"),
    "ids beyond integers": (("ids", "dense_start"), 1 << 63),
    "ids of another kind": (("ids", "kind"), "float"),
    "ids of strings without width": (("ids", "kind"), "str"),
    "ids of endless width": (("ids", "width_bytes"), HUGE),
    "members without end": (("members",), HUGE),
    "fractional members": (("members",), 1.5),
    "a digest that is none": (("ledger",), "x" * 64),
    "a digest in upper case": (("plan_sha256",), "A" * 64),
    "a finished store without a plan": (("plan_sha256",), None),
    "a file that climbs": (("metadata_sha256", "../../x"), "0" * 64),
    "a file that is absolute": (("metadata_sha256", "/etc/passwd"), "0" * 64),
    "a file without a digest": (("metadata_sha256", "x"), 5),
    "an audit that is none": (("audit",), 5),
    "a fingerprint that is a number": (("transfer_set", "fingerprint"), 5),
    "a table with more in it": (("shards", "more"), 1),
    "teachers that are a table": (("teachers",), {}),
    "a teacher that is a number": (("teachers",), [5]),
    "a teacher that weighs nothing": (("teachers",), [{**TEACHER, "weight": 0}]),
    "a teacher whose weights are a number": (("teachers",), [{**TEACHER, "weights": 5}]),
    "a teacher's libraries in words": (("teachers",), [{**TEACHER, "libraries": "torch"}]),
    "a class list that is a number": (("class_list",), 5),
    "a class list without a digest": (("class_list",), {"names": ["a", "b", "c", "d"]}),
    "a class list of other names": (("class_list",), {"sha256": "0" * 64, "names": ["a", "b", "c", "d"]}),
    "views that are a number": (("views",), 5),
    "an old format": (("format",), "npz"),
    "a version in words": (("format_version",), "1"),
    "a true version": (("format_version",), True),
    "a version before the first": (("format_version",), 0),
}


def body_of(root: Path) -> dict[str, Any]:
    """The manifest's body."""
    return open_sealed((root / "manifest.json").read_bytes(), what="manifest")


def put(body: dict[str, Any], path: Path_, value: Any) -> dict[str, Any]:
    """A copy of the body with one value replaced."""
    changed: Any = copy.deepcopy(body)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return dict(changed)


def leaves(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """The path of every value, tables and lists among them."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from leaves(inner, (*path, number))


class TestLies:
    @pytest.mark.parametrize(("path", "value"), LIES.values(), ids=list(LIES))
    def test_it_is_refused(self, store: Path, path: Path_, value: Any, little_memory: Any) -> None:
        """With a valid digest and still refused, by the right error class, in little memory."""
        (store / "manifest.json").write_bytes(seal(put(body_of(store), path, value)))
        with little_memory(), pytest.raises((ManifestError, UnknownEncodingError)):
            softlabels.open(store)

    def test_a_newer_format(self, store: Path) -> None:
        """A store from the future says that an upgrade is needed, not that it is damaged."""
        (store / "manifest.json").write_bytes(seal(put(body_of(store), ("format_version",), FORMAT_VERSION + 1)))
        with pytest.raises(FormatVersionError, match="upgrade"):
            softlabels.open(store)

    @pytest.mark.parametrize("key", ["arrays", "shards", "encoding", "layout", "ids", "transfer_set", "software"])
    def test_a_missing_part(self, store: Path, key: str) -> None:
        """A manifest without one of its tables is refused."""
        body = body_of(store)
        del body[key]
        (store / "manifest.json").write_bytes(seal(body))
        with pytest.raises(ManifestError):
            softlabels.open(store)


class TestAnything:
    @pytest.mark.parametrize("examples", [60, pytest.param(2000, marks=pytest.mark.slow)])
    def test_one_value_replaced_by_anything(self, store: Path, rows: Any, examples: int) -> None:
        """Whatever one value of the manifest becomes: the right rows, or an error of ours."""
        body = open_sealed((store / "manifest.json").read_bytes(), what="manifest")
        anything = st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(max_size=20),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=5,
        )

        @settings(max_examples=examples)
        @given(data=st.data())
        def check(data: st.DataObject) -> None:
            path = data.draw(st.sampled_from(sorted(leaves(body), key=str)))
            changed = put(body, path, data.draw(anything | st.sampled_from([HUGE, -1, 1 << 31, "..", 0])))
            (store / "manifest.json").write_bytes(seal(changed))
            try:
                batch = softlabels.open(store).batch([0, 99, 5])
            except SoftLabelsError:
                return
            assert np.array_equal(batch.encoded["targets"], rows[[0, 99, 5]])

        check()


class TestAbsurdShapes:
    @pytest.mark.parametrize("name", ENCODING_NAMES)
    @pytest.mark.parametrize("classes", [1 << 31, 1 << 20])
    def test_an_encoding_of_endless_rows(self, store: Path, name: str, classes: int, little_memory: Any) -> None:
        """Two billion classes are refused at once, a million are found not to fit the arrays beside them."""
        params = {"topk": {"k": classes}, "sampled": {"head": 5, "draws": 1 << 20}}.get(name, {})
        body = put(put(body_of(store), ("classes",), classes), ("encoding", "name"), name)
        body["encoding"]["params"] = params
        with little_memory(200 if classes == 1 << 20 else 1), pytest.raises((ManifestError, UnknownEncodingError)):
            Manifest.from_json(body)

    @pytest.mark.parametrize("members", [1 << 20, 1 << 10])
    def test_endless_members(self, store: Path, members: int, little_memory: Any) -> None:
        """Members that fit the arrays named beside them are accepted, and cost nothing until rows are read."""
        body = put(put(body_of(store), ("members",), members), ("arrays", "targets", "row_shape"), [members, 4])
        with little_memory():
            Manifest.from_json(body)

    @pytest.mark.parametrize(("count", "per_shard"), [(1 << 48, 1 << 40), (1 << 40, 1 << 20), (1 << 24, 8)])
    def test_endless_rows(self, store: Path, rewrite: Callable[..., None], count: int, per_shard: int) -> None:
        """A store that claims 2^48 rows opens or is refused, and asking for its last row is an error, in 200 MB."""

        def grow(body: dict[str, Any]) -> None:
            body["layout"].update(rows=count, samples=count)
            body["shards"].update(count=-(-count // per_shard), rows_per_shard=per_shard, rows_per_chunk=8)

        rewrite(store / "manifest.json", grow)
        program = (
            "import resource, sys, softlabels, softlabels.errors\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            f"try: softlabels.open({str(store)!r}).batch([0, {count - 1}])\n"
            "except softlabels.errors.SoftLabelsError as error: print(type(error).__name__)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() in ("ManifestError", "TruncatedError")
        kilobytes = int(done.stderr) / (1024 if sys.platform == "darwin" else 1)
        assert kilobytes < 200_000
