"""Typed documents: what is refused, how the message names the field, and which bytes a document has."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import msgspec
import pytest

from softlabels.documents import Document, Number, as_json, canonical_json, open_sealed, parse_document, seal
from softlabels.errors import JobError, ManifestError


class Teacher(Document, frozen=True, kw_only=True):
    """A table within a table."""

    model: str
    weight: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    mean: Literal["arithmetic", "geometric"] = "geometric"


class Job(Document, frozen=True, kw_only=True):
    """A document with a list of tables, a bound, an optional key and a relation between two keys."""

    temperature: Number
    teachers: tuple[Teacher, ...] = ()
    first: Annotated[int, msgspec.Meta(ge=0)] = 0
    last: int | None = None

    def __post_init__(self) -> None:
        if self.last is not None and self.last < self.first:
            raise ValueError(f"last is {self.last}, before first, {self.first}")


class TestParseDocument:
    @pytest.mark.parametrize(
        ("value", "words"),
        [
            pytest.param({}, ["missing required field `temperature`"], id="missing"),
            pytest.param({"temperature": "4"}, ["expected", "`temperature`"], id="type"),
            pytest.param({"temperature": 4, "first": -1}, [">= 0", "`first`"], id="bound"),
            pytest.param({"temperature": 4, "first": True}, ["`first`"], id="true is no integer"),
            pytest.param({"temperature": 4, "first": 1.0}, ["`first`"], id="1.0 is no integer"),
            pytest.param({"temperature": 4, "temprature": 5}, ["unknown", "did you mean `temperature`?"], id="unknown"),
            pytest.param(
                {"temperature": 4, "teachers": [{"model": "m"}, {"model": "m", "wieght": 2}]},
                ["`teachers[1]`", "did you mean `weight`?"],
                id="unknown in a list",
            ),
            pytest.param(
                {"temperature": 4, "teachers": [{"model": "m", "mean": "median"}]},
                ["'arithmetic', 'geometric'", "`teachers[0].mean`"],
                id="choice",
            ),
            pytest.param({"temperature": 4, "first": 3, "last": 2}, ["last is 2"], id="relation"),
            pytest.param([], ["expected `object`"], id="no table"),
        ],
    )
    def test_a_message_names_the_field(self, value: Any, words: list[str]) -> None:
        """Path, bound, choices and the nearest key are in the message; the class is the caller's."""
        with pytest.raises(JobError) as caught:
            parse_document(value, Job, what="job.toml", error=JobError)
        message = str(caught.value)
        assert message.startswith("job.toml: ")
        for word in words:
            assert word in message

    def test_a_hostile_key_does_not_fill_the_message(self) -> None:
        """An unknown key of a megabyte is quoted in part."""
        with pytest.raises(ManifestError) as caught:
            parse_document({"temperature": 1, "x" * 1_000_000: 1}, Job, what="manifest")
        assert len(str(caught.value)) < 2_000

    def test_numbers_stay_as_written(self) -> None:
        """4 and 4.0 have other canonical bytes, so digests of older documents depend on it."""
        for written in (b'{"temperature":4}', b'{"temperature":4.0}'):
            found = as_json(parse_document(json.loads(written), Job, what="job"))
            assert canonical_json({"temperature": found["temperature"]}) == written

    def test_none_is_left_out(self) -> None:
        """A key that is None has the bytes of one that is absent."""
        with_none = parse_document({"temperature": 1, "last": None}, Job, what="job")
        assert as_json(with_none) == {"temperature": 1, "teachers": [], "first": 0}


class TestSeal:
    def test_it_reads_back(self) -> None:
        """The document comes back as it was."""
        document = {"name": "ä", "rows": [1, 2.5, None], "nested": {"a": True}}
        assert open_sealed(seal(document), what="it") == document

    def test_any_flipped_bit_is_noticed(self) -> None:
        """Every single-bit change is an error, or changes nothing but white space."""
        document = {"name": "store", "rows": 5}
        raw = seal(document)
        for position in range(len(raw) * 8):
            changed = bytearray(raw)
            changed[position // 8] ^= 1 << position % 8
            try:
                found = open_sealed(bytes(changed), what="it")
            except ManifestError:
                continue
            assert found == document
