"""docs/teachers.md is true: its tables are jobs, and it names every kind, key and setting that there is."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from softlabels.documents import parse_document
from softlabels.precompute.job import TeacherTable, job_from_json
from softlabels.precompute.teachers.image_preprocessing import ImagePreprocessing
from softlabels.precompute.teachers.model_hubs import HubSettings
from softlabels.precompute.teachers.model_sources import KINDS
from softlabels.precompute.teachers.saved_models import OnnxSettings

PAGE = (Path(__file__).resolve().parents[4] / "docs" / "teachers.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)


def teachers() -> list[TeacherTable]:
    """Every teacher of the page, read as a job file is."""
    found: list[TeacherTable] = []
    for block in BLOCKS:
        document: dict[str, Any] = tomllib.loads(block)
        job = job_from_json(
            {
                "store": {"path": "store"},
                "transfer_set": {"source": "nets.py:data"},
                "targets": {"temperature": 1},
                **document,
            },
            base=Path(),
        )
        found += job.teachers
    return found


def test_every_table_is_one_that_a_job_may_hold() -> None:
    """Also its preprocess table and the arguments of its kind."""
    for table in teachers():
        if isinstance(table.preprocess, dict):
            parse_document(table.preprocess, ImagePreprocessing, what="the page")
        for kind, settings in (("transformers", HubSettings), ("onnx", OnnxSettings)):
            if table.model.startswith(f"{kind}:"):
                parse_document(table.arguments, settings, what="the page")


def test_nothing_is_left_out() -> None:
    """Every kind, every key of a teacher, every step and every argument stands on the page."""
    shown = {table.model.partition(":")[0] for table in teachers()}
    assert set(KINDS) <= shown
    words = [
        name for cls in (TeacherTable, HubSettings, OnnxSettings, ImagePreprocessing) for name in cls.__struct_fields__
    ]
    assert [word for word in words if not re.search(rf"\b{word}\b", PAGE)] == []
