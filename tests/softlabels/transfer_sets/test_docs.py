"""docs/transfer-sets.md: every example is a job that would be read, and names arguments that there are."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from softlabels.precompute.job import job_from_json
from softlabels.references import load_reference
from softlabels.transfer_sets import KINDS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "transfer-sets.md"
BLOCKS = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
IMAGES = {"size", "resize", "mode", "layout", "threads"}


def parameters(kind: str) -> set[str]:
    """The arguments of a kind, but for what every kind takes."""
    return set(load_reference(KINDS[kind]).__struct_fields__) - {"name"}


@pytest.mark.parametrize("block", BLOCKS)
class TestExample:
    def test_it_is_a_job(self, block: str) -> None:
        """With what the page leaves out beside it, it reads as a job; its arguments are those of its source."""
        rest: dict[str, Any] = {
            "store": {"path": "s"},
            "transfer_set": {"source": "a:b"},
            "targets": {"temperature": 1.0},
            "teachers": [{"model": "a:b"}],
        }
        job = job_from_json({**rest, **tomllib.loads(block)}, base=Path())
        if job.transfer_set.source in KINDS:
            assert set(job.transfer_set.arguments) <= parameters(job.transfer_set.source)


@pytest.mark.parametrize("kind", KINDS)
class TestKind:
    def test_its_section_names_every_argument(self, kind: str) -> None:
        """A heading, an example, and each argument by name; those of images are described once."""
        section = PAGE.read_text(encoding="utf-8").split(f"## `{kind}`", 1)[1].split("\n## ", 1)[0]
        shared = IMAGES if kind != "image_folder" and "those of images" in section else set()
        assert {key for key in parameters(kind) - shared if f"`{key}`" not in section} == set()
        assert f'source = "{kind}"' in section
